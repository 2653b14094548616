"""Ends a trial that hangs: on a worker, after the seconds that the spec gives it."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mmcompress.search.executors import Evaluate, TaskResult, TrialTimeout

GRACE_SECONDS = 30.0
"""Seconds after the limit in which Python may end the trial itself. Code of a library that does not
return to Python by then ends with its process."""


@dataclass(frozen=True, kw_only=True)
class TimeLimit:
    """An evaluation with a limit of time, as plain data that goes to a worker.

    Only another process can be limited: in the driver's own process it just evaluates.
    """

    evaluate: Evaluate
    """Measures one candidate on a worker."""
    seconds: float
    """Seconds that it may take; 0: any."""
    driver: tuple[str, int]
    """Machine and process of the driver."""
    grace_seconds: float = GRACE_SECONDS
    """Seconds after the limit from which on the process ends."""

    def __call__(self, context: object, candidate: object) -> TaskResult:
        """Evaluate a candidate.

        Raises:
            TrialTimeout: It took too long.
        """
        is_worker = (os.uname().nodename, os.getpid()) != self.driver
        is_main_thread = threading.current_thread() is threading.main_thread()
        if not self.seconds or not is_worker or not is_main_thread:
            # Signals come to the main thread alone.
            return self.evaluate(context, candidate)
        with _interrupt_after(self.seconds, self.grace_seconds):
            return self.evaluate(context, candidate)


def limit_seconds(evaluate: Evaluate, seconds: float) -> Evaluate:
    """Return an evaluation that ends on workers of this process after some seconds."""
    driver = (os.uname().nodename, os.getpid())
    return TimeLimit(evaluate=evaluate, seconds=seconds, driver=driver)


@contextmanager
def _interrupt_after(seconds: float, grace_seconds: float) -> Iterator[None]:
    """Raise `TrialTimeout` in the block when it takes too long; end the process when that fails."""

    def interrupt(number: int, frame: object) -> None:
        raise TrialTimeout(f"it took more than {seconds:g} s (search.trial_seconds)")

    earlier_handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    # This watch runs without Python, so it ends loops inside libraries too.
    with open(os.devnull, "w", encoding="utf-8") as null_file:
        faulthandler.dump_traceback_later(seconds + grace_seconds, exit=True, file=null_file)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, earlier_handler)
