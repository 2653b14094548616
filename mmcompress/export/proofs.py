"""Proofs: comparisons that show that an artifact computes what it should.

Every artifact is proved when it is made, and its proofs are kept in the manifest and the summary.
Each proof is one number, the largest difference that was seen, and the bound that it has to stay
under:

- `masked == sliced`: removing units gives what masking them gives.
- `torch == onnx`: the exported graph computes what torch computes.
- `fused == unfused`: ONNX Runtime's graph optimizations change nothing.
- `cached generation == library`: the deployed generator writes what the model's library writes.
- `<precision> drift (1 - cosine)`: how far a precision moves the outputs; more a record than a
  proof.

Shapes in this file:
    b  batch      n  tokens      w  width of a token      f  all other axes of an output, flattened
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmcompress.errors import ProofFailed
from mmcompress.export.onnx import make_feed
from mmcompress.graph.ports import get_kind
from mmcompress.kinds.base import Batch, Models, Outputs
from mmcompress.models.base import ExportGraph, Model
from mmcompress.models.device import CPU
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.masks import mask_units
from mmcompress.prune.surgery import copy_without_units
from mmcompress.registry import resolve_entry
from mmcompress.results.records import Proof
from mmcompress.runtime.beam_search import Generation
from mmcompress.runtime.sessions import TimedSession, open_session

SURGERY_BOUND = 1e-6
"""Largest relative difference of sliced models from masked ones, and of models from their library.

Both sides run in torch, in float64 on the CPU, and add up the same products in another order: they
differ by about 1e-12. Where a library computes a softmax or a norm in float32 whatever it is given
(CLIP, SigLIP, T5, Llama), they differ by about 1e-7. In float32, rounding alone exceeds this bound
with real weights. A wrong row or column moves outputs by more than 100 times the bound.
"""

EXPORT_BOUND = 1e-4
"""Largest relative difference between torch and ONNX Runtime, and between two graphs of the latter.

Two libraries order and fuse their float32 operations in different ways: ten times `SURGERY_BOUND`.
In `reports/` they differ by up to 2e-6.
"""

GENERATION_BOUND = 0.01
"""Largest share of inputs whose generated texts may differ: none, for fewer than a hundred inputs.
"""

DRIFT_BOUND = 0.2
"""Largest mean of 1 - cosine between outputs in fp32 and in another precision.

It is wide on purpose. Quality on data decides about a precision; this bound only finds broken
files.
"""

PROVEN_BATCH_SIZES = (1, 2, 3)
"""Batch sizes that an export is compared at: the one it was traced at, one, and another.

To compare a window of 30 s of sound takes a second, so the other one is small.
"""

DRIFT_BATCH_SIZE = 5
"""Random inputs that the drift of a precision is averaged over."""

DRIFT_SEED = 9
"""Seed of these inputs. They are others than those of the export proofs."""


def require_proofs(proofs: list[Proof]) -> list[Proof]:
    """Return the proofs if all of them hold.

    Raises:
        ProofFailed: One of them does not; the message names the first.
    """
    for proof in proofs:
        if not proof.passed:
            raise ProofFailed(
                f"{proof.node}: {proof.name}: difference {proof.difference:.2e}, "
                f"bound {proof.bound:.0e} {proof.detail}"
            )
    return proofs


def label_proofs(proofs: Sequence[Proof], artifact: str) -> list[Proof]:
    """Return proofs that say what they are of.

    Args:
        proofs: The proofs.
        artifact: What is proved: the dense pipeline, the compressed one, or a random cut.
    """
    return [replace(proof, artifact=artifact) for proof in proofs]


def make_proof(name: str, node: str, *, difference: float, bound: float, detail: str = "") -> Proof:
    """Return a proof that holds if the difference is not above the bound.

    Args:
        name: What is compared, such as `masked == sliced`.
        node: The node.
        difference: The largest difference that was found, in the unit of the bound.
        bound: The largest difference that is allowed.
        detail: What a reader should know besides.
    """
    return Proof(
        name=name,
        node=node,
        difference=float(difference),
        bound=bound,
        passed=bool(difference <= bound),
        detail=detail,
    )


def compare_tensors(expected: Tensor, actual: Tensor) -> float:
    """Return the largest absolute difference of two tensors, relative to the scale of `expected`.

    The scale is the largest absolute value, but at least 1, so that outputs near zero are compared
    absolutely. Tensors of different shapes differ by infinity, and so do those that hold a NaN:
    `max` would pass over it.
    """
    if expected.shape != actual.shape:
        return float("inf")
    scale = expected.abs().max().clamp(min=1.0)
    difference = float((expected - actual).abs().max() / scale)
    return float("inf") if math.isnan(difference) else difference


def compare_outputs(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Return the largest difference between two rows of outputs; see `compare_tensors`."""
    differences: list[float] = []
    for expected_tensor, actual_tensor in zip(expected, actual, strict=True):
        differences.append(compare_tensors(expected_tensor, actual_tensor))
    return max(differences)


def compute_outputs(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a module, and return its outputs as a tuple even if there is only one."""
    outputs = module(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def copy_in_float64(model: Model) -> Model:
    """Return a copy of a model in float64 on the CPU: rounding then hides no wrong weight."""
    return copy.deepcopy(model).cpu().double()


def convert_to_float64(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU, those of real numbers in float64."""
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        on_cpu = tensor.cpu()
        converted[name] = on_cpu.double() if on_cpu.is_floating_point() else on_cpu
    return converted


def make_masks(model: Model, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks [units of the block] that are 1 for the kept units and 0 for all others.

    Args:
        model: The dense model.
        units: Indices of the kept units, by block.
    """
    masks: dict[str, Tensor] = {}
    for block_name, kept in units.items():
        masks[block_name] = torch.zeros(model.get_block(block_name).units, device=CPU)
        masks[block_name][kept] = 1
    return masks


@torch.inference_mode()
def prove_surgery(
    pipeline: TorchPipeline,
    dense: Models,
    *,
    units: dict[str, dict[str, Tensor]],
    batch: Batch,
    dense_outputs: Outputs | None = None,
) -> list[Proof]:
    """Prove that removing units gives what masking them gives: `masked == sliced`.

    Masking multiplies the features of removed units by zero and leaves all weights in place: it is
    simple enough to be trusted. Slicing makes the layers smaller. If it removed a wrong row or
    forgot a reader, the outputs of a node would differ. Every node is compared alone, on real
    inputs, behind dense nodes, in float64. The bound is `SURGERY_BOUND`: only the order of sums may
    differ.

    Args:
        pipeline: The graph of the pipeline.
        dense: The dense models by node.
        units: Indices of the kept units, by node and block; blocks that are missing stay whole.
        batch: Real inputs of the pipeline.
        dense_outputs: Outputs of the dense models for that batch, to save computing them.

    Returns:
        One proof for each node.
    """
    outputs_by_node = dense_outputs or pipeline.forward_in_pieces(dense, batch)
    exact_outputs = {name: convert_to_float64(outputs) for name, outputs in outputs_by_node.items()}
    batch = batch.move(CPU)
    exact_batch = replace(batch, inputs=convert_to_float64(batch.inputs))
    proofs: list[Proof] = []
    for node_name, model in dense.items():
        comparison = _SurgeryComparison(
            pipeline=pipeline,
            node_name=node_name,
            model=copy_in_float64(model),
            batch=exact_batch,
            # The node is compared behind dense ones, whose outputs are given.
            other_outputs={name: out for name, out in exact_outputs.items() if name != node_name},
        )
        node_units = units.get(node_name, {})
        difference = comparison.compare(node_units)
        detail = ""
        if difference > SURGERY_BOUND:
            detail = comparison.name_wrong_blocks(node_units)
        proofs.append(
            make_proof(
                "masked == sliced",
                node_name,
                difference=difference,
                bound=SURGERY_BOUND,
                detail=detail,
            )
        )
    return proofs


@dataclass(frozen=True, kw_only=True)
class _SurgeryComparison:
    """One node with everything that its masked and its sliced model read."""

    pipeline: TorchPipeline
    """The graph of the pipeline."""
    node_name: str
    """The node."""
    model: Model
    """Its dense model in float64."""
    batch: Batch
    """Inputs of the pipeline, in float64."""
    other_outputs: Outputs
    """Outputs of the other nodes, in float64."""

    def compare(self, units: Mapping[str, Tensor]) -> float:
        """Return the largest relative difference of the sliced model from the masked one."""
        with mask_units(self.model, make_masks(self.model, units)):
            masked = self._run(self.model)
        sliced = self._run(copy_without_units(self.model, units))
        return max(compare_tensors(tensor, sliced[name]) for name, tensor in masked.items())

    def name_wrong_blocks(self, units: Mapping[str, Tensor]) -> str:
        """Return the blocks whose cut is wrong by itself, in words."""
        wrong_blocks = []
        for block_name, kept in units.items():
            if self.compare({block_name: kept}) > SURGERY_BOUND:
                wrong_blocks.append(f"'{block_name}'")
        if not wrong_blocks:
            return "(no block by itself, only together)"
        return f"(in {', '.join(wrong_blocks)})"

    def _run(self, model: Model) -> dict[str, Tensor]:
        """Return the outputs of the node with one of the two models."""
        outputs = self.pipeline.forward(
            {self.node_name: model}, self.batch, known_outputs=self.other_outputs
        )
        return outputs[self.node_name]


@torch.inference_mode()
def prove_export(node: str, model: Model, *, files: dict[str, Path]) -> list[Proof]:
    """Prove that the exported graphs of a node compute what torch computes.

    Two comparisons for every graph, on random inputs of `PROVEN_BATCH_SIZES`:

    - `torch == onnx`: the traced module against ONNX Runtime. It finds an axis that was fixed by
      accident, a constant folded wrongly, an operator that is exported wrongly.
    - `fused == unfused`: ONNX Runtime with its graph optimizations against ONNX Runtime without. It
      finds a fusion that changes results.

    The bound of both is `EXPORT_BOUND`: only rounding may differ.

    Args:
        node: Name of the node.
        model: Its model in torch.
        files: The written graphs, by name.

    Returns:
        Two proofs for each graph.
    """
    proofs: list[Proof] = []
    for graph_name, graph in model.export_graphs().items():
        fused_session = open_session(files[graph_name], 0)
        unfused_session = open_session(files[graph_name], 0, optimize=False)
        input_names = {port.name for port in fused_session.get_inputs()}
        output_names = list(graph.outputs)
        export_difference = 0.0
        fusion_difference = 0.0
        for batch_size in PROVEN_BATCH_SIZES:
            inputs = _make_graph_inputs(model, graph, batch_size=batch_size, seed=batch_size)
            feed = make_feed(graph, inputs, input_names=input_names)
            expected = compute_outputs(graph.module, inputs)
            fused = _to_tensors(fused_session.run(output_names, feed))
            unfused = _to_tensors(unfused_session.run(output_names, feed))
            export_difference = max(export_difference, compare_outputs(expected, fused))
            fusion_difference = max(fusion_difference, compare_outputs(unfused, fused))
        sizes = ", ".join(map(str, PROVEN_BATCH_SIZES))
        detail = f"({graph_name}, batch {sizes})"
        differences = {"torch == onnx": export_difference, "fused == unfused": fusion_difference}
        for proof_name, difference in differences.items():
            proof = make_proof(
                proof_name, node, difference=difference, bound=EXPORT_BOUND, detail=detail
            )
            proofs.append(proof)
    return proofs


@torch.inference_mode()
def prove_generation(
    node: str, model: Model, *, files: dict[str, Path], folder: Path, contexts: Tensor
) -> list[Proof]:
    """Prove that a deployed generator writes what its library writes, token for token.

    `cached generation == library` compares the beam search on ONNX Runtime, with its cache, with
    the library's own `generate` on the torch model. All beams of an input are compared. The
    difference is the share of inputs with any other token, and the bound is `GENERATION_BOUND`.

    It works only for structures that the library can still run with its cache: their first
    attention must be there.

    Args:
        node: Name of the node.
        model: Its model in torch.
        files: The written graphs in fp32, by name.
        folder: The bundle's folder of this node, where `tokenizer.json` lies.
        contexts: What the generator reads [inputs, n, w].

    Returns:
        One proof.
    """
    sessions = {graph_name: TimedSession(file, 0) for graph_name, file in files.items()}
    make_decoder = resolve_entry(get_kind(model.kind).deployed)
    deployed = make_decoder(sessions, model.config, folder)
    # The guard against endless repetition is ours; the library has none.
    deployed.generation = replace(deployed.generation, guard=False)
    different_count = 0
    first_difference = ""
    for context in contexts:
        one_context = context[None]
        deployed_beams = deployed.generate(one_context.numpy())
        deployed_rows = [ids for _, ids in deployed_beams]
        library_rows: list[list[int]] = []
        for ids in model.generate_with_library(one_context):
            library_rows.append(_cut_behind_end(ids, deployed.generation))
        if deployed_rows != library_rows:
            different_count += 1
            first_difference = first_difference or _tell_difference(deployed_rows, library_rows)
    proof = make_proof(
        "cached generation == library",
        node,
        difference=different_count / len(contexts),
        bound=GENERATION_BOUND,
        detail=f"({len(contexts)} inputs{first_difference})",
    )
    return [proof]


def measure_drift(
    node: str, precision: str, *, files: dict[str, Path], quantized: dict[str, Path], model: Model
) -> list[Proof]:
    """Measure how far a precision moves the outputs of a node: `<precision> drift (1 - cosine)`.

    For every graph, the first output in fp32 is compared with the one of the quantized file, on
    random inputs:

        drift = 1 - mean over b of x_b . y_b / max(|x_b| |y_b|, 1e-12)

    The bound is `DRIFT_BOUND`. It is wide: what a precision costs is judged by quality on data.

    Args:
        node: Name of the node.
        precision: Name of the precision of the quantized files.
        files: The graphs in fp32, by name.
        quantized: The same graphs in that precision.
        model: The model in torch.

    Returns:
        One proof for each graph.
    """
    proofs: list[Proof] = []
    for graph_name, graph in model.export_graphs().items():
        fp32_session = open_session(files[graph_name], 0)
        quantized_session = open_session(quantized[graph_name], 0)
        input_names = {port.name for port in fp32_session.get_inputs()}
        inputs = _make_graph_inputs(model, graph, batch_size=DRIFT_BATCH_SIZE, seed=DRIFT_SEED)
        feed = make_feed(graph, inputs, input_names=input_names)
        first_output = [graph.outputs[0]]
        (fp32_output,) = fp32_session.run(first_output, feed)
        (quantized_output,) = quantized_session.run(first_output, feed)
        x_BF = fp32_output.reshape(DRIFT_BATCH_SIZE, -1)
        y_BF = quantized_output.reshape(DRIFT_BATCH_SIZE, -1)
        dot_B = (x_BF * y_BF).sum(1)
        norms_B = np.linalg.norm(x_BF, axis=1) * np.linalg.norm(y_BF, axis=1)
        cosine_B = dot_B / np.maximum(norms_B, 1e-12)
        proof = make_proof(
            f"{precision} drift (1 - cosine)",
            node,
            difference=1 - float(cosine_B.mean()),
            bound=DRIFT_BOUND,
            detail=f"({graph_name})",
        )
        proofs.append(proof)
    return proofs


def _make_graph_inputs(
    model: Model, graph: ExportGraph, *, batch_size: int, seed: int
) -> tuple[Tensor, ...]:
    """Return random inputs of a graph that have other sizes than those it was traced with.

    With the batch size grows the past of a decode step, and the length of texts shrinks. Where
    texts share an image, there is one image for the whole batch.
    """
    generator = torch.Generator().manual_seed(seed)
    axes_by_input = [graph.dynamic_axes.get(name, {}) for name in graph.inputs]
    has_batch_axis = any(axes.get(0) == "batch" for axes in axes_by_input)
    extra_positions = batch_size - 1
    inputs: list[Tensor] = []
    for axes, example in zip(axes_by_input, graph.example, strict=True):
        shape = list(example.shape)
        for axis, size_name in axes.items():
            if axis == 0 and example.ndim > 1:
                shares_image = has_batch_axis and size_name == "images"
                shape[0] = 1 if shares_image else batch_size
            elif size_name == "length":
                shape[axis] = max(2, example.shape[1] // batch_size)
            elif size_name in ("past", "total"):
                shape[axis] += extra_positions
        if example.is_floating_point():
            inputs.append(torch.randn(shape, generator=generator))
        elif example.ndim > 1:
            inputs.append(_make_random_ids(model, shape, generator=generator))
        else:
            # A vector of whole numbers holds positions: they follow the longer past.
            inputs.append(example + extra_positions)
    return tuple(inputs)


def _make_random_ids(model: Model, shape: list[int], *, generator: torch.Generator) -> Tensor:
    """Return random token ids; where the model has an end token, every text ends in it."""
    # The first three ids are special tokens in most vocabularies.
    ids = torch.randint(3, max(model.vocabulary, 4), shape, generator=generator)
    if "eos" in model.config:
        ids[:, -1] = model.config["eos"]
    return ids


def _to_tensors(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """Return the outputs of a session as tensors."""
    return [torch.from_numpy(array) for array in arrays]


def _cut_behind_end(ids: list[int], generation: Generation) -> list[int]:
    """Return token ids up to the first end token; without one they end at the greatest length.

    The start does not count: some models start with their end token.
    """
    for place in range(len(generation.start), len(ids)):
        if ids[place] in generation.ends:
            return ids[: place + 1]
    return ids


def _tell_difference(deployed: Sequence[list[int]], library: Sequence[list[int]]) -> str:
    """Return the first beam that differs, for the detail of a proof."""
    for deployed_ids, library_ids in zip(deployed, library, strict=False):
        if deployed_ids != library_ids:
            return f"; first difference: {deployed_ids} deployed, {library_ids} by the library"
    return f"; {len(deployed)} texts deployed, {len(library)} by the library"
