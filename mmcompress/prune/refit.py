"""Closed-form repair: the output projection of a cut block, fitted to what the dense block put out.

Ridge least squares from second moments alone: W' = C (G + r I)^-1, where G is the covariance of the kept inputs and C
their cross-covariance with the dense outputs; of a layer without a bias, which can't make up for means, both about the
origin. See Kwon et al. 2022, ZipLM (Kurtic et al. 2023), OSSCAR.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcompress.graph.blocks import Block
from mmcompress.kinds.base import Batch, Models
from mmcompress.models.base import Model
from mmcompress.models.replacements import ConstantOutput
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.masks import feature_indices, hook_inputs
from mmcompress.prune.surgery import copy_without_units


@dataclass(kw_only=True)
class Gram:
    """Running sums over n rows of inputs x [f] of one output projection."""

    xx: Tensor
    x: Tensor
    n: float = 0.0

    @classmethod
    def empty(cls, size: int) -> Gram:
        return cls(xx=torch.zeros(size, size), x=torch.zeros(size))

    def add_(self, rows: Tensor) -> None:
        self.xx += rows.T @ rows
        self.x += rows.sum(0)
        self.n += len(rows)

    def second(self) -> Tensor:
        return self.xx / self.n

    def mean(self) -> Tensor:
        return self.x / self.n

    def covariance(self) -> Tensor:
        return self.second() - torch.outer(self.mean(), self.mean())


Grams = dict[str, Gram]


def _rows(x: Tensor, block: Block, *, batch: Batch, node: str) -> Tensor:
    """The positions that count as rows [r, f]; of a prefix before the text all of them."""
    if x.ndim == 4:  # [b, f, h, w] of a convolution
        x = x.permute(0, 2, 3, 1)
    keep = batch.keep.get(node)
    if keep is not None and "stream" in block.reads:
        keep = keep.flatten(0, -2)
        before = x.shape[1] - keep.shape[1]
        keep = (
            torch.cat([keep.new_ones(len(keep), before), keep], 1)
            if before > 0
            else keep[:, : x.shape[1]]
        )
        x = x[keep]
    return x.reshape(-1, x.shape[-1])


@torch.inference_mode()
def measure_grams(pipeline: TorchPipeline, models: Models, *, batch: Batch) -> dict[str, Grams]:
    """Second moments of the inputs of every block's output projection in the dense pipeline."""
    found = {
        n: {b.name: Gram.empty(b.units * b.width) for b in m.weighted_blocks}
        for n, m in models.items()
    }
    for piece in batch.chunks(pipeline.batch_size):
        with ExitStack() as stack:
            for n, m in models.items():
                for b in m.weighted_blocks:

                    def record(x: Tensor, b: Block = b, n: str = n, piece: Batch = piece) -> Tensor:
                        found[n][b.name].add_(_rows(x, b, batch=piece, node=n))
                        return x

                    stack.enter_context(hook_inputs(m, (b.reader,), hook=record))
            pipeline.forward(models, piece)
    return found


def solve_ridge(cross: Tensor, covariance: Tensor, *, ridge: float) -> Tensor:
    """cross (covariance + r I)^-1 with r = ridge times the mean of the diagonal; cross is [o, k]."""
    r = ridge * covariance.diag().mean().clamp(min=1e-8)
    a = covariance.double() + r.double() * torch.eye(len(covariance), dtype=torch.double)
    return torch.linalg.solve(a, cross.double().T).T.float()


@torch.no_grad()
def refit_from_gram_(
    model: Model, dense: Model, *, units: dict[str, Tensor], grams: Grams, ridge: float
) -> None:
    """Refit every cut block of `model` (already sliced to `units`) as if only that block had been cut.

    Needs no forward pass: the inputs' moments are those of the dense model. This is what a trial uses.
    """
    for block in dense.blocks:
        kept = units.get(block.name)
        if kept is None or len(kept) == block.units or not is_refittable(dense, block):
            continue
        gram, out = grams[block.name], dense.get_linear(block.reader)
        mean, k = gram.mean(), feature_indices(block, kept)
        bias = out.bias if out.bias is not None else torch.zeros(out.out_features)
        if len(k) == 0:
            _constant(model, block).bias.copy_(bias + out.weight @ mean)
            continue
        new = model.get_linear(block.reader)
        moments = gram.second() if new.bias is None else gram.covariance()
        w = solve_ridge(out.weight @ moments[:, k], moments[k][:, k], ridge=ridge)
        new.weight.copy_(w)
        if new.bias is not None:
            new.bias.copy_(bias + out.weight @ mean - w @ mean[k])


def is_refittable(model: Model, block: Block) -> bool:
    """A block read by a linear layer can be refitted; what a convolution reads is mixed over places."""
    return isinstance(model.get_submodule(block.reader), nn.Linear)


def _constant(model: Model, block: Block) -> ConstantOutput:
    path = next(p for p, mode in block.drop if not mode.startswith("skip"))
    found = model.get_submodule(path)
    assert isinstance(found, ConstantOutput)
    return found


@torch.inference_mode()
def refit_(
    pipeline: TorchPipeline, models: dict[str, Model], *, dense: Models, batch: Batch, ridge: float
) -> None:
    """Refit every cut block in order, each on the inputs that the pruned pipeline before it really gives.

    One pass over the whole batch for each node: a block is refitted as the pass comes to it, which goes on from what it
    then puts out. Positions that were cut are cut of the dense side too: they have no counterpart.
    """
    dense = {n: _as_long(m, models[n]) for n, m in dense.items()}
    teacher = pipeline.forward_in_pieces(dense, batch)
    upstream: dict[str, dict[str, Tensor]] = {}
    for node in pipeline.order:
        small, big = models[node], dense[node]
        now = {b.name: b for b in small.blocks}
        cut = [
            b
            for b in big.weighted_blocks
            if is_refittable(big, b) and (b.name not in now or now[b.name].units < b.units)
        ]
        targets = _record(pipeline, node, models=dense, batch=batch, known=teacher, blocks=cut)
        with ExitStack() as stack:
            for block in cut:
                if block.name not in now:
                    _constant(small, block).bias.data.copy_(targets.pop(block.name).mean(0))
                    continue

                def repair(
                    out: nn.Linear, args: tuple, _: Tensor, b: Block = block, node: str = node
                ) -> Tensor:
                    _regress_(
                        out,
                        _rows(args[0], b, batch=batch, node=node),
                        y=targets.pop(b.name),
                        ridge=ridge,
                    )  # noqa: B023
                    return out.forward(args[0])

                handle = small.get_linear(block.reader).register_forward_hook(repair)
                stack.callback(handle.remove)
            known = dict(upstream) | _others(teacher, upstream, node=node)
            upstream[node] = pipeline.forward({node: small}, batch, known)[node]


def _regress_(out: nn.Linear, x: Tensor, *, y: Tensor, ridge: float) -> None:
    """Make a linear layer give y [r, o] for inputs x [r, f], as nearly as it can."""
    mx, my = (
        (x.mean(0), y.mean(0))
        if out.bias is not None
        else (x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1]))
    )
    xc = x - mx
    w = solve_ridge((y - my).T @ xc / len(x), xc.T @ xc / len(x), ridge=ridge)
    out.weight.data.copy_(w)
    if out.bias is not None:
        out.bias.data.copy_(my - w @ mx)


def _as_long(dense: Model, small: Model) -> Model:
    at = small.token_selector
    return (
        dense
        if at is None or at.kept_count == at.count
        else copy_without_units(dense, {"tokens": at.index})
    )


def _others(teacher: dict, upstream: dict, *, node: str) -> dict:
    return {n: o for n, o in teacher.items() if n != node and n not in upstream}


def _record(
    pipeline: TorchPipeline,
    node: str,
    *,
    models: Models,
    batch: Batch,
    known: dict,
    blocks: list[Block],
) -> dict[str, Tensor]:
    """Outputs [rows, f] of the output projections of some blocks of one node, over the whole batch."""
    found: dict[str, list[Tensor]] = {b.name: [] for b in blocks}
    if not blocks:
        return {}
    size = pipeline.batch_size
    for i in range(0, len(batch), size):
        piece = batch[slice(i, i + size)]
        handles = []
        for b in blocks:

            def hook(
                m: object, args: tuple, out: Tensor, b: Block = b, piece: Batch = piece
            ) -> None:
                found[b.name].append(_rows(out, b, batch=piece, node=node))

            handles.append(models[node].get_submodule(b.reader).register_forward_hook(hook))
        part = {
            n: {k: v[i : i + size] for k, v in o.items()} for n, o in known.items() if n != node
        }
        missing: dict[str, dict[str, Tensor]] = {
            n: {} for n in pipeline.order if n != node and n not in part
        }
        pipeline.forward(models, piece, part | missing)
        for h in handles:
            h.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}
