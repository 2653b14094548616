"""The pages of the documentation: links lead somewhere, and what they show is run or marked why not."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import wave
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_summary import make_summary
from PIL import Image

from mmcompress.cli import main
from mmcompress.graph.load_spec import load_spec
from mmcompress.registry import FAMILIES
from mmcompress.workspace.folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n+)?```(\w+)\n(.*?)```", re.S)
SHOWN_LANGUAGES = ("text", "json", "toml")
"""Languages of what is only shown."""

RUN_ELSEWHERE = {
    "docs/how_to/own_criterion.md": "test_plugins.py",
    "docs/how_to/own_metric.md": "test_plugins.py",
    "docs/how_to/own_model.md": "test_plugins.py and test_families.py",
    "docs/how_to/provider.md": "test_providers.py",
    "docs/how_to/serve.md": "test_serving.py",
    "docs/contributing.md": "test_contributing.py",
}
"""Pages whose blocks of Python are run by other tests."""


def write_photographs(folder):
    """Write a folder of pictures with a caption each."""
    folder.mkdir()
    rows = ["image,caption"]
    for number in range(30):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,picture {number}")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")


def write_recordings(folder):
    """Write a folder of short sounds with what is said in each."""
    (folder / "wavs").mkdir(parents=True)
    rows = []
    for number in range(20):
        with wave.open(str(folder / "wavs" / f"clip_{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(bytes(3_200))
        rows.append(f"clip_{number}|sentence {number}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")


def list_blocks(language):
    """List the blocks of a language that are not marked, by page."""
    blocks = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for number, (mark, block_language, text) in enumerate(BLOCK.findall(page.read_text())):
            if not mark and block_language == language:
                blocks.append(pytest.param(name, text, id=f"{name}-{number}"))
    return blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page):
    missing = []
    docs = ROOT / "docs"
    for target, _ in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        place = (page.parent / target).resolve()
        # The built pages hold the folder of the documentation alone.
        is_left_out = page.is_relative_to(docs) and not place.is_relative_to(docs)
        if is_left_out or not place.exists():
            missing.append(target)
    assert missing == []


def test_every_page_stands_in_the_navigation():
    navigation = (ROOT / "docs" / "zensical.toml").read_text()
    for page in PAGES[1:]:
        assert f'"{page.relative_to(ROOT / "docs")}"' in navigation, page


def test_every_block_is_run_or_says_why_not():
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for mark, language, text in BLOCK.findall(page.read_text()):
            if mark or language in SHOWN_LANGUAGES:
                continue
            assert language in ("sh", "yaml", "python"), (name, text)
            if language == "python":
                assert name in RUN_ELSEWHERE, (name, text)


@pytest.mark.parametrize(("page", "text"), list_blocks("sh"))
def test_commands_run(page, text, tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("pipelines", "search_spaces"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    # What a reader of the pages has: photographs, recordings, and checkpoints.
    write_photographs(tmp_path / "photos")
    write_recordings(tmp_path / "recordings")
    for model in ("my_clip", "my_whisper", "my_minilm"):
        (tmp_path / model).mkdir()
    for line in text.splitlines():
        words = shlex.split(
            line.replace("my_captions.yaml", str(tiny / "spec.yaml")), comments=True
        )
        if not words:
            continue
        assert words[0] == "mmcompress", (page, line)
        done = CliRunner().invoke(main, words[1:])
        assert done.exit_code == 0, (line, done.output)


@pytest.mark.parametrize(("page", "text"), list_blocks("yaml"))
def test_specs_are_read(page, text, tiny, tmp_path):
    """A whole spec is read as it is, keys alone in place of those of another spec."""
    spec = text
    if "nodes:" not in text:
        keys = {line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()}
        others = re.split(r"\n(?=\w)", (tiny / "spec.yaml").read_text())
        spec = "\n".join(part for part in others if part.partition(":")[0] not in keys)
        spec += "\n" + text
    (tmp_path / "spec.yaml").write_text(spec)
    read = load_spec(tmp_path / "spec.yaml")
    for line in text.splitlines():
        key, _, value = line.partition(": ")
        if key in ("name", "target"):
            assert getattr(read, key) == value.partition("#")[0].strip()
    assert read.nodes and read.outputs


@pytest.mark.slow
def test_pages_written_from_the_code_are_those_of_today():
    done = subprocess.run(
        [sys.executable, "tools/write_reference.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def list_documented_keys(page: str, event: str) -> set[str]:
    """Return the keys in the table of an event."""
    section = page.split(f"## `{event}`\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def test_the_table_of_models_says_what_the_command_lists():
    page = (ROOT / "docs/reference/models.md").read_text()
    header, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    documented = {}
    for kind, *families in rows:
        for library, names in zip(header[1:], families, strict=True):
            if names:
                documented[f"{library}/{kind}"] = names
    listed = {name: FAMILIES.get_about(name) for name in FAMILIES.list_names()}
    assert documented == listed


def test_the_keys_of_every_event_are_documented(capsys, tmp_path):
    from mmcompress.cli.console import Progress
    from mmcompress.cli.results_table import write_result_event
    from mmcompress.cli.watch import WatchedState, write_state_event

    page = (ROOT / "docs/reference/events.md").read_text(encoding="utf-8")
    write_result_event(make_summary(), RunFolder(path=tmp_path))
    write_state_event(WatchedState(name="running", message="the run goes on"))
    with Progress("json") as on_progress:
        on_progress("search", "trial 1", 0.1)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {event["event"] for event in events} == {"result", "progress", "state"}
    for event in events:
        assert set(event) - {"event"} == list_documented_keys(page, event["event"])
