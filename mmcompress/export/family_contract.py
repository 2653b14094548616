"""The contract that every model family keeps: proofs on one model alone, whatever its weights.

    proofs = prove_contract(model, folder)

In short:

- Cutting units of every kind, alone and mixed, leaves what masking leaves.
- The exported graphs compute what torch does, and cached generation is the library's own.
- Parameters and multiply-accumulates (MACs) fall by what the blocks say.
- A pruned student gets gradients everywhere and learns.

`prove_library_match` adds what only a test can ask: the whole model computes what its library does.
The proofs use random inputs, so small models with random weights are enough.

Shapes in this file:
    b  batch      n  context tokens      w  width of a context token
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mmcompress.export.onnx import export_node
from mmcompress.export.proofs import (
    SURGERY_BOUND,
    compare_outputs,
    compute_outputs,
    copy_in_float64,
    make_masks,
    make_proof,
    prove_export,
    prove_generation,
)
from mmcompress.graph.blocks import Block
from mmcompress.graph.ports import get_kind
from mmcompress.models.base import BlockShape, ExampleRequest, Model
from mmcompress.models.counts import count_params, count_params_and_macs
from mmcompress.prune.masks import mask_units, sample_units
from mmcompress.prune.surgery import copy_without_units
from mmcompress.registry import resolve_entry
from mmcompress.results.records import Proof

Units = dict[str, Tensor]
"""Indices of the units that a cut keeps, by block."""

COUNTED_STEPS = 4.0
"""Decode steps of the request that MACs are counted for. Any number would do."""

COUNTED_BEAMS = 1
"""Texts that this request holds at once."""

MACS_BOUND = 1e-6
"""Largest relative difference between counted and computed MACs: only rounding of sums may differ.
"""

REMAINING_MACS_BOUND = 0.9999
"""Largest share of MACs that may remain when positions are cut: they must fall."""

LOSS_RATIO_BOUND = 0.999999
"""Largest ratio of a student's loss after one step to the loss before: it must fall."""

STEP_LENGTH = 1e-3
"""Length of that step along the gradient: short enough for the loss to fall along a straight line.
"""

MIXED_SHARES = (0.25, 0.5, 0.75, 0.0)
"""Shares of units that the blocks of a mixed cut keep. 0 removes a block, if it can be removed."""

GENERATION_CONTEXT_SHAPE = (4, 9)
"""Inputs b and tokens n of the random contexts that generation is compared on."""


def make_random_inputs(model: Model, batch_size: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Return random inputs of a model's `forward`; the kind of its node says which.

    Args:
        model: The model.
        batch_size: Samples b of every input.
        seed: The same seed gives the same inputs.

    Returns:
        The positional arguments of `forward`, each [b, ...].
    """
    generator = torch.Generator().manual_seed(seed)
    trainable_node = resolve_entry(get_kind(model.kind).trainable)
    inputs: tuple[Tensor, ...] = trainable_node.make_random_inputs(
        model, batch_size, generator=generator
    )
    return inputs


def _make_exact_inputs(model: Model, batch_size: int) -> tuple[Tensor, ...]:
    """Return random inputs of a model's `forward` for a copy of it in float64."""
    inputs = make_random_inputs(model, batch_size)
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)


def group_blocks_by_kind(model: Model) -> dict[str, list[Block]]:
    """Return the blocks of a model by unit kind: `attention`, `ffn`, `tokens` and others."""
    groups: dict[str, list[Block]] = {}
    for block in model.blocks:
        groups.setdefault(block.kind, []).append(block)
    return groups


def sample_cuts(model: Model, seed: int = 0) -> dict[str, Units]:
    """Return random cuts by name.

    They are: half of the units of each kind, each sub-layer that can be removed, and a mixture in
    which the blocks keep different shares.

    Args:
        model: The dense model.
        seed: Seed of the choice of units.

    Returns:
        Units to keep, by name of the cut. Blocks that a cut does not name stay whole.
    """
    cuts: dict[str, Units] = {}
    blocks_by_kind = group_blocks_by_kind(model)
    for kind, blocks in blocks_by_kind.items():
        cuts[kind] = _sample_kept_units(blocks, 0.5, seed=seed)
    for kind, blocks in blocks_by_kind.items():
        removable_blocks = [block for block in blocks if block.drop]
        for i, block in enumerate(removable_blocks):
            number = f", {i + 1}" if i else ""
            cuts[f"{kind} dropped{number}"] = _sample_kept_units([block], 0.0, seed=seed)
    mixture: Units = {}
    for i, block in enumerate(model.blocks):
        # 7 and the four shares have no common factor: neighbors get different shares.
        share = MIXED_SHARES[(i * 7 + seed) % len(MIXED_SHARES)]
        mixture |= _sample_kept_units([block], share, seed=seed + i)
    cuts["mixture"] = mixture
    return cuts


def _sample_kept_units(blocks: Sequence[Block], share: float, *, seed: int) -> Units:
    """Return random units to keep of some blocks: a share in whole steps, or for 0 the fewest."""
    generator = torch.Generator().manual_seed(seed)
    kept_units: Units = {}
    for block in blocks:
        count = block.min_units
        if share:
            steps = int(block.units * share) // block.granularity
            count = max(block.granularity, steps * block.granularity)
        kept_units[block.name] = sample_units(block, count, generator=generator)
    return kept_units


@torch.no_grad()
def prove_cuts(node: str, model: Model, *, batch_size: int = 3) -> list[Proof]:
    """Prove that removing units gives what masking them gives: `masked == sliced: <cut>`.

    This is `prove_surgery` for one model and every cut of `sample_cuts`. The outputs with units
    masked are compared with those of a copy without these units, on random inputs, in float64. The
    bound is `SURGERY_BOUND`: only the order of sums may differ.

    Args:
        node: A name for the model, to be kept in the proofs.
        model: The dense model.
        batch_size: Random inputs that are compared.

    Returns:
        One proof for each cut.
    """
    inputs = _make_exact_inputs(model, batch_size)
    exact_model = copy_in_float64(model)
    proofs: list[Proof] = []
    for cut_name, kept_units in sample_cuts(model).items():
        with mask_units(exact_model, make_masks(exact_model, kept_units)):
            masked = compute_outputs(exact_model, inputs)
        sliced = compute_outputs(copy_without_units(exact_model, kept_units), inputs)
        proof = make_proof(
            f"masked == sliced: {cut_name}",
            node,
            difference=compare_outputs(masked, sliced),
            bound=SURGERY_BOUND,
        )
        proofs.append(proof)
    return proofs


@torch.no_grad()
def prove_library_match(
    node: str,
    model: Model,
    *,
    run_library: Callable[..., tuple[Tensor, ...]],
    batch_size: int = 3,
) -> list[Proof]:
    """Prove that a whole model computes what its library computes: `dense == library`.

    A family rebuilds parts of a library's model, so that blocks can be cut. The outputs of both are
    compared on the same random inputs, in float64. The bound is `SURGERY_BOUND`: both run in torch,
    with the same weights.

    Args:
        node: A name for the model, to be kept in the proof.
        model: The dense model.
        run_library: Returns the outputs of the library's untouched model, in float64, for these
            inputs. Outputs of `model` beyond those are not compared.
        batch_size: Random inputs that are compared.

    Returns:
        One proof.
    """
    inputs = _make_exact_inputs(model, batch_size)
    expected = run_library(*inputs)
    actual = compute_outputs(copy_in_float64(model), inputs)
    count = min(len(expected), len(actual))
    difference = compare_outputs(expected[:count], actual[:count])
    return [make_proof("dense == library", node, difference=difference, bound=SURGERY_BOUND)]


@dataclass(kw_only=True)
class _LostFeatures:
    """What the layers of a model lose by a cut, by path of the layer."""

    outputs: dict[str, int] = field(default_factory=dict)
    """Rows of the weight: output features or channels."""
    inputs: dict[str, int] = field(default_factory=dict)
    """Columns of the weight: input features or channels."""

    @property
    def paths(self) -> set[str]:
        """Every layer that loses something."""
        return {*self.outputs, *self.inputs}


def _count_lost_features(model: Model, kept_units: Units) -> _LostFeatures:
    """Return what layers lose by a cut, from the descriptions of its blocks alone."""
    lost = _LostFeatures()
    for block_name, kept in kept_units.items():
        block = model.get_block(block_name)
        # Positions carry no weights.
        if block.group == "tokens":
            continue
        removed_units = block.units - len(kept)
        for writer in block.writers:
            lost.outputs[writer.path] = removed_units * writer.parts * writer.width
        for path in block.per_channel:
            lost.outputs[path] = removed_units * block.width
        for path in (block.reader, *block.extra_readers):
            lost.inputs[path] = removed_units * block.width
    return lost


def _count_removed_weights(weight: Tensor, *, lost_outputs: int, lost_inputs: int) -> int:
    """Return the elements that a weight [outputs, inputs, *kernel] loses."""
    output_count = weight.shape[0]
    input_count = weight.shape[1] if weight.ndim > 1 else 1
    kernel_size = weight.numel() // (output_count * input_count)
    pairs_left = (output_count - lost_outputs) * (input_count - lost_inputs)
    return (output_count * input_count - pairs_left) * kernel_size


def count_removed_params(model: Model, kept_units: Units) -> int:
    """Count the parameters that a cut takes away, from the descriptions of the blocks alone.

    Args:
        model: The dense model.
        kept_units: The cut. It must leave units in every block: a removed sub-layer leaves a
            constant behind, which is not counted here.
    """
    lost = _count_lost_features(model, kept_units)
    total = 0
    for path in lost.paths:
        layer = model.get_submodule(path)
        lost_outputs = lost.outputs.get(path, 0)
        total += _count_removed_weights(
            layer.get_parameter("weight"),
            lost_outputs=lost_outputs,
            lost_inputs=lost.inputs.get(path, 0),
        )
        if getattr(layer, "bias", None) is not None:
            total += lost_outputs
    return total


@torch.no_grad()
def count_removed_macs(model: Model, kept_units: Units, *, steps: float, beams: int) -> float:
    """Count the MACs per request that a cut saves, from the dense model and its blocks.

    A removed weight saves one MAC at every position that its layer computes. A removed head also
    saves the products of queries with keys and of attention weights with values.

    Args:
        model: The dense model.
        kept_units: The cut; it must leave units in every block.
        steps: Decode steps of a request.
        beams: Texts that a request holds at once.
    """
    lost = _count_lost_features(model, kept_units)
    total = 0.0
    positions = _count_positions(model, lost.paths, steps=steps, beams=beams)
    for path, position_count in positions.items():
        layer = model.get_submodule(path)
        # Normalizations lose features too, but their work is no product of a weight with an input.
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        removed_weights = _count_removed_weights(
            layer.weight,
            lost_outputs=lost.outputs.get(path, 0),
            lost_inputs=lost.inputs.get(path, 0),
        )
        total += position_count * removed_weights
    shapes = model.list_block_shapes(steps, beams)
    for block_name, kept in kept_units.items():
        block = model.get_block(block_name)
        if block.group == "heads":
            removed_units = block.units - len(kept)
            total += _count_attention_macs(block, removed_units, shape=shapes[block_name])
    return total


def _count_attention_macs(block: Block, units: int, *, shape: BlockShape) -> float:
    """Return the MACs per request in the two products of attention, for some of its units."""
    products = shape.positions * shape.keys * shape.batch * shape.calls
    return 2 * units * block.width * products


def _count_positions(
    model: Model, paths: Iterable[str], *, steps: float, beams: int
) -> dict[str, float]:
    """Return the positions (places of a feature map) that layers compute per request, by path."""
    paths_by_layer = {id(model.get_submodule(path)): path for path in paths}
    graphs = model.export_graphs()
    positions: dict[str, float] = {}
    for graph_name, request in model.make_example_requests(steps, beams).items():
        module = graphs[graph_name].module
        _add_positions_(positions, module, request=request, paths_by_layer=paths_by_layer)
    return positions


def _add_positions_(
    positions: dict[str, float],
    module: nn.Module,
    *,
    request: ExampleRequest,
    paths_by_layer: Mapping[int, str],
) -> None:
    """Run one graph, and add the positions that its layers compute in a request, in place."""

    def add_output(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        path = paths_by_layer[id(layer)]
        # Outputs are [b, channels, height, width] or [.., features].
        channel_axis = 1 if output.ndim == 4 else -1
        position_count = output.numel() / output.shape[channel_axis]
        positions[path] = positions.get(path, 0.0) + position_count * request.calls

    handles = []
    for layer in module.modules():
        if id(layer) in paths_by_layer:
            handles.append(layer.register_forward_hook(add_output))
    compute_outputs(module, request.inputs)
    for handle in handles:
        handle.remove()


def prove_counts(node: str, model: Model) -> list[Proof]:
    """Prove that a cut removes the parameters and MACs that its blocks describe.

    Half of the units of each kind are cut out, and both are counted before and after:

    - `parameters fall as computed: <kind>` compares with `count_removed_params`. The bound is 0:
      these are whole numbers.
    - `MACs fall as computed: <kind>` compares with `count_removed_macs`, relatively. The bound is
      `MACS_BOUND`: the computed figure is a sum of floats.
    - `MACs fall: tokens`, for positions: there the difference is the share of MACs that remains,
      and the bound `REMAINING_MACS_BOUND`.

    A block that describes its layers wrongly fails here, and so would the predicted latency.

    Args:
        node: A name for the model, to be kept in the proofs.
        model: The dense model.

    Returns:
        Two proofs for each unit kind.
    """
    proofs: list[Proof] = []
    dense_macs = _count_macs(model)
    for kind, blocks in group_blocks_by_kind(model).items():
        kept_units = _sample_kept_units(blocks, 0.5, seed=1)
        cut_model = copy_without_units(model, kept_units)
        removed_params = count_params(model) - count_params(cut_model)
        params_proof = make_proof(
            f"parameters fall as computed: {kind}",
            node,
            difference=abs(removed_params - count_removed_params(model, kept_units)),
            bound=0,
        )
        proofs.append(params_proof)
        removed_macs = dense_macs - _count_macs(cut_model)
        if kind == "tokens":
            macs_proof = make_proof(
                "MACs fall: tokens",
                node,
                difference=1 - removed_macs / dense_macs,
                bound=REMAINING_MACS_BOUND,
            )
        else:
            computed_macs = count_removed_macs(
                model, kept_units, steps=COUNTED_STEPS, beams=COUNTED_BEAMS
            )
            macs_proof = make_proof(
                f"MACs fall as computed: {kind}",
                node,
                difference=abs(removed_macs - computed_macs) / computed_macs,
                bound=MACS_BOUND,
            )
        proofs.append(macs_proof)
    return proofs


def _count_macs(model: Model) -> int:
    """Return the MACs of a model in the request that is counted here."""
    _, macs = count_params_and_macs(model, COUNTED_STEPS, beams=COUNTED_BEAMS)
    return macs


def prove_learning(node: str, model: Model) -> list[Proof]:
    """Prove that a pruned student can be distilled.

    A student that lost half of its units learns the outputs of the dense model on random inputs:

    - `the gradient reaches every block`: the difference is the number of writing layers that got no
      gradient after one backward pass, the bound 0.
    - `one step of distillation lowers the loss`: the difference is the loss after a step of
      `STEP_LENGTH` along the gradient over the loss before, the bound `LOSS_RATIO_BOUND`.

    Args:
        node: A name for the model, to be kept in the proofs.
        model: The dense model.

    Returns:
        Two proofs.
    """
    inputs = make_random_inputs(model, 4)
    with torch.no_grad():
        targets = [output.clone() for output in compute_outputs(model, inputs)]
    kept_units = _sample_kept_units(model.weighted_blocks, 0.5, seed=2)
    student = copy_without_units(model, kept_units)
    loss_before = _compute_distance(student, inputs, targets=targets)
    loss_before.backward()
    unreached_count = 0
    for block in student.weighted_blocks:
        for writer in block.writers:
            if student.get_submodule(writer.path).weight.grad is None:
                unreached_count += 1
    with torch.no_grad():
        _take_gradient_step_(student)
        loss_after = _compute_distance(student, inputs, targets=targets)
    gradient_proof = make_proof(
        "the gradient reaches every block", node, difference=unreached_count, bound=0
    )
    loss_proof = make_proof(
        "one step of distillation lowers the loss",
        node,
        difference=loss_after.item() / loss_before.item(),
        bound=LOSS_RATIO_BOUND,
    )
    return [gradient_proof, loss_proof]


def _compute_distance(
    student: Model, inputs: Sequence[Tensor], *, targets: Sequence[Tensor]
) -> Tensor:
    """Return the mean squared difference of outputs from their targets, summed over outputs."""
    outputs = compute_outputs(student, inputs)
    distance = torch.zeros(())
    for output, target in zip(outputs, targets, strict=True):
        distance = distance + (output - target).square().mean()
    return distance


def _take_gradient_step_(model: nn.Module) -> None:
    """Move all parameters together by `STEP_LENGTH` against their gradient, in place."""
    gradients: list[tuple[nn.Parameter, Tensor]] = []
    squared_norm = 0.0
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradients.append((parameter, parameter.grad))
            squared_norm += float(parameter.grad.square().sum())
    norm = max(squared_norm**0.5, 1e-12)
    for parameter, gradient in gradients:
        parameter.sub_(STEP_LENGTH * gradient / norm)


def prove_contract(model: Model, folder: Path, *, node: str = "node") -> list[Proof]:
    """Prove the whole contract for a model: cuts, counts, learning, export and generation.

    Exports (and for a generator, what it writes) are proved for the dense model and for a random
    mixture of cuts; see `prove_export` and `prove_generation`.

    Args:
        model: The dense model.
        folder: Where the exported graphs go.
        node: A name for the model, to be kept in the proofs.

    Returns:
        All proofs, failed ones included.
    """
    proofs = prove_cuts(node, model)
    proofs += prove_counts(node, model)
    proofs += prove_learning(node, model)
    mixture = copy_without_units(model, sample_cuts(model)["mixture"]).eval()
    structures = {"dense": model, "mixture": mixture}
    for structure_name, structure in structures.items():
        structure_proofs = _prove_deployment(node, structure, folder=folder / structure_name)
        for proof in structure_proofs:
            proofs.append(replace(proof, name=f"{proof.name}: {structure_name}"))
    return proofs


def _prove_deployment(node: str, model: Model, *, folder: Path) -> list[Proof]:
    """Export a model to a folder, and prove the graphs and, for a generator, what it writes."""
    files = export_node(model, folder)
    proofs = prove_export(node, model, files=files)
    if not get_kind(model.kind).writes_text:
        return proofs
    (folder / "tokenizer.json").write_text(model.tokenizer_json or "", encoding="utf-8")
    shape = (*GENERATION_CONTEXT_SHAPE, model.dims["context"])
    generator = torch.Generator().manual_seed(5)
    contexts = torch.randn(shape, generator=generator)
    proofs += prove_generation(node, model, files=files, folder=folder, contexts=contexts)
    return proofs
