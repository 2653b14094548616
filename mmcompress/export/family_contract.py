"""The contract every model family keeps: proofs on one model alone, whatever its weights.

    proofs = prove(model, folder)

Cuts of every unit kind, alone and mixed, leave what masking leaves; the exported graphs compute what torch does; cached
generation is the library's own; parameters and multiply-accumulates fall as computed; a pruned student learns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcompress.export.onnx import export_node
from mmcompress.export.proofs import (
    SURGERY_BOUND,
    _proof,
    prove_export,
    prove_generation,
    relative_difference,
)
from mmcompress.graph.blocks import Block
from mmcompress.models.base import Model
from mmcompress.models.counts import count_params, count_params_and_macs
from mmcompress.prune.masks import mask_units, sample_units
from mmcompress.prune.surgery import copy_without_units
from mmcompress.results.records import Proof

Units = dict[str, Tensor]


def random_inputs(model: Model, batch: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of a model's `forward`."""
    g = torch.Generator().manual_seed(seed)
    if model.kind == "image_encoder":
        return (torch.randn(batch, 3, model.size, model.size, generator=g),)
    if model.kind == "audio_encoder":
        features = model.config["features"]
        return (torch.randn(batch, features["mels"], features["frames"], generator=g),)
    if model.kind == "text_encoder":
        ids = torch.randint(
            3, model.vocabulary, (batch, model.config["context_length"]), generator=g
        )
        ids[:, -1] = model.config["eos"]
        return (ids,)
    ids = torch.randint(3, model.vocabulary, (batch, 7), generator=g)
    return ids, torch.randn(batch, 9, model.dims["context"], generator=g)


def tuple_outputs(model: Model, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = model(*given)
    return out if isinstance(out, tuple) else (out,)


def group_blocks_by_kind(model: Model) -> dict[str, list[Block]]:
    """The unit kinds a model can lose, with the blocks that hold them."""
    found: dict[str, list[Block]] = {}
    for b in model.blocks:
        found.setdefault(b.kind, []).append(b)
    return found


def _some(blocks: list[Block], share: float, *, seed: int) -> Units:
    g = torch.Generator().manual_seed(seed)
    keep = lambda b: (
        max(b.granularity, int(b.units * share) // b.granularity * b.granularity)
        if share
        else b.min_units
    )
    return {b.name: sample_units(b, keep(b), generator=g) for b in blocks}


def sample_cuts(model: Model, seed: int = 0) -> dict[str, Units]:
    """Named cuts: half of each unit kind, whole sub-layers, and a random mixture of everything."""
    found = {
        kind: _some(blocks, 0.5, seed=seed) for kind, blocks in group_blocks_by_kind(model).items()
    }
    for kind, blocks in group_blocks_by_kind(model).items():
        for i, b in enumerate(b for b in blocks if b.drop):
            found[f"{kind} dropped" + (f", {i + 1}" if i else "")] = _some([b], 0.0, seed=seed)
    mixture: Units = {}
    for i, b in enumerate(model.blocks):
        mixture |= _some([b], (0.25, 0.5, 0.75, 0.0)[(i * 7 + seed) % 4], seed=seed + i)
    return {**found, "mixture": mixture}


@torch.no_grad()
def prove_cuts(node: str, model: Model, *, batch: int = 3) -> list[Proof]:
    """masked == sliced for every cut of `cuts`."""
    proofs, given = [], random_inputs(model, batch)
    for name, units in sample_cuts(model).items():
        masks = {}
        for block, kept in units.items():
            masks[block] = torch.zeros(model.get_block(block).units)
            masks[block][kept] = 1
        with mask_units(model, masks):
            want = tuple_outputs(model, given)
        got = tuple_outputs(copy_without_units(model, units), given)
        worst = max(relative_difference(a, b) for a, b in zip(want, got, strict=True))
        proofs.append(
            _proof(f"masked == sliced: {name}", node, difference=worst, bound=SURGERY_BOUND)
        )
    return proofs


@torch.no_grad()
def prove_library_match(
    node: str, model: Model, *, says: Callable[..., tuple[Tensor, ...]], batch: int = 3
) -> list[Proof]:
    """The whole model == `says`, the (first) outputs of its library's own untouched one for the same inputs."""
    given = random_inputs(model, batch)
    worst = max(
        relative_difference(a, b)
        for a, b in zip(says(*given), tuple_outputs(model, given), strict=False)
    )
    return [_proof("dense == library", node, difference=worst, bound=SURGERY_BOUND)]


def count_removed_params(model: Model, units: Units) -> int:
    """Parameters that a cut takes away, computed from the blocks alone; whole sub-layers are not among the cuts."""
    rows, columns = _gone(model, units)
    total = 0
    for path in {*rows, *columns}:
        module: Any = model.get_submodule(path)
        gone = _weights_gone(module, rows.get(path, 0), columns=columns.get(path, 0))
        total += gone + rows.get(path, 0) * (module.bias is not None)
    return total


def _weights_gone(module: Any, rows: int, *, columns: int) -> int:
    """Weights of a layer that loses so many of its outputs and inputs."""
    height = module.weight.shape[0]
    width = module.weight.shape[1] if module.weight.ndim > 1 else 1
    cell = module.weight.numel() // (height * width)
    return (height * width - (height - rows) * (width - columns)) * cell


def _gone(model: Model, units: Units) -> tuple[dict[str, int], dict[str, int]]:
    """(outputs, inputs) that layers lose by a cut."""
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    for name, kept in units.items():
        b = model.get_block(name)
        if b.group == "tokens":
            continue
        gone = b.units - len(kept)
        for w in b.writers:
            rows[w.path] = gone * w.parts * w.width
        for path in b.per_channel:
            rows[path] = gone * b.width
        for path in (b.reader, *b.extra_readers):
            columns[path] = gone * b.width
    return rows, columns


@torch.no_grad()
def count_removed_macs(model: Model, units: Units, *, steps: float, beams: int) -> float:
    """Multiply-accumulates a request that a cut spares, computed from the whole model: what each weight that goes meets
    there, and the products of attention by shape."""
    rows, columns = _gone(model, units)
    met: dict[str, float] = {}
    paths = {id(model.get_submodule(p)): p for p in {*rows, *columns}}
    for name, (given, calls) in model.make_example_requests(steps, beams).items():

        def hook(m: torch.nn.Module, args: tuple, out: Tensor, calls: float = calls) -> None:
            places = out.numel() / (out.shape[1] if out.ndim == 4 else out.shape[-1])
            met[paths[id(m)]] = met.get(paths[id(m)], 0.0) + places * calls

        module = model.export_graphs()[name].module
        handles = [m.register_forward_hook(hook) for m in module.modules() if id(m) in paths]
        module(*given)
        for h in handles:
            h.remove()
    total = 0.0
    for path, places in met.items():
        module = model.get_submodule(path)
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            total += places * _weights_gone(module, rows.get(path, 0), columns=columns.get(path, 0))
    shapes = model.list_block_shapes(steps, beams)
    for b in (model.get_block(name) for name in units):
        if b.group == "heads":
            s, gone = shapes[b.name], b.units - len(units[b.name])
            total += 2 * gone * b.width * s.positions * s.keys * s.batch * s.calls
    return total


def prove_counts(node: str, model: Model) -> list[Proof]:
    """Parameters and multiply-accumulates fall as computed; with positions gone, the latter just fall."""
    proofs, whole = [], count_params_and_macs(model, 4.0, beams=1)[1]
    for kind, blocks in group_blocks_by_kind(model).items():
        units = _some(blocks, 0.5, seed=1)
        small = copy_without_units(model, units)
        off = abs(count_params(model) - count_params(small) - count_removed_params(model, units))
        proofs.append(_proof(f"parameters fall as computed: {kind}", node, difference=off, bound=0))
        fell = whole - count_params_and_macs(small, 4.0, beams=1)[1]
        if kind == "tokens":
            proofs.append(
                _proof("MACs fall: tokens", node, difference=1 - fell / whole, bound=0.9999)
            )
        else:
            wanted = count_removed_macs(model, units, steps=4.0, beams=1)
            proofs.append(
                _proof(
                    f"MACs fall as computed: {kind}",
                    node,
                    difference=abs(fell - wanted) / wanted,
                    bound=1e-6,
                )
            )
    return proofs


def prove_learning(node: str, model: Model) -> list[Proof]:
    """A backward pass reaches every part, and one step of distillation lowers the loss; `difference` is the ratio."""
    given = random_inputs(model, 4)
    with torch.no_grad():
        target = [x.clone() for x in tuple_outputs(model, given)]
    student = copy_without_units(
        model, _some([b for b in model.blocks if b.group != "tokens"], 0.5, seed=2)
    )
    loss = lambda: sum(
        (a - b).square().mean() for a, b in zip(tuple_outputs(student, given), target, strict=True)
    )
    before = loss()
    before.backward()
    reached = [
        student.get_submodule(w.path).weight.grad is not None
        for b in student.weighted_blocks
        for w in b.writers
    ]
    with torch.no_grad():
        norm = (
            sum(float(p.grad.square().sum()) for p in student.parameters() if p.grad is not None)
            ** 0.5
        )
        for p in student.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad / max(norm, 1e-12)
        ratio = float(loss()) / float(before)
    proofs = [
        _proof("the gradient reaches every block", node, difference=reached.count(False), bound=0)
    ]
    return [
        *proofs,
        _proof("one step of distillation lowers the loss", node, difference=ratio, bound=0.999999),
    ]


def prove_contract(model: Model, folder: Path, *, node: str = "node") -> list[Proof]:
    """All proofs of the contract, on the dense model and on a random mixture of cuts."""
    proofs = prove_cuts(node, model) + prove_counts(node, model) + prove_learning(node, model)
    for name, m in (
        ("dense", model),
        ("mixture", copy_without_units(model, sample_cuts(model)["mixture"]).eval()),
    ):
        files = export_node(m, folder / name)
        proofs += [_named(p, name) for p in prove_export(node, m, files=files)]
        if model.kind == "text_decoder":
            (folder / name / "tokenizer.json").write_text(m.tokenizer_json or "")
            context = torch.randn(
                4, 9, model.dims["context"], generator=torch.Generator().manual_seed(5)
            )
            proofs += [
                _named(p, name)
                for p in prove_generation(
                    node, m, files=files, folder=folder / name, contexts=context
                )
            ]
    return proofs


def _named(p: Proof, name: str) -> Proof:
    return Proof(
        name=f"{p.name}: {name}",
        node=p.node,
        difference=p.difference,
        bound=p.bound,
        passed=p.passed,
        detail=p.detail,
    )
