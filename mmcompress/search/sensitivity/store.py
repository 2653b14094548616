"""The sensitivity record of a run, and its two files: figures as JSON, tensors as safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcompress.errors import DataError
from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate, Fp32Blocks, find_fp32_blocks
from mmcompress.models.base import Model
from mmcompress.models.device import CPU
from mmcompress.prune.importance.inputs import Scores
from mmcompress.prune.refit import Gram, Grams
from mmcompress.search.sensitivity.curves import SensitivityCurve, SensitivityTable
from mmcompress.storage import read_record, replace_file, write_record
from mmcompress.workspace.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Sensitivity(SensitivityTable):
    """All that the search knows of the dense pipeline: loss increases, and what cuts need."""

    scores: Scores
    """Importance [units] by node and block, without a unit; higher for what should stay.

    Comparable only within one node and one kind of unit.
    """
    grams: dict[str, Grams]
    """Sums over rows of each output projection's inputs x [f]: x x^T, x and 1, by node and block.

    A node's mapping is empty when no refit needs them: they can be larger than the weights.
    """
    base_loss: float
    """In units of the pipeline's loss: dense loss on the pairs that increases are measured on."""
    fp32_blocks: Fp32Blocks
    """Names of blocks that stay in fp32, by node and precision; empty without a limit.

    Rounding such a block alone raises the loss by more than `quantize.max_loss_increase`.
    """


@dataclass(frozen=True, kw_only=True)
class _StoredFigures:
    """Content of the JSON file. Field names are its keys."""

    curves: dict[str, dict[str, SensitivityCurve]]
    """Loss increase of every cut, by node and block."""
    rounding: dict[str, dict[str, float]]
    """Loss increase of every precision, by node and precision."""
    base_loss: float
    """Loss of the dense pipeline."""
    fp32_blocks: Fp32Blocks
    """Blocks that stay in fp32, by node and precision."""


def is_sensitivity_stored(folder: RunFolder) -> bool:
    """Return whether both files are there."""
    return folder.sensitivity.exists() and folder.sensitivity_tensors.exists()


def check_sensitivity(folder: RunFolder, blocks: Mapping[str, Sequence[Block]]) -> None:
    """Check both files without reading the tensors.

    Args:
        folder: Where they lie.
        blocks: The prunable blocks by node: each must have its scores.

    Raises:
        DataError: A file is damaged, or of another version.
    """
    read_record(_StoredFigures, folder.sensitivity)
    path = folder.sensitivity_tensors
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: can't be read: {error}") from error
    for node_name, node_blocks in blocks.items():
        for block in node_blocks:
            if f"score/{node_name}/{block.name}" not in names:
                raise DataError(f"{path}: damaged: no scores of {node_name}/{block.name}")


def write_sensitivity(sensitivity: Sensitivity, folder: RunFolder) -> None:
    """Write both files, each whole or not at all.

    Keys of the tensors: `score/node/block`, and `xx/...`, `x/...`, `n/...` of each `Gram`.
    """
    tensors: dict[str, Tensor] = {}
    for node_name, node_scores in sensitivity.scores.items():
        for block_name, block_scores in node_scores.items():
            tensors[f"score/{node_name}/{block_name}"] = block_scores.contiguous()
    for node_name, node_grams in sensitivity.grams.items():
        for block_name, gram in node_grams.items():
            stored_gram = gram.move(CPU)
            tensors[f"xx/{node_name}/{block_name}"] = stored_gram.product_sums
            tensors[f"x/{node_name}/{block_name}"] = stored_gram.sums
            tensors[f"n/{node_name}/{block_name}"] = torch.tensor(gram.row_count, device=CPU)
    with replace_file(folder.sensitivity_tensors) as path:
        save_file(tensors, path)
    figures = _StoredFigures(
        curves=sensitivity.curves,
        rounding=sensitivity.rounding,
        base_loss=sensitivity.base_loss,
        fp32_blocks=sensitivity.fp32_blocks,
    )
    write_record(folder.sensitivity, figures)


def read_sensitivity(models: Mapping[str, Model], folder: RunFolder) -> Sensitivity:
    """Read what `write_sensitivity` wrote for the same models.

    Raises:
        DataError: The figures are damaged or of another version.
    """
    figures = read_record(_StoredFigures, folder.sensitivity)
    tensors = load_file(folder.sensitivity_tensors)
    scores: Scores = {}
    grams: dict[str, Grams] = {}
    for node_name, model in models.items():
        scores[node_name] = {}
        grams[node_name] = {}
        for block in model.blocks:
            place = f"{node_name}/{block.name}"
            scores[node_name][block.name] = tensors[f"score/{place}"]
            if f"xx/{place}" in tensors:
                grams[node_name][block.name] = Gram(
                    product_sums=tensors[f"xx/{place}"],
                    sums=tensors[f"x/{place}"],
                    row_count=float(tensors[f"n/{place}"]),
                )
    return Sensitivity(
        scores=scores,
        grams=grams,
        curves=figures.curves,
        rounding=figures.rounding,
        base_loss=figures.base_loss,
        fp32_blocks=figures.fp32_blocks,
    )


def select_fp32_blocks(
    sensitivity: Sensitivity, candidate: Candidate
) -> dict[str, tuple[str, ...]]:
    """Select the blocks of a candidate that stay in fp32, by node."""
    fp32_blocks = {}
    for node_name, precision in candidate.precision.items():
        fp32_blocks[node_name] = find_fp32_blocks(
            sensitivity.fp32_blocks, node_name, precision=precision
        )
    return fp32_blocks
