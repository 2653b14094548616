"""Refit: closed-form repair of the layer that reads a cut block.

The layer is fitted to what the dense block put out, by ridge least squares from moments:

    W' = C (G + r I)^-1

G is the covariance of the inputs that are kept, C their cross-covariance with the dense outputs. A
layer without a bias can't make up for means: there both are about the origin. See Kwon et al. 2022,
ZipLM (Kurtic et al. 2023) and OSSCAR (Meng et al. 2024).

Shapes in this file:
    R  rows: samples times positions     O  outputs of the layer
    F  features that it reads            K  features that are kept
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from mmcompress.graph.blocks import Block
from mmcompress.kinds.base import Batch, Models, Outputs
from mmcompress.models.base import Model
from mmcompress.models.device import make_double
from mmcompress.models.replacements import ConstantOutput
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.masks import list_feature_indices, transform_inputs
from mmcompress.prune.surgery import copy_without_units

MIN_MEAN_VARIANCE = 1e-8
"""Least mean variance that a ridge is a share of: what a block reads may be constant."""


@dataclass(kw_only=True)
class Gram:
    """Running sums over the inputs of one output projection."""

    product_sums: Tensor
    """[f, f] sum over rows of x x^T."""
    sums: Tensor
    """[f] sum over rows of x."""
    row_count: float = 0.0
    """Rows that were added."""

    @classmethod
    def make_empty(cls, size: int, *, device: torch.device) -> Gram:
        """Return sums over no rows of `size` features."""
        product_sums = torch.zeros(size, size, device=device)
        return cls(product_sums=product_sums, sums=torch.zeros(size, device=device))

    def move(self, device: torch.device) -> Gram:
        """Return the sums on a device."""
        return replace(self, product_sums=self.product_sums.to(device), sums=self.sums.to(device))

    def add_(self, rows_RF: Tensor) -> None:
        """Add some rows."""
        self.product_sums += rows_RF.T @ rows_RF
        self.sums += rows_RF.sum(0)
        self.row_count += len(rows_RF)

    def compute_second_moment(self) -> Tensor:
        """Return the mean of x x^T [f, f]."""
        return self.product_sums / self.row_count

    def compute_mean(self) -> Tensor:
        """Return the mean of x [f]."""
        return self.sums / self.row_count

    def compute_covariance(self) -> Tensor:
        """Return the covariance of x [f, f]."""
        mean_F = self.compute_mean()
        return self.compute_second_moment() - torch.outer(mean_F, mean_F)


Grams = dict[str, Gram]
"""Moments by block of one node."""


def measure_grams(pipeline: TorchPipeline, models: Models, *, batch: Batch) -> dict[str, Grams]:
    """Measure the moments of what every block's reader reads.

    Args:
        pipeline: The graph that the models run in.
        models: The models by node, usually the dense ones.
        batch: Calibration pairs.

    Returns:
        Moments by node and block.
    """
    return pipeline.retry_with_fewer_pairs(partial(_measure_grams, pipeline, models, batch=batch))


@torch.inference_mode()
def _measure_grams(pipeline: TorchPipeline, models: Models, *, batch: Batch) -> dict[str, Grams]:
    """Measure the moments in pieces of the pipeline's batch size."""
    grams: dict[str, Grams] = {}
    for node_name, model in models.items():
        grams[node_name] = {}
        for block in model.weighted_blocks:
            grams[node_name][block.name] = Gram.make_empty(
                block.units * block.width, device=pipeline.device
            )
    for piece in batch.split_evenly(pipeline.batch_size):
        with ExitStack() as stack:
            for node_name, model in models.items():
                for block in model.weighted_blocks:
                    record = _make_gram_recorder(
                        grams[node_name][block.name], block, batch=piece, node_name=node_name
                    )
                    hook = transform_inputs(model, (block.reader,), transform=record)
                    stack.enter_context(hook)
            # Outputs don't matter: the hooks see what is read.
            pipeline.forward(models, piece)
    return grams


def _make_gram_recorder(
    gram: Gram, block: Block, *, batch: Batch, node_name: str
) -> Callable[[Tensor], Tensor]:
    """Make a function that adds an input to moments and returns it unchanged."""

    def record_input(x: Tensor) -> Tensor:
        rows_RF = _select_rows(x, block, batch=batch, node_name=node_name)
        gram.add_(rows_RF)
        return x

    return record_input


def _select_rows(x: Tensor, block: Block, *, batch: Batch, node_name: str) -> Tensor:
    """Return the positions that hold something as rows [r, f]; all those of a prefix do."""
    if x.ndim == 4:
        # [b, f, h, w] of a convolution: every place of the picture is a row.
        x = x.permute(0, 2, 3, 1)
    keep = batch.keep.get(node_name)
    if keep is not None and "stream" in block.reads:
        # Of several texts a sample, each one has a row of its own.
        keep = keep.flatten(0, -2)
        prefix_length = x.shape[1] - keep.shape[1]
        if prefix_length > 0:
            prefix = keep.new_ones(len(keep), prefix_length)
            keep = torch.cat([prefix, keep], 1)
        else:
            keep = keep[:, : x.shape[1]]
        x = x[keep]
    return x.reshape(-1, x.shape[-1])


def solve_ridge(cross_OK: Tensor, covariance_KK: Tensor, *, ridge: float) -> Tensor:
    """Return the weights of a ridge regression [o, k]: C (G + r I)^-1.

    Args:
        cross_OK: Cross-covariance C of outputs and inputs.
        covariance_KK: Covariance G of the inputs.
        ridge: r as a share of the mean of G's diagonal.
    """
    mean_variance = covariance_KK.diag().mean()
    added_variance = ridge * mean_variance.clamp(min=MIN_MEAN_VARIANCE)
    # Double precision: the inputs of a layer may be nearly dependent.
    exact_KK = make_double(covariance_KK)
    identity_KK = torch.eye(len(exact_KK), dtype=torch.double, device=exact_KK.device)
    regular_KK = exact_KK + make_double(added_variance) * identity_KK
    # W A = C is solved as A W^T = C^T, for A is symmetric.
    cross_KO = make_double(cross_OK).T
    weight_KO: Tensor = torch.linalg.solve(regular_KK, cross_KO)
    return weight_KO.T.float().to(cross_OK.device)


@torch.no_grad()
def refit_from_gram_(
    model: Model, dense: Model, *, units: Mapping[str, Tensor], grams: Grams, ridge: float
) -> None:
    """Refit every cut block of a model as if no other block had been cut.

    It takes no forward pass, for the moments are those of the dense model. Trials use it.

    Args:
        model: The pruned model; the readers of its cut blocks are changed in place.
        dense: The model that it was cut from.
        units: The units that were kept, by block.
        grams: Moments of what the dense blocks' readers read.
        ridge: Ridge as a share of the mean variance of the inputs.
    """
    for block in dense.blocks:
        kept_units = units.get(block.name)
        if kept_units is None or len(kept_units) == block.units:
            continue
        if not is_refittable(dense, block):
            continue
        dense_reader = dense.get_linear(block.reader)
        weight_OF = dense_reader.weight
        # Moments that were read from a file are on the processor.
        gram = grams[block.name].move(weight_OF.device)
        mean_F = gram.compute_mean()
        bias_O = dense_reader.bias
        if bias_O is None:
            bias_O = weight_OF.new_zeros(dense_reader.out_features)
        kept = list_feature_indices(block, kept_units.to(weight_OF.device))
        if len(kept) == 0:
            # What is left of a dropped block is the mean of its output.
            constant = _get_constant(model, block)
            constant.bias.copy_(bias_O + weight_OF @ mean_F)
            continue
        reader = model.get_linear(block.reader)
        if reader.bias is None:
            moments_FF = gram.compute_second_moment()
        else:
            moments_FF = gram.compute_covariance()
        cross_OK = weight_OF @ moments_FF[:, kept]
        moments_KK = moments_FF[kept][:, kept]
        fitted_OK = solve_ridge(cross_OK, moments_KK, ridge=ridge)
        reader.weight.copy_(fitted_OK)
        if reader.bias is not None:
            mean_K = mean_F[kept]
            reader.bias.copy_(bias_O + weight_OF @ mean_F - fitted_OK @ mean_K)


def is_refittable(model: Model, block: Block) -> bool:
    """Return whether a block can be refitted: whether a linear layer reads it."""
    # A convolution mixes what it reads over places: moments of single places are not enough.
    reader = model.get_submodule(block.reader)
    return isinstance(reader, nn.Linear)


def _get_constant(model: Model, block: Block) -> ConstantOutput:
    """Return the module that replaced a removed block and gives a constant."""
    # A "skip" only passes on its input, to the constant behind it.
    path = next(path for path, mode in block.drop if not mode.startswith("skip"))
    constant = model.get_submodule(path)
    assert isinstance(constant, ConstantOutput)
    return constant


@torch.inference_mode()
def refit_in_order_(
    pipeline: TorchPipeline, models: dict[str, Model], *, dense: Models, batch: Batch, ridge: float
) -> None:
    """Refit every cut block in order, on the inputs that the pruned pipeline before it gives.

    Each node runs once over the whole batch. A block is refitted when the pass comes to it, and the
    pass goes on with what the block puts out then. Positions that the pruned models have cut are
    cut from the dense ones too: they have no counterpart.

    Args:
        pipeline: The graph that the models run in.
        models: The pruned models by node; the readers of cut blocks are changed in place.
        dense: The models that they were cut from.
        batch: Calibration pairs.
        ridge: Ridge as a share of the mean variance of the inputs.
    """
    # What a block put out is compared position by position, so both sides need the same ones.
    dense_models: dict[str, Model] = {}
    for node_name, model in dense.items():
        dense_models[node_name] = _cut_same_positions(model, models[node_name])
    dense_outputs = pipeline.forward_in_pieces(dense_models, batch)
    refitted_outputs: Outputs = {}
    for node_name in pipeline.order:
        model = models[node_name]
        left_blocks = {block.name for block in model.blocks}
        cut_blocks = _list_cut_blocks(model, dense_models[node_name])
        targets = _record_outputs(
            pipeline,
            node_name,
            models=dense_models,
            batch=batch,
            known_outputs=dense_outputs,
            blocks=cut_blocks,
        )
        # Nodes that were refitted give what they give now, those behind what the dense ones give.
        known_outputs = {**dense_outputs, **refitted_outputs}
        del known_outputs[node_name]
        with ExitStack() as stack:
            for block in cut_blocks:
                if block.name not in left_blocks:
                    mean_O = targets.pop(block.name).mean(0)
                    constant = _get_constant(model, block)
                    constant.bias.data.copy_(mean_O)
                    continue
                repair = _make_repair_hook(
                    block, targets, batch=batch, node_name=node_name, ridge=ridge
                )
                handle = model.get_linear(block.reader).register_forward_hook(repair)
                stack.callback(handle.remove)
            outputs = pipeline.forward({node_name: model}, batch, known_outputs=known_outputs)
        refitted_outputs[node_name] = outputs[node_name]


def _cut_same_positions(dense: Model, pruned_model: Model) -> Model:
    """Return the dense model, without the positions that the small one has cut."""
    selector = pruned_model.token_selector
    dense_selector = dense.token_selector
    if selector is None or dense_selector is None:
        return dense
    # A model that was cut before has fewer positions to choose from.
    is_kept = torch.isin(dense_selector.index, selector.index)
    if is_kept.all():
        return dense
    return copy_without_units(dense, {"tokens": is_kept.nonzero().flatten()})


def _list_cut_blocks(model: Model, dense: Model) -> list[Block]:
    """Return the dense blocks that lost units and can be refitted, those that are gone included."""
    units_left = {block.name: block.units for block in model.blocks}
    cut_blocks: list[Block] = []
    for block in dense.weighted_blocks:
        is_cut = units_left.get(block.name, 0) < block.units
        if is_cut and is_refittable(dense, block):
            cut_blocks.append(block)
    return cut_blocks


def _make_repair_hook(
    block: Block, targets: dict[str, Tensor], *, batch: Batch, node_name: str, ridge: float
) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], Tensor]:
    """Make a forward hook that fits a reader to its target, and returns what it gives then.

    The target is taken out of `targets`, which frees its memory.
    """

    def refit_reader(reader: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows_RK = _select_rows(inputs[0], block, batch=batch, node_name=node_name)
        target_RO = targets.pop(block.name)
        fit_linear_(reader, rows_RK, target=target_RO, ridge=ridge)
        # The pass has to go on with what the fitted layer gives.
        return reader.forward(inputs[0])

    return refit_reader


def fit_linear_(layer: nn.Linear, rows_RK: Tensor, *, target: Tensor, ridge: float) -> None:
    """Fit a linear layer, so that it gives a target as nearly as it can.

    Args:
        layer: The layer; its weight and bias are changed in place.
        rows_RK: Its inputs.
        target: [r, o] what it is to give.
        ridge: Ridge as a share of the mean variance of the inputs.
    """
    # Without a bias nothing can make up for means: the fit is about the origin.
    if layer.bias is not None:
        mean_K = rows_RK.mean(0)
        target_mean_O = target.mean(0)
    else:
        mean_K = rows_RK.new_zeros(rows_RK.shape[1])
        target_mean_O = target.new_zeros(target.shape[1])
    count = len(rows_RK)
    centred_RK = rows_RK - mean_K
    centred_target_RO = target - target_mean_O
    cross_OK = centred_target_RO.T @ centred_RK / count
    covariance_KK = centred_RK.T @ centred_RK / count
    weight_OK = solve_ridge(cross_OK, covariance_KK, ridge=ridge)
    layer.weight.data.copy_(weight_OK)
    if layer.bias is not None:
        layer.bias.data.copy_(target_mean_O - weight_OK @ mean_K)


def _record_outputs(
    pipeline: TorchPipeline,
    node_name: str,
    *,
    models: Models,
    batch: Batch,
    known_outputs: Outputs,
    blocks: list[Block],
) -> dict[str, Tensor]:
    """Record what the readers of some blocks of a node give over a batch: block -> [r, o]."""
    if not blocks:
        return {}
    parts: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
    for start in range(0, len(batch), pipeline.batch_size):
        piece_rows = slice(start, start + pipeline.batch_size)
        piece = batch[piece_rows]
        # Every other node has known outputs, or none at all: only this one runs.
        known_rows: Outputs = {other: {} for other in pipeline.order if other != node_name}
        for other, tensors in known_outputs.items():
            if other != node_name:
                known_rows[other] = {name: tensor[piece_rows] for name, tensor in tensors.items()}
        with ExitStack() as stack:
            for block in blocks:
                record = _make_output_recorder(
                    parts[block.name], block, batch=piece, node_name=node_name
                )
                reader = models[node_name].get_submodule(block.reader)
                handle = reader.register_forward_hook(record)
                stack.callback(handle.remove)
            pipeline.forward(models, piece, known_outputs=known_rows)
    return {block_name: torch.cat(rows) for block_name, rows in parts.items()}


def _make_output_recorder(
    parts: list[Tensor], block: Block, *, batch: Batch, node_name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Make a forward hook that keeps the rows of an output."""

    def record_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows_RO = _select_rows(output, block, batch=batch, node_name=node_name)
        parts.append(rows_RO)

    return record_output
