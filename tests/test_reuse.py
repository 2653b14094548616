"""What another run has measured is taken over where nothing that it depends on has changed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mmcompress.errors import DataError
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.cost_model.scale_predictor import scale_predictor
from mmcompress.run.adopt_shared import _get_measurement, adopt_shared_records
from mmcompress.run.profile import Profile
from mmcompress.run.reuse_rules import (
    DENSE_ANSWERS,
    PREDICTOR,
    PROFILE,
    SENSITIVITY,
    TEACHER_OUTPUTS,
    TEACHER_TEXTS,
)
from mmcompress.run.run_facts import hash_listing, hash_model
from mmcompress.run.run_targets import run
from mmcompress.stats import Latency
from mmcompress.storage import read_record
from mmcompress.workspace.context import open_run
from mmcompress.workspace.folder import RunFolder

RULES = {
    "profile": PROFILE,
    "predictor": PREDICTOR,
    "sensitivity": SENSITIVITY,
    "texts": TEACHER_TEXTS,
    "outputs": TEACHER_OUTPUTS,
    "answers": DENSE_ANSWERS,
}


def read_all(folder):
    """Return every file of a folder with its content and its time of change."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "run.lock":
            files[str(path.relative_to(folder))] = (path.read_bytes(), path.stat().st_mtime_ns)
    return files


@pytest.mark.parametrize(
    ("fact", "dependent"),
    [
        ("weights of vision", set(RULES)),
        ("data: files of path", set(RULES)),
        ("data: the first pairs of val", set(RULES)),
        ("data.options.size", set(RULES)),
        ("version of torch", set(RULES)),
        ("code of mmcompress", set(RULES)),
        ("nodes.captioner.max_tokens", set(RULES)),
        ("a setting that is new", set(RULES)),
        ("target", set()),
        ("search.trials", set()),
        ("distill.steps", set()),
        ("nodes.vision.prune.heads", set()),
        ("nodes.vision.source", set()),
        ("device", {"profile", "predictor", "answers"}),
        ("measure.requests", {"predictor"}),
        ("measure.threads", {"profile", "predictor", "answers"}),
        ("precisions of vision", {"predictor", "sensitivity"}),
        ("largest cut of positions of vision", {"predictor", "sensitivity"}),
        ("prune.importance", {"sensitivity"}),
        ("seed", {"sensitivity"}),
        ("data.calibration", {"sensitivity"}),
        ("data.labels", {"sensitivity", "outputs"}),
        ("compute.precision", {"outputs"}),
        ("metrics", {"answers"}),
    ],
)
def test_each_record_depends_on_what_it_is_made_of(fact, dependent):
    assert {name for name, rule in RULES.items() if rule.depends_on(fact)} == dependent


def test_what_differs_is_named():
    changes = SENSITIVITY.list_changes(
        {"seed": 0, "weights of vision": "a" * 64, "target": "2x"},
        {"seed": 1, "weights of vision": "b" * 64, "target": "3x", "prune.ridge": 0.1},
    )
    assert changes == (
        "prune.ridge changed (nothing, now 0.1)",
        "seed changed (0, now 1)",
        "weights of vision changed",
    )


def test_a_weight_a_setting_and_a_file_change_their_hashes(tiny, tmp_path, models):
    model = models["vision"]
    before = hash_model(model)
    assert hash_model(model) == before
    weight = next(model.parameters())
    weight.data.view(-1)[0] += 1
    assert hash_model(model) != before
    weight.data.view(-1)[0] -= 1
    model.config["a new setting"] = 1
    assert hash_model(model) != before
    (tmp_path / "list.csv").write_text("one")
    listed = hash_listing(tmp_path)
    (tmp_path / "list.csv").write_text("three")
    assert hash_listing(tmp_path) != listed


@pytest.mark.very_slow
def test_a_second_target_takes_over_what_the_first_run_measured(
    tiny, run_folder, machine, one_artifact, tmp_path
):
    """One whole run: the shared records are those of the earlier one, which stays as it was."""
    untouched = read_all(run_folder)
    messages = []
    summary = run(
        tiny / "spec.yaml",
        tmp_path / "new",
        overrides={"target": "1.3x"},
        from_run=run_folder,
        policy=one_artifact,
        on_progress=lambda stage, message, share: messages.append((stage, message)),
        **machine,
    )
    earlier = RunFolder(path=run_folder)
    new = RunFolder(path=tmp_path / "new")
    assert read_all(run_folder) == untouched
    for name in ("sensitivity", "sensitivity_tensors"):
        assert getattr(new, name).read_bytes() == getattr(earlier, name).read_bytes()
    for name in ("baseline", "quantized"):
        contents = [
            {key: content for key, (content, _) in read_all(getattr(folder, name)).items()}
            for folder in (earlier, new)
        ]
        assert contents[0] == contents[1]
    # Every output that the earlier run kept is the same file.
    kept = list(earlier.teacher_outputs.iterdir())
    assert kept and all((new.teacher_outputs / file.name).samefile(file) for file in kept)
    [told] = [message for stage, message in messages if "taken over" in message]
    for name in ("dense bundle", "predictor", "sensitivity", "training pairs", "answers (test)"):
        assert name in told
    stages = {stage for stage, _ in messages}
    assert "device table" not in stages and "sensitivity" not in stages
    assert summary.target.text == "1.3x" and summary.proofs


@pytest.mark.parametrize(
    ("overrides", "facts", "anew"),
    [
        ({"seed": 1}, {}, {"sensitivity"}),
        ({"measure.requests": 9}, {}, {"latency predictor"}),
        ({"metrics": ["caption"]}, {}, {"dense answers (test)"}),
        (
            {"data.options": {"image_size": 32, "test": 24, "val": 17}},
            {},
            {"dense bundle with proofs", "latency predictor", "sensitivity", "outputs", "answers"},
        ),
        (
            {},
            {"weights of text": "other"},
            {"dense bundle with proofs", "latency predictor", "sensitivity", "outputs", "answers"},
        ),
        ({}, None, {"dense bundle with proofs", "latency predictor", "sensitivity"}),
    ],
)
def test_what_has_changed_is_made_anew(
    tiny, run_folder, machine, tmp_path, monkeypatch, overrides, facts, anew
):
    messages = []
    run_context = open_run(
        tiny / "spec.yaml",
        tmp_path / "new",
        overrides=overrides,
        from_run=run_folder,
        on_progress=lambda stage, message, share: messages.append(message),
        **machine,
    )
    earlier = RunFolder(path=run_folder)
    stated = json.loads(earlier.facts.read_text())
    if facts is None:
        run_context.reused_folder = copy_without_facts(earlier, tmp_path / "old")
    elif facts:
        run_context.reused_folder = copy_without_facts(earlier, tmp_path / "old")
        run_context.reused_folder.facts.write_text(json.dumps(stated | facts))
    adopt_shared_records(run_context)
    told = {message.split(":")[0] for message in messages if "made anew" in message}
    for name in anew:
        assert any(name in record for record in told), (name, messages)
    folder = run_context.shared
    assert folder.sensitivity.exists() == ("sensitivity" not in anew)
    assert folder.profile.exists() == ("dense bundle with proofs" not in anew)
    assert folder.predictor.exists() == ("latency predictor" not in anew)
    assert run_context.shared.facts.exists()


def copy_without_facts(earlier, place):
    """Return a folder of links to everything of an earlier run but its facts."""
    place.mkdir()
    for path in earlier.path.iterdir():
        if path.name != earlier.facts.name:
            (place / path.name).symlink_to(path)
    return RunFolder(path=place)


def test_a_damaged_record_is_made_anew(tiny, run_folder, machine, tmp_path):
    damaged = copy_without_facts(RunFolder(path=run_folder), tmp_path / "old")
    damaged.facts.write_bytes(RunFolder(path=run_folder).facts.read_bytes())
    damaged.sensitivity.unlink()
    damaged.sensitivity.write_text("{")
    messages = []
    new = open_run(
        tiny / "spec.yaml",
        tmp_path / "new",
        from_run=tmp_path / "old",
        on_progress=lambda stage, message, share: messages.append(message),
        **machine,
    )
    adopt_shared_records(new)
    assert any(m.startswith("sensitivity: made anew: ") for m in messages)
    assert not new.shared.sensitivity.exists() and new.shared.predictor.exists()


def test_the_predictor_is_scaled_to_the_machine_of_today(run_folder):
    folder = RunFolder(path=run_folder)
    predictor = read_record(Predictor, folder.predictor)
    before = _get_measurement(read_record(Profile, folder.profile))

    def double(latency):
        return Latency(p50=2 * latency.p50, p95=2 * latency.p95, n=latency.n)

    now = replace(
        before,
        latency=double(before.latency),
        nodes={node: double(latency) for node, latency in before.nodes.items()},
        in_session_ms={node: 2 * ms for node, ms in before.in_session_ms.items()},
    )
    nodes = list(predictor.fits)
    dense = Candidate(
        kept_units={node: {} for node in nodes}, precision=dict.fromkeys(nodes, "fp32")
    )
    scaled = scale_predictor(predictor, before=before, now=now)
    assert scaled(dense) == pytest.approx(2 * predictor(dense))
    assert scale_predictor(predictor, before=before, now=before) == predictor


def test_a_folder_without_a_run_is_refused_before_any_work(tiny, machine, tmp_path):
    with pytest.raises(DataError, match="no run has measured a dense pipeline"):
        open_run(tiny / "spec.yaml", tmp_path / "new", from_run=tmp_path, **machine)
    assert not (tmp_path / "new").exists()


def test_the_folder_of_a_target_stands_for_the_one_above(run_folder, tiny, machine, tmp_path):
    new = open_run(tiny / "spec.yaml", tmp_path / "new", from_run=run_folder / "1.2x", **machine)
    assert new.reused_folder == RunFolder(path=run_folder)


def test_a_run_can_not_take_over_from_itself(run_folder, tiny, machine):
    with pytest.raises(DataError, match="use --resume"):
        open_run(tiny / "spec.yaml", run_folder, from_run=run_folder, resume=True, **machine)
