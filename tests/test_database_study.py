"""Trials that are kept in PostgreSQL: each is there once, also when the server was away."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter

import optuna
import pytest
import small_search
from click.testing import CliRunner
from deadly_trials import evaluate_units
from free_port import find_free_port
from optuna.trial import TrialState
from small_postgres import SmallPostgres, find_program

from mmcompress.cli import main
from mmcompress.errors import ClusterError, DataError, SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.results.records import Summary
from mmcompress.run.inspect_run import inspect_run
from mmcompress.search import database_study, study
from mmcompress.search.database_study import (
    DatabaseRecord,
    check_database,
    list_database_faults,
    open_database_study,
)
from mmcompress.search.search_session import run_study
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.folder import RunFolder


@pytest.fixture(scope="module")
def server():
    """A server that runs."""
    if find_program("initdb") is None:
        if os.environ.get("MMCOMPRESS_REQUIRE"):
            pytest.fail("PostgreSQL is not installed")
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    server = SmallPostgres()
    try:
        server.start()
        yield server
        server.stop()
    finally:
        server.remove()


def search(book, *, trials=10, evaluate=evaluate_units):
    """Search the small space; returns the trials."""
    inputs = small_search.make_inputs(trials=trials, mutations=4, evaluate=evaluate)
    return run_study(book, small_search.problem(), inputs=inputs)


def list_keys(trials):
    return [trial.candidate.make_key() for trial in trials]


def check_study(book, trials):
    """Every finished trial stands in it once, with its constraint; none is running."""
    written = study.read_finished_trials(book)
    keys = Counter(list_keys(written))
    assert set(keys) == set(list_keys(trials)) and max(keys.values()) == 1
    for optuna_trial in book.get_trials(deepcopy=False):
        assert optuna_trial.state.is_finished() and study.DASHBOARD_CONSTRAINTS_KEY in (
            optuna_trial.system_attrs
        )


def test_a_search_is_the_same_wherever_its_trials_are_kept(server, tmp_path):
    book = open_database_study(server.url, tmp_path / "study.json", tell=print)
    trials = search(book)
    assert list_keys(trials) == list_keys(search(study.open_study(tmp_path / "journal")))
    check_study(book, trials)
    again = open_database_study(server.url, tmp_path / "study.json", tell=print)
    assert list_keys(study.read_finished_trials(again)) == list_keys(trials)
    # Another run folder has a study of its own.
    other = open_database_study(server.url, tmp_path / "other.json", tell=print)
    assert other.get_trials() == []


def test_a_search_waits_for_a_server_that_is_restarted(server, tmp_path):
    told = []
    book = open_database_study(server.url, tmp_path / "study.json", tell=told.append)
    evaluations = []
    restart = threading.Timer(2.0, server.start)

    def stop_server_once(context, candidate):
        evaluations.append(candidate)
        if len(evaluations) == 4:
            server.stop()
            restart.start()
        return evaluate_units(context, candidate)

    trials = search(book, evaluate=stop_server_once)
    restart.join()
    assert told == [
        "search.storage: the database is away; waiting for it",
        "search.storage: the database is back",
    ]
    check_study(book, trials)
    assert list_keys(trials) == list_keys(search(study.open_study(tmp_path / "journal")))


def test_a_trial_whose_answer_was_lost_is_not_written_twice(server, tmp_path, monkeypatch):
    book = open_database_study(server.url, tmp_path / "study.json", tell=print)
    add = database_study.optuna.Study.add_trial
    lost = []

    def lose_first_answer(self, trial):
        add(self, trial)
        if not lost:
            lost.append(trial)
            raise database_study.OperationalError("INSERT", {}, Exception("connection lost"))

    monkeypatch.setattr(database_study.optuna.Study, "add_trial", lose_first_answer)
    monkeypatch.setattr(database_study, "SECONDS_BETWEEN_RECONNECTS", 0.0)
    trials = search(book, trials=3)
    assert lost
    check_study(book, trials)


def test_a_server_that_stays_away_ends_the_run_with_what_to_do(server, tmp_path, monkeypatch):
    book = open_database_study(server.url, tmp_path / "study.json", tell=print)
    search(book, trials=2)
    monkeypatch.setattr(database_study, "MAX_OUTAGE_SECONDS", 0.5)
    monkeypatch.setattr(database_study, "SECONDS_BETWEEN_RECONNECTS", 0.1)
    server.stop()
    try:
        with pytest.raises(ClusterError, match="Finished trials are kept; --resume goes on"):
            book.get_trials()
        start = time.monotonic()
        with pytest.raises(DataError, match=r"search\.storage: postgresql://mm@.*refused"):
            check_database(server.url)
        assert time.monotonic() - start < database_study.DATABASE_SECONDS
    finally:
        server.start()
    assert len(study.read_finished_trials(book)) > 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me@host/db?password=secret", "leave it out of the URL, and set PGPASSWORD"),
        ("postgresql://me:secret@host/db", "leave it out of the URL, and set PGPASSWORD"),
        ("mysql://me@host/db", "expected postgresql://USER@HOST:PORT/DATABASE"),
        ("postgresql://me@host", "expected postgresql://USER@HOST:PORT/DATABASE"),
    ],
)
def test_a_url_that_can_not_be_is_refused_without_its_password(tiny, url, message):
    with pytest.raises(SpecError, match=message) as caught:
        load_spec(tiny / "spec.yaml", {"search.storage": url})
    assert "secret" not in str(caught.value)


def test_the_doctor_sees_what_is_wrong_with_a_study_in_a_database(server, tmp_path):
    (tmp_path / "spec.json").write_text('{"nodes": {}}')
    record = RunFolder(path=tmp_path).database_study
    book = open_database_study(server.url, record, tell=print)
    search(book)
    assert list_database_faults(record) == []
    book.ask()  # a trial that runs, and nobody works on it
    trial = optuna.trial.create_trial(state=TrialState.COMPLETE, value=1.0)
    optuna.Study.add_trial(book, trial)
    faults = list_database_faults(record)
    assert [fault.partition(" ")[2].partition(" ")[2] for fault in faults] == [
        "is still running, and nobody works on it",
        "has no constraint: it counts as feasible",
        "has no structure",
    ]
    found = {finding.fault for finding in inspect_run(tmp_path) if finding.path == record}
    assert found == set(faults)
    optuna.delete_study(study_name=book.study_name, storage=book._storage)
    assert "has no study" in list_database_faults(record)[0]


def test_the_doctor_tells_that_a_database_gives_no_answer(tmp_path):
    (tmp_path / "spec.json").write_text('{"nodes": {}}')
    record = RunFolder(path=tmp_path).database_study
    nobody = f"postgresql://someone@127.0.0.1:{find_free_port()}/trials"
    write_record(record, DatabaseRecord(storage=nobody, name="lost"))
    faults = [finding.fault for finding in inspect_run(tmp_path) if finding.path == record]
    assert len(faults) == 1 and nobody in faults[0] and "refused" in faults[0]


@pytest.mark.very_slow
def test_a_whole_run_keeps_its_trials_in_the_database(server, run_tiny, tmp_path):
    out = tmp_path / "r"
    overrides = {"search.storage": server.url}
    summary = run_tiny(out, overrides=overrides)
    folder = RunFolder(path=out)
    assert not folder.study.exists() and folder.database_study.exists()
    assert summary.trials and read_record(Summary, folder.summary) == summary
    # What it was asked for is on record, and another storage is refused.
    assert json.loads(folder.spec.read_text())["search"]["storage"] == server.url
    assert run_tiny(out, overrides=overrides).trials == summary.trials
    done = CliRunner().invoke(main, ["doctor", str(out)])
    assert done.exit_code == 0, done.output
