"""Trials for workers, some of which end their worker. A worker imports this file alone, so it starts in
a second.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def evaluate_units(context, candidate):
    """Return the loss of a candidate: a's units are worth three times b's."""
    lost = {n: sum(64 - k for k in kept.values()) for n, kept in candidate["kept_units"].items()}
    return {"loss": 3 * lost["a"] + lost["b"], "quality": {}, "seconds": 0.0}


def die_once(folder, candidate):
    """Kill the worker at the first trial, as the kernel does where memory runs out."""
    if _is_first(folder):
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate_units(None, candidate)


def hang_once(folder, candidate):
    """Hang at the first trial, as code of a library does that never looks at signals."""
    if _is_first(folder):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(600)
    return evaluate_units(None, candidate)


def _is_first(folder):
    """Return whether no worker has asked this before."""
    try:
        (Path(folder) / "began").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
