"""A trial that hangs is a failed trial: the search goes on."""

from __future__ import annotations

import time

from test_search import go, judge

from mmcompress.search import study
from mmcompress.search.executors import InlineExecutor, make_process_executor
from mmcompress.search.time_limit import limit_seconds


def hang_on_few_units(context, candidate):
    """Hang where half of the units of a node are gone."""
    if sum(candidate["kept_units"]["a"].values()) < 96:
        time.sleep(60)
    return judge(context, candidate)


def test_a_hanging_trial_is_recorded_and_the_search_goes_on(tmp_path):
    start = time.monotonic()
    evaluate = limit_seconds(hang_on_few_units, 0.2)
    with make_process_executor(None, 1) as executor:
        trials = go(tmp_path / "j", evaluate, trials=8, mutations=0, retries=2, executor=executor)
    assert time.monotonic() - start < 50 and trials
    book = study.open_study(tmp_path / "j", 0)
    errors = [t.user_attrs["error"] for t in book.trials if "error" in t.user_attrs]
    assert errors and set(errors) == {
        "TrialTimeout: it took more than 0.2 s (search.trial_seconds)"
    }
    # Not tried again: each hung once.
    assert len({str(t.params) for t in book.trials if "error" in t.user_attrs}) == len(errors)


def test_the_process_of_the_driver_is_never_interrupted(tmp_path):
    evaluate = limit_seconds(
        lambda context, candidate: time.sleep(0.3) or judge(context, candidate), 0.1
    )
    assert (
        len(go(tmp_path / "j", evaluate, trials=2, mutations=0, executor=InlineExecutor(None))) == 2
    )
