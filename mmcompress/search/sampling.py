"""Proposes points of a search space: an Optuna study in memory, of a bounded number of trials.

Samplers look at all trials at every proposal, and a study in a file writes every parameter of a
proposal by itself. So the journal holds finished trials alone, and this study is asked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from mmcompress.registry import SAMPLERS
from mmcompress.runtime.quiet_loggers import silence_logger
from mmcompress.search.problem import SearchPoint

OPTUNA_LOGGER = "optuna"
"""Optuna writes a line for every trial that it is told. The progress listener hears of them."""

MAX_SAMPLED_TRIALS = {"gp": 100}
"""Trials that a sampler fits its model to, by its name. A Gaussian process takes 10 s and more for
each proposal at 1,000 trials."""

MAX_TRIALS = 1_000
"""Trials of any other sampler."""

MIN_KNOWN_TRIALS = 64
"""Trials that a sampler knows at least, however long its proposals take."""

MEAN_WEIGHT = 0.1
"""Weight of the latest proposal in the running mean of their seconds."""


class Sampling:
    """A sampler with the trials that it knows.

    Args:
        sampler: Its name in the registry of samplers.
        seed: Of its proposals. One that goes on must not draw its first points again.
        distributions: Optuna's distribution of every dimension.
        trials: Finished trials, oldest first.
        starts: Points that are proposed first, unless they are known.
    """

    @silence_logger(OPTUNA_LOGGER)
    def __init__(
        self,
        sampler: str,
        *,
        seed: int,
        distributions: Mapping[str, BaseDistribution],
        trials: Sequence[FrozenTrial],
        starts: Sequence[SearchPoint],
    ):
        make_sampler = SAMPLERS.get(sampler)
        self._sampler = make_sampler(seed)
        self._distributions = dict(distributions)
        self._max_trials = MAX_SAMPLED_TRIALS.get(sampler, MAX_TRIALS)
        self._mean_seconds = 0.0
        self._study = self._make_study(trials)
        for point in starts:
            self._study.enqueue_trial(point, skip_if_exists=True)

    def ask(self) -> optuna.Trial:
        """Propose a point; its parameters are those of the space."""
        start = time.perf_counter()
        trial = self._study.ask(self._distributions)
        seconds = time.perf_counter() - start
        self._mean_seconds += MEAN_WEIGHT * (seconds - self._mean_seconds)
        return trial

    def keep_up_(self, seconds_per_proposal: float) -> None:
        """Look at fewer trials from now on, where proposals take longer than they may.

        Samplers take about as long as the trials that they know are many.

        Args:
            seconds_per_proposal: What a proposal may take on average.
        """
        known_count = min(len(self._study.get_trials(deepcopy=False)), self._max_trials)
        if self._mean_seconds <= seconds_per_proposal or known_count <= MIN_KNOWN_TRIALS:
            return
        self._max_trials = max(known_count // 2, MIN_KNOWN_TRIALS)
        # The next proposals say how long they take now.
        self._mean_seconds = 0.0
        self._forget_old_trials()

    @silence_logger(OPTUNA_LOGGER)
    def tell(self, trial: optuna.Trial, result: FrozenTrial) -> None:
        """Tell the result of a proposal.

        Args:
            trial: The proposal.
            result: The finished or failed trial, as the journal has it.
        """
        if trial.study is not self._study:
            # It was proposed before older trials were forgotten.
            self._add(result)
        elif result.state == TrialState.COMPLETE:
            for name, excess in result.constraints.items():
                trial.set_constraint(name, excess)
            self._study.tell(trial, result.value)
        else:
            self._study.tell(trial, state=result.state)
        self._forget_old_trials()

    @silence_logger(OPTUNA_LOGGER)
    def add(self, result: FrozenTrial) -> None:
        """Tell the result of a point that something else proposed."""
        self._add(result)
        self._forget_old_trials()

    def _add(self, result: FrozenTrial) -> None:
        self._study.add_trial(result)

    def _forget_old_trials(self) -> None:
        """Begin a study with the latest half of the trials, once there are too many."""
        trials = self._study.get_trials(deepcopy=False)
        if len(trials) >= 2 * self._max_trials:
            waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
            self._study = self._make_study(trials)
            self._study.add_trials(waiting)

    def _make_study(self, trials: Sequence[FrozenTrial]) -> optuna.Study:
        """Make a study in memory of the latest finished trials."""
        study = optuna.create_study(sampler=self._sampler)
        finished = [trial for trial in trials if trial.state.is_finished()]
        study.add_trials(finished[-self._max_trials :])
        return study
