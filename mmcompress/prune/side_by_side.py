"""Small pieces of work beside each other, each on one thread of torch.

Products and inverses of a few hundred features gain nothing from a second thread: they only wait
for it. Several of them at a time use all threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

Result = TypeVar("Result")
"""What a piece of work returns."""


def run_side_by_side(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run pieces of work on as many threads as torch may use; return their results in order.

    They may share nothing but tensors that they only read. Modules are not run in them: some keep a
    state while they run.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        futures = [pool.submit(task) for task in tasks]
        results = [future.result() for future in futures]
    # A thread of torch's own that starts later takes over what was set last.
    torch.set_num_threads(threads)
    return results
