"""Whole runs cost most of the time of the suite, so there are few of them.

Other tests look at the finished run of `conftest.py`, go on from what it measured, or run stages of
milliseconds (`fake_stages.py`).
"""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
MAX_WHOLE_RUNS = 5
MARKED_TEST = re.compile(r"^@pytest\.mark\.end_to_end\n(?:@.*\n)*def (test_\w+)", re.M)


def test_there_are_few_whole_runs_and_all_are_slow():
    marked = []
    for file in TESTS.glob("test_*.py"):
        for match in MARKED_TEST.finditer(file.read_text()):
            assert "@pytest.mark.slow" in match[0], match[1]
            marked.append(match[1])
    assert 5 <= len(marked) <= MAX_WHOLE_RUNS
