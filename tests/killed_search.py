"""A deterministic search in a process of its own, for tests that kill it: `killed_search.py JOURNAL`.

Each evaluation takes a moment and leaves a line in `JOURNAL.evaluated`.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deadly_trials import evaluate_units
from small_search import go_in_order

SECONDS = 0.1


class ThreadedExecutor(ThreadPoolExecutor):
    """Workers that are threads, for trials that only wait."""

    def submit(self, evaluate, *args):
        return super().submit(evaluate, None, *args)


def search(journal: Path, workers: int = 4) -> list:
    """Run the search; returns its trials."""

    def evaluate(context, candidate):
        time.sleep(SECONDS)
        with journal.with_suffix(".evaluated").open("a") as file:
            file.write(f"{sorted(map(str, candidate.items()))}\n")
        return {**evaluate_units(context, candidate), "worker": "here/1"}

    with ThreadedExecutor(workers) as executor:
        return go_in_order(journal, evaluate, executor=executor)


if __name__ == "__main__":
    search(Path(sys.argv[1]))
