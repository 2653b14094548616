"""Progress as a person sees it on a terminal and in a log, and as a program reads it."""

from __future__ import annotations

import io
import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from mmcompress.cli import console, main
from mmcompress.cli.live_view import LiveState, draw_state


def show(monkeypatch, form="person", *, on_terminal):
    """Pass through two stages, and return what was shown on the console of progress."""
    text = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=text, force_terminal=on_terminal, width=200))
    seconds = iter(range(0, 1000, 5))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(seconds)))
    with console.Progress(form) as on_progress:
        on_progress("search", "trial 1", 0.1)
        on_progress("search", "trial 2", 0.5)
        on_progress("distill", "a word " * 60, None)
    return text.getvalue()


def test_a_terminal_keeps_a_line_of_every_finished_stage(monkeypatch):
    shown = show(monkeypatch, on_terminal=True)
    assert "done" in shown and shown.count("done") == 2


def test_the_live_view_tells_share_times_and_forecast():
    state = LiveState(
        stage="search",
        message="trial 9 of 12: best loss 0.010 at 4.20 ms",
        share=0.75,
        stage_seconds=90.0,
        run_seconds=3700.0,
        forecast="about 6 min left for this artifact",
    )
    text = io.StringIO()
    Console(file=text, width=100).print(draw_state(state))
    shown = text.getvalue()
    assert "search" in shown and "75%, 1:30 passed, 0:30 left" in shown
    assert "best loss 0.010 at 4.20 ms" in shown
    assert "1:01:40 since the start; about 6 min left for this artifact" in shown


def test_a_forecast_ends_no_stage(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=text, force_terminal=True, width=200))
    seconds = iter(range(0, 5000, 5))
    with console.Progress(read_seconds=lambda: float(next(seconds))) as on_progress:
        on_progress("search", "trial 1", 0.1)
        on_progress("time", "about 6 min left", None)
        on_progress("search", "trial 2", 0.5)
    assert text.getvalue().count("done") == 1


def test_lines_of_a_log_are_not_wrapped(monkeypatch):
    shown = show(monkeypatch, on_terminal=False)
    lines = shown.splitlines()
    assert [line.split()[2] for line in lines] == ["search", "distill"]
    assert len(lines[1]) > 400


def test_quiet_shows_nothing(monkeypatch):
    assert show(monkeypatch, "quiet", on_terminal=True) == ""


def test_a_program_reads_one_object_a_line(monkeypatch, capsys):
    assert show(monkeypatch, "json", on_terminal=False) == ""
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["progress"] * 3
    assert events[1]["stage"] == "search" and events[1]["share"] == 0.5
    assert events[2]["share"] is None and events[2]["seconds"] > events[1]["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--json", "--quiet"])
def test_a_finished_run_is_told_in_the_form_that_was_asked_for(tiny, run_folder, tmp_path, flag):
    import shutil

    folder = shutil.copytree(run_folder, tmp_path / "r")
    spec = tiny / "spec.yaml"
    done = CliRunner().invoke(main, ["run", str(spec), "--out", str(folder), "--resume", flag])
    assert done.exit_code == 0, done.output
    if flag == "--quiet":
        assert "stage" not in done.stdout and "report" in done.stdout
        return
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "result" and events[-1]["met"] is True
    assert events[-1]["bundle"] == str(folder / "bundle")


@pytest.mark.parametrize(
    ("error", "word"), [(KeyboardInterrupt, "interrupted"), (OSError, "failed")]
)
def test_a_stage_that_an_error_ends_is_not_called_done(monkeypatch, error, word):
    text = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=text, force_terminal=True, width=200))
    seconds = iter(range(0, 5000, 5))
    with (
        pytest.raises(error),
        console.Progress(read_seconds=lambda: float(next(seconds))) as on_progress,
    ):
        on_progress("search", "trial 1", 0.1)
        raise error
    assert "done" not in text.getvalue() and f"{word}" in text.getvalue()


def test_a_terminal_breaks_lines_between_words(monkeypatch):
    text = io.StringIO()
    terminal = Console(file=text, force_terminal=True, width=60, color_system=None)
    monkeypatch.setattr(console, "err", terminal)
    monkeypatch.setattr(console, "LiveView", lambda *parts: None)
    message = "the run will take about 2.7 GB of memory and 200 MB of disk, and up to 2 GB besides"
    with console.Progress(read_seconds=lambda: 0.0) as on_progress:
        on_progress.view = None
        on_progress("check", message, None)
    first, *others = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    told = [first.partition("check")[2], *others]
    assert " ".join(part.strip() for part in told) == message
    assert others and all(line.startswith(" " * 20) for line in others)
