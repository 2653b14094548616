"""Samplers of Optuna by the names a spec uses. Every one of them knows a trial over the budget for infeasible."""

from __future__ import annotations

from typing import Any

from mmcompress.errors import MissingPackage

STARTUP_TRIALS = 8
"""Proposals at random before a model of the space is fitted."""


def make_tpe(seed: int) -> Any:
    import optuna

    return optuna.samplers.TPESampler(
        seed=seed,
        multivariate=True,
        group=True,
        constant_liar=True,
        n_startup_trials=STARTUP_TRIALS,
    )


def make_gp(seed: int) -> Any:
    import optuna

    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)


def make_nsga2(seed: int) -> Any:
    import optuna

    return optuna.samplers.NSGAIISampler(seed=seed, population_size=12)


def make_cmaes(seed: int) -> Any:
    """Ranges by CMA-ES; it knows no choices, those come from a uniform sampler."""
    import optuna

    try:
        import cmaes  # noqa: F401
    except ImportError as e:
        raise MissingPackage("cmaes", "compress") from e
    independent = optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.CmaEsSampler(
        seed=seed,
        n_startup_trials=STARTUP_TRIALS,
        independent_sampler=independent,
        warn_independent_sampling=False,
    )


def make_random(seed: int) -> Any:
    import optuna

    return optuna.samplers.RandomSampler(seed=seed)
