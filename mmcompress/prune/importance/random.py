"""Random scores: the control that every criterion must beat. U: units of a block."""

from __future__ import annotations

import torch

from mmcompress.models.device import CPU
from mmcompress.prune.importance.inputs import ImportanceInputs, Scores


def score_at_random(inputs: ImportanceInputs) -> Scores:
    """Score units by uniform numbers from the seed."""
    generator = torch.Generator(CPU).manual_seed(inputs.seed)
    scores: Scores = {}
    for node_name, model in inputs.models.items():
        scores[node_name] = {}
        for block in model.blocks:
            # Chance comes from the processor: every device then draws the same.
            uniform_U = torch.rand(block.units, generator=generator, device=CPU)
            scores[node_name][block.name] = uniform_U.to(inputs.pipeline.device)
    return scores
