"""Samplers of Optuna by the names that a spec uses: one function for each, given a seed.

Every sampler treats a trial over the budget as infeasible, as the study tells it by a constraint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcompress.errors import MissingPackage

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

STARTUP_TRIALS = 8
"""Trials proposed at random before a model of the space is fitted."""


NSGA2_POPULATION = 12
"""Structures in a generation of NSGA-II: a search of 40 trials then has three."""


def make_tpe(seed: int) -> BaseSampler:
    """Make the sampler of tree-structured Parzen estimators (Bergstra et al. 2011)."""
    import optuna

    # Grouped, since dimensions may be missing; the constant liar keeps parallel proposals apart.
    return optuna.samplers.TPESampler(
        seed=seed,
        multivariate=True,
        group=True,
        constant_liar=True,
        n_startup_trials=STARTUP_TRIALS,
    )


def make_gp(seed: int) -> BaseSampler:
    """Make the sampler that fits a Gaussian process."""
    import optuna

    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)


def make_nsga2(seed: int) -> BaseSampler:
    """Make the genetic algorithm NSGA-II (Deb et al. 2002)."""
    import optuna

    return optuna.samplers.NSGAIISampler(seed=seed, population_size=NSGA2_POPULATION)


def make_cmaes(seed: int) -> BaseSampler:
    """Make the sampler CMA-ES (Hansen 2016); it knows no choices, a uniform sampler draws them.

    Raises:
        MissingPackage: The package `cmaes` is not installed.
    """
    import optuna

    try:
        import cmaes  # noqa: F401
    except ImportError as error:
        raise MissingPackage("cmaes", "compress") from error
    return optuna.samplers.CmaEsSampler(
        seed=seed,
        n_startup_trials=STARTUP_TRIALS,
        independent_sampler=optuna.samplers.RandomSampler(seed=seed),
        warn_independent_sampling=False,
    )


def make_random(seed: int) -> BaseSampler:
    """Make the random sampler: the control of all others."""
    import optuna

    return optuna.samplers.RandomSampler(seed=seed)
