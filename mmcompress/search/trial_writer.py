"""Writes finished trials to a study, in their order. No torch."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import optuna
from optuna.trial import FrozenTrial

MAX_WAITING_TRIALS = 32
"""Trials that wait to be written at most: as many are evaluated again after a loss of power."""


class TrialWriter:
    """Writes trials to a study, at once or in a thread of its own.

    A journal waits for the disk after every trial, some milliseconds. With many workers, the driver
    has something better to do meanwhile.

    Args:
        study: The study.
        in_thread: Whether a thread writes. The end of the block waits for it.
    """

    def __init__(self, study: optuna.Study, *, in_thread: bool):
        self._study = study
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trials") if in_thread else None
        self._writes: deque[Future[None]] = deque()

    def __enter__(self) -> TrialWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait until all trials are written. Raises what the last writes raised."""
        if self._pool is None:
            return
        self._pool.shutdown(wait=True)
        if error is None:
            self._settle(max_waiting=0)

    def write(self, trial: FrozenTrial) -> None:
        """Write a trial, whole at once. Raises what a write of one before it raised."""
        if self._pool is None:
            self._study.add_trial(trial)
            return
        self._writes.append(self._pool.submit(self._study.add_trial, trial))
        self._settle(max_waiting=MAX_WAITING_TRIALS)

    def _settle(self, *, max_waiting: int) -> None:
        """Take the result of writes that have ended, and wait until no more than these are left."""
        while self._writes and (self._writes[0].done() or len(self._writes) > max_waiting):
            self._writes.popleft().result()
