"""Say why a structure was chosen, for a person who sees another one of less loss. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from mmcompress.results.records import Trial
from mmcompress.run.approach_target import FitAttempt


def explain_structure(
    chosen: FitAttempt,
    attempts: Sequence[FitAttempt],
    *,
    target_ms: float,
    short_losses: Sequence[float] = (),
) -> str:
    """Say why a structure is the one that is trained.

    Args:
        chosen: The structure.
        attempts: Everything that was measured before the training.
        target_ms: Milliseconds a request.
        short_losses: Losses of the structures that a short training compared; empty where their
            losses before training were trusted.

    Returns:
        Sentences.
    """
    if chosen.predicted_ms > target_ms:
        return "No structure is predicted to meet the target, so the fastest one was taken."
    sentences = [_explain_proposal(chosen.trial, short_losses)]
    if len(attempts) > 1:
        share = chosen.compute_target_share(target_ms)
        sentences.append(
            f"Of {len(attempts)} structures that were measured before training, it lies best: "
            f"{share:.1%} of the target are expected."
        )
    for number, other in enumerate(attempts, start=1):
        if other.trial.loss < chosen.trial.loss:
            share = other.compute_target_share(target_ms)
            sentences.append(
                f"Structure {number} has less loss ({other.trial.loss:.3f}), but {share:.1%} of "
                "the target are expected of it."
            )
    return " ".join(sentences)


def _explain_proposal(trial: Trial, short_losses: Sequence[float]) -> str:
    """Say why the search proposed a structure."""
    ranked = sorted(short_losses)
    if not ranked or trial.loss != ranked[0]:
        return (
            f"Of the structures within the target, it has the least loss before training "
            f"({trial.loss:.3f}; {trial.origin_name})."
        )
    sentence = (
        "Losses before training say little here, so the best structures were trained for a short "
        f"while. It ended with the least loss ({trial.loss:.3f}; {trial.origin_name})"
    )
    if len(ranked) > 1:
        return f"{sentence}, the next one with {ranked[1]:.3f}."
    return f"{sentence}."
