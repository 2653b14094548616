"""Which facts each shared record of a run depends on, and what differs between two runs. No torch.

A record depends on every fact that its rule does not leave out. So a setting that is new counts
until somebody has thought of it: at worst a record is made anew that need not be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

MAX_SHOWN_LETTERS = 40
"""Letters of two values up to which a message shows both; longer ones say nothing to a person."""

ABSENT = "nothing"
"""How a message names the value of a fact that one run does not have."""

NO_EFFECT = (
    "target",
    "limits.*",
    "nodes.*.prune.*",
    "nodes.*.precision",
    "nodes.*.rewind",
    "nodes.*.source",
    "data.validation_pairs",
    "data.final_pairs_factor",
    "data.report",
    "effort",
    "measure.readings",
    "measure.max_parts",
    "measure.memory",
    "search.trials",
    "search.max_trials",
    "search.level_switches",
    "search.linearization_rounds",
    "search.sampler",
    "search.executor",
    "search.workers",
    "search.ray_address",
    "search.storage",
    "resources.*",
    "cache.*",
    "cluster.*",
    "search.finalists",
    "search.short_finetunings",
    "search.retries",
    "search.trial_seconds",
    "search.max_artifacts",
    "prune.allocation",
    "prune.protection",
    "prune.schedule",
    "prune.rounds",
    "prune.sparsity",
    "prune.pattern",
    "distill.steps",
    "distill.minutes",
    "distill.batch",
    "distill.learning_rate",
    "distill.find_learning_rate",
    "distill.losses.*",
    "distill.auto_steps_factor",
    "distill.schedule",
    "distill.validations",
    "distill.patience",
    "distill.distinct_pairs",
    "distill.max_passes",
    "distill.store_gb",
    "report.samples",
)
"""Facts that no shared record depends on. The content of weights and readings is a fact of its own,
so their paths are none. Draws of training pairs are named by their seed and batch."""

SENSITIVITY_SETTINGS = (
    "data.calibration",
    "data.sensitivity_pairs",
    "prune.*",
    "search.evaluator",
    "quantize.*",
    "seed",
)
"""Settings that sensitivity alone depends on."""

SEARCHED = ("precisions of *", "largest cut of positions of *")
"""Facts of what is searched."""

MEASURING = ("device", "readings", "measure.*")
"""Facts of how and where latency is measured."""


@dataclass(frozen=True, kw_only=True)
class ReuseRule:
    """What a shared record does not depend on."""

    ignored: tuple[str, ...]
    """Patterns of the facts that it does not depend on, beside `NO_EFFECT`."""

    def depends_on(self, fact: str) -> bool:
        """Return whether a record of this rule may be another one when a fact is."""
        patterns = (*NO_EFFECT, *self.ignored)
        return not any(fnmatchcase(fact, pattern) for pattern in patterns)

    def list_changes(self, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what differs between two runs that the record depends on, in words.

        Args:
            earlier: The facts of the run that made the record.
            now: The facts of the run that wants it.
        """
        changes = []
        for fact in sorted({*earlier, *now}):
            if self.depends_on(fact) and earlier.get(fact) != now.get(fact):
                changes.append(_describe_change(fact, earlier=earlier.get(fact), now=now.get(fact)))
        return tuple(changes)


PROFILE = ReuseRule(
    ignored=(
        *SENSITIVITY_SETTINGS,
        *SEARCHED,
        "data.labels",
        "data.batch",
        "metrics",
        "compute.*",
        "measure.warmup",
        "measure.requests",
    )
)
"""The dense bundle with its proofs. Its latency is measured anew in any case."""

PREDICTOR = ReuseRule(
    ignored=(*SENSITIVITY_SETTINGS, "data.labels", "data.batch", "metrics", "compute.*")
)
"""The latency predictor, the bundles it was fitted to, and the footprint of structures."""

SENSITIVITY = ReuseRule(ignored=(*MEASURING, "metrics", "compute.*"))
"""Importance of units, and loss increases of cuts and precisions."""

TEACHER_TEXTS = ReuseRule(
    ignored=(
        *SENSITIVITY_SETTINGS,
        *SEARCHED,
        *MEASURING,
        "data.labels",
        "data.batch",
        "metrics",
        "compute.*",
    )
)
"""Texts of the dense pipeline that label its data."""

TEACHER_OUTPUTS = ReuseRule(
    ignored=(
        *SENSITIVITY_SETTINGS,
        *SEARCHED,
        *MEASURING,
        "data.batch",
        "metrics",
        "compute.device",
    )
)
"""Outputs of the dense pipeline on training pairs. Those of another seed or batch have another
name."""

DENSE_ANSWERS = ReuseRule(
    ignored=(
        *SENSITIVITY_SETTINGS,
        *SEARCHED,
        "data.labels",
        "data.batch",
        "compute.*",
        "measure.warmup",
        "measure.requests",
    )
)
"""What the dense bundle answers to the splits that are reported, with its scores."""


def _describe_change(fact: str, *, earlier: object, now: object) -> str:
    """Return in words what became of a fact; both values where they are short."""
    before = ABSENT if earlier is None else str(earlier)
    after = ABSENT if now is None else str(now)
    if len(before) + len(after) > MAX_SHOWN_LETTERS:
        return f"{fact} changed"
    return f"{fact} changed ({before}, now {after})"
