"""Samplers of Optuna by the names that a spec uses: one function for each, given a seed.

CMA-ES needs a package of its own: `cma_sampler.py`.

Every sampler treats a trial over the budget as infeasible, as the study tells it by a constraint.
"""

from __future__ import annotations

from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)

STARTUP_TRIALS = 8
"""Trials proposed at random before a model of the space is fitted."""

NSGA2_POPULATION = 12
"""Structures in a generation of NSGA-II: a search of 40 trials then has three."""


def make_tpe(seed: int) -> BaseSampler:
    """Make the sampler of tree-structured Parzen estimators (Bergstra et al. 2011)."""
    # Grouped, since dimensions may be missing; the constant liar keeps parallel proposals apart.
    return TPESampler(
        seed=seed,
        multivariate=True,
        group=True,
        constant_liar=True,
        n_startup_trials=STARTUP_TRIALS,
    )


def make_gp(seed: int) -> BaseSampler:
    """Make the sampler that fits a Gaussian process."""
    return GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)


def make_nsga2(seed: int) -> BaseSampler:
    """Make the genetic algorithm NSGA-II (Deb et al. 2002)."""
    return NSGAIISampler(seed=seed, population_size=NSGA2_POPULATION)


def make_random(seed: int) -> BaseSampler:
    """Make the random sampler: the control of all others."""
    return RandomSampler(seed=seed)
