"""The sampler CMA-ES of Optuna, which needs the package `cmaes`."""

from __future__ import annotations

import cmaes  # noqa: F401  Optuna imports it late: without this line, a search would fail midway.
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler

from mmcompress.search.samplers import STARTUP_TRIALS


def make_cmaes(seed: int) -> BaseSampler:
    """Make the sampler CMA-ES (Hansen 2016); it knows no choices, a uniform sampler draws them."""
    return CmaEsSampler(
        seed=seed,
        n_startup_trials=STARTUP_TRIALS,
        independent_sampler=RandomSampler(seed=seed),
        warn_independent_sampling=False,
    )
