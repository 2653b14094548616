"""optuna-dashboard opens the journal of a search, and knows which trials keep the budget."""

from __future__ import annotations

import json
from wsgiref.util import setup_testing_defaults

import optuna_dashboard
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from small_search import BLOCKS, PREDICT, go, problem

from mmcompress.graph.structure import Candidate


def get_json(app, path, query=""):
    """Ask a WSGI application as a browser would."""
    environ = {"PATH_INFO": path, "QUERY_STRING": query}
    setup_testing_defaults(environ)
    answers = []
    body = b"".join(app(environ, lambda status, headers, *rest: answers.append(status)))
    assert answers[0].startswith("200"), (answers, body[:300])
    return json.loads(body)


@pytest.mark.filterwarnings("ignore")
def test_the_dashboard_tells_feasible_trials_from_others(tmp_path):
    whole = Candidate(
        kept_units={n: {"0": 64, "1": 64} for n in BLOCKS}, precision=dict.fromkeys(BLOCKS, "fp32")
    )
    budget_ms = problem().budget_ms
    assert PREDICT(whole) > budget_ms
    path = tmp_path / "search.journal"
    trials = {t.number: t for t in go(path, trials=6, mutations=2, seeds=[whole])}
    app = optuna_dashboard.wsgi(JournalStorage(JournalFileBackend(str(path))))
    [study] = get_json(app, "/api/studies")["study_summaries"]
    shown = get_json(app, f"/api/studies/{study['study_id']}", "after=0")["trials"]
    # A point that came up twice stands once in the result of the search.
    shown = [t for t in shown if t["number"] in trials]
    assert len(shown) == len(trials)
    for trial in shown:
        [excess_ms] = trial["constraints"]
        assert excess_ms == pytest.approx(trials[trial["number"]].latency_ms - budget_ms)
    assert any(t["constraints"][0] > 0 for t in shown)
    assert any(t["constraints"][0] <= 0 for t in shown)
