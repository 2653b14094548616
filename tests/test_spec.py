"""A spec that is wrong says where, what and what would be right."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from mmcompress.errors import SpecError
from mmcompress.graph.load_spec import load_document, load_spec
from mmcompress.graph.references import count_texts_per_request, find_unjoined_encoders
from mmcompress.registry import NODE_KINDS
from mmcompress.spec.describe_spec import describe_spec
from mmcompress.spec.loader import list_given_keys
from mmcompress.spec.node_options import NodeOption
from mmcompress.spec.overrides import OLD_KEYS
from mmcompress.spec.schema import Spec
from mmcompress.spec.space import Space, load_space
from mmcompress.spec.target import Goal, parse_target
from mmcompress.stats import Latency
from mmcompress.storage import InvalidValue, build_record, describe_record, to_plain

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted(ROOT.glob("pipelines/*.yaml")), ids=lambda p: p.name)
def test_every_pipeline_loads(path, monkeypatch, tmp_path):
    monkeypatch.setenv("CAPTIONS_DIR", str(tmp_path))
    monkeypatch.setenv("LJSPEECH_DIR", str(tmp_path))
    assert load_spec(path).list_model_nodes()


@pytest.mark.parametrize("path", sorted(ROOT.glob("search_spaces/*.yaml")), ids=lambda p: p.name)
def test_every_search_space_loads(path):
    space = load_space(path, load_spec(ROOT / "pipelines/clip_captioner.yaml"))
    assert "nodes.vision.prune.ffn" in space.dimensions and not any(
        "*" in d for d in space.dimensions
    )


def edited(tiny, tmp_path, old, new):
    text = (tiny / "spec.yaml").read_text()
    assert old in text
    path = tmp_path / "spec.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


WRONG = [
    (
        "candidates: 2",
        "candidats: 2",
        r"spec.yaml:12: nodes.captioner.candidats: unknown key .*did you mean 'candidates'",
    ),
    (
        "candidates: 2",
        "candidates: two",
        r":12: nodes.captioner.candidates: expected a whole number, got 'two'",
    ),
    (
        "candidates: 2",
        "candidates: 0",
        r":12: nodes.captioner.candidates: must lie in 1 .. 64, got 0",
    ),
    ("kind: text_decoder", "kind: text_decodr", r":9: .*did you mean 'text_decoder'"),
    (
        "context: vision.tokens",
        "context: vision.token",
        r":11: .*'vision' is an image_encoder and gives no 'token' .did you mean 'tokens'",
    ),
    (
        "context: vision.tokens",
        "context: vision.embedding",
        r":11: .*is an embedding, the port takes tokens .*vision.tokens",
    ),
    (
        "context: vision.tokens",
        "contxt: vision.tokens",
        r":11: .*'context' of a text_decoder is not connected",
    ),
    (
        "image: image}\n  captioner",
        "image: captioner.texts}\n  captioner",
        r":7: .*is texts, the port takes an image",
    ),
    (
        "caption: choose.best",
        "caption: chose.best",
        r"nothing is named 'chose.best'; did you mean 'choose.best'",
    ),
    (
        "kind: emoji_scenes",
        "kind: emoji_scene",
        r"unknown data kind 'emoji_scene'; did you mean 'emoji_scenes'",
    ),
    ("target: 1.22x", "target: fast", r"spec.yaml:\d+: target: expected a target like 2x"),
    ("target: 1.22x", "target: 1.22x\ntarget: 2x", r"'target' stands twice"),
    (
        "target: 1.22x",
        "prune: {importance: tailor}",
        r"unknown importance 'tailor'; did you mean 'taylor'",
    ),
    ("target: 1.22x", "metrics: [recall]", r"unknown metric 'recall'"),
    ("target: 1.22x", "plugins: [no_such_module]", r"can't import 'no_such_module'"),
    ("    source: ./clip\n", "", r":4: nodes.vision: 'source' is missing"),
    (
        "name: tiny",
        "name: ${NO_SUCH_VARIABLE}",
        r"the environment variable NO_SUCH_VARIABLE is not set",
    ),
    (
        "inputs: {image: image}",
        "inputs: {image: image, other: image}",
        "takes one input",
    ),
    ("name: tiny", "name: [tiny", r"not valid YAML"),
    (
        "target: 1.22x",
        "metrics: [embedding]",
        r"metrics.0: metric 'embedding' needs embeddings that no joining",
    ),
    ("  choose:\n", "  units:\n", "nodes.units: choose another name"),
    (
        "target: 1.22x",
        "target: 1.22x\nlimits: {size_mb: 0}",
        r"limits.size_mb: must lie in more than 0 .. 1e\+09, got 0",
    ),
    (
        "target: 1.22x",
        "target: 1.22x\nlimits: {node_ms: {vision: 0}}",
        r"limits.node_ms.vision: must lie in more than 0 .. 1e\+09, got 0",
    ),
    ("target: 1.22x", "metrics: []", r"metrics: name at least one to judge by"),
    ("prior: 0.1", "prompt: hello", r"choose.prompt: a nearest has no prompt, only text_decoder"),
    (
        "inputs: {text: captioner.texts}",
        "inputs: {text: captioner.texts}\n    candidates: 2",
        "encoder has no cand",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_a_wrong_spec_is_told_with_its_line(tiny, tmp_path, old, new, message):
    with pytest.raises(SpecError, match=message):
        load_spec(edited(tiny, tmp_path, old, new))


def test_a_cycle_is_named(tiny, tmp_path):
    text = (tiny / "spec.yaml").read_text()
    text = text.replace("inputs: {text: captioner.texts}", "inputs: {text: choose.best}")
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"the nodes form a cycle: .*choose.*text"):
        load_spec(tmp_path / "spec.yaml")


def test_a_missing_and_an_empty_file(tmp_path):
    with pytest.raises(SpecError, match="can't be read"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(SpecError, match="empty"):
        load_spec(tmp_path / "empty.yaml")


def test_overrides_reach_any_key_and_are_checked(tiny):
    spec = load_spec(
        tiny / "spec.yaml", {"nodes.vision.prune.ffn": 0.5, "nodes.vision.prune.blocks.0.ffn": 0.25}
    )
    assert spec.nodes["vision"].prune.ffn == 0.5 and spec.nodes["vision"].prune.blocks == {
        "0.ffn": 0.25
    }
    with pytest.raises(SpecError, match=r"--set nodes.vision.prune.fnn.*did you mean 'ffn'"):
        load_spec(tiny / "spec.yaml", {"nodes.vision.prune.fnn": 0.5})


def test_environment_variables_and_their_defaults(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("NAME_OF_IT", "chosen")
    path = edited(tiny, tmp_path, "name: tiny", "name: ${NAME_OF_IT}-${OTHER:-default}")
    assert load_spec(path).name == "chosen-default"


def test_files_lie_beside_the_spec_or_where_it_is_started_from(tiny, tmp_path, monkeypatch):
    (tmp_path / "here" / "photos").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    own = "kind: folder\n  options: {path: photos}\n  # "
    path = edited(
        tiny,
        tmp_path / "there",
        "kind: emoji_scenes\n  options: {image_size: 32, test: 24, val: 16}",
        own,
    )
    where = lambda: load_spec(path).data.options["path"]
    monkeypatch.chdir(tmp_path / "here")
    assert where() == str(tmp_path / "here" / "photos")
    (tmp_path / "there" / "photos").mkdir()
    assert where() == str(tmp_path / "there" / "photos")
    monkeypatch.chdir(tmp_path / "there")
    (tmp_path / "there" / "photos").rmdir()
    assert where() == str(
        tmp_path / "there" / "photos"
    )  # a missing file: its path in the spec's folder
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    assert load_spec(path, {"data.options.path": "~/photos"}).data.options["path"] == str(
        tmp_path / "here" / "photos"
    )


def test_a_tower_reads_all_that_a_generator_writes(tiny):
    spec = load_spec(tiny / "spec.yaml")
    assert count_texts_per_request(spec) == {"vision": 1, "captioner": 2, "text": 2}
    assert (
        count_texts_per_request(
            load_spec(tiny / "spec.yaml", {"nodes.text.inputs.text": "captioner.text"})
        )["text"]
        == 1
    )


def test_gradients_are_not_asked_of_what_no_loss_sees(loose):
    path, changes = loose
    assert find_unjoined_encoders(load_spec(path, changes)) == ("text",)
    also = {
        "caption": "captioner.text",
        "embedding": "vision.embedding",
    }  # the captioner reads its tokens alone
    assert find_unjoined_encoders(load_spec(path, changes | {"outputs": also})) == (
        "vision",
        "text",
    )
    assert find_unjoined_encoders(
        load_spec(path, changes | {"outputs": {"tokens": "vision.tokens"}})
    ) == ("text",)
    with pytest.raises(SpecError, match="taylor says nothing of the embedding of 'text'"):
        load_spec(path, changes | {"prune.importance": "magnitude + 0.5 * taylor"})


def test_targets():
    assert parse_target("2x") == Goal(kind="speedup", value=2.0) and parse_target("12.5ms") == Goal(
        kind="latency", value=12.5
    )
    assert parse_target("12ms p95") == Goal(kind="latency", value=12.0, statistic="p95")
    dense = Latency(p50=40.0, p95=60.0, n=9)
    assert (
        Goal(kind="speedup", value=2.0).compute_target_ms(dense) == 20
        and Goal(kind="speedup", value=2.0, statistic="p95").compute_target_ms(dense) == 30
    )
    assert Goal(kind="latency", value=12.0).compute_target_ms(dense) == 12
    for wrong in ("0.5x", "0ms", "x", "-2x", "2", "2x p99"):
        with pytest.raises(SpecError):
            parse_target(wrong)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("300 milliseconds", "300ms"),
        ("0.3 s", "300ms"),
        ("2 times faster", "2x"),
        ("3fold", "3x"),
    ],
)
def test_a_target_in_words_is_refused_with_how_it_is_written(text, meant):
    with pytest.raises(SpecError, match=rf"expected a target .*: did you mean {meant}\?"):
        parse_target(text)


def test_a_target_that_is_a_number_alone_is_refused_with_both_readings(tiny, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(
        re.sub(r"(?m)^target:.*$", "target: 1.5", (tiny / "spec.yaml").read_text("utf-8"))
    )
    with pytest.raises(SpecError, match=r"say 1\.5x for a speed-up, or 1\.5ms for a latency"):
        load_spec(path)


def test_a_space_with_an_unknown_node_or_an_empty_range(tiny, tmp_path):
    spec = load_spec(tiny / "spec.yaml")
    (tmp_path / "s.yaml").write_text(
        "name: s\ndimensions:\n  nodes.visio.prune.ffn: {low: 0, high: 1}\n"
    )
    with pytest.raises(SpecError, match=r"s.yaml:3: .*unknown node 'visio'; did you mean 'vision'"):
        load_space(tmp_path / "s.yaml", spec)
    (tmp_path / "s.yaml").write_text(
        "name: s\ndimensions:\n  nodes.*.prune.ffn: {low: 1, high: 0}\n"
    )
    with pytest.raises(SpecError, match="low <= high"):
        load_space(tmp_path / "s.yaml", spec)


def space_file(tmp_path, line):
    (tmp_path / "s.yaml").write_text(f"name: s\ndimensions:\n  {line}\n")
    return tmp_path / "s.yaml"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prune.protecton: {low: 1, high: 2}", r"s.yaml:3: .*did you mean 'prune.protection'"),
        ("nodes: {low: 1, high: 2}", "can't be searched"),
        ("nodes.*.prune.ffn: {choices: [a]}", "a precision takes 'choices'"),
        ("nodes.*.precision: {choices: [int3]}", "unknown precision 'int3'; did you mean 'int8'"),
        ("nodes.*.prune.ffn: {low: 0, high: 3}", r"must lie in 0 .. 1"),
        ("prune.protection: {low: 0.5, high: 3}", r"must lie in 1 .. 100"),
        ("nodes.*.prune.drop: {low: 0, high: 3, step: 0.5}", "'step' must be a whole number"),
        ("nodes.*.prune.ffn: {low: 0, high: 1, step: 0}", "'step' must be a number greater than 0"),
    ],
)
def test_a_space_is_held_to_what_can_be_searched(tiny, tmp_path, line, message):
    with pytest.raises(SpecError, match=message):
        load_space(space_file(tmp_path, line), load_spec(tiny / "spec.yaml"))


def test_sub_layers_are_counted_whole(tiny, tmp_path):
    space = load_space(
        space_file(tmp_path, "nodes.text.prune.drop: {low: 0, high: 3}"),
        load_spec(tiny / "spec.yaml"),
    )
    assert space.dimensions["nodes.text.prune.drop"].step == 1


def test_what_is_given_is_not_searched(tiny):
    rest = {"nodes.vision.prune.ffn": 0.5, "nodes.vision.prune": {"heads": 0.25}}
    assert "nodes.vision.prune.ffn" not in list_given_keys(tiny / "spec.yaml", rest)
    at_once = {"nodes.vision.prune": {"ffn": 0.5, "heads": 0.25}}
    assert {"nodes.vision.prune.ffn", "nodes.vision.prune.heads"} <= list_given_keys(
        tiny / "spec.yaml", at_once
    )
    overrides = {
        "nodes.vision.precision": "fp32",
        "nodes.text.prune.ffn": 0.5,
        "nodes.captioner.precision": "auto",
    }
    spec = load_spec(tiny / "spec.yaml", overrides)
    space = load_space(
        ROOT / "search_spaces/joint.yaml",
        spec,
        fixed=list_given_keys(tiny / "spec.yaml", overrides),
    )
    gone = {"nodes.vision.precision", "nodes.text.prune.ffn"}
    whole = load_space(ROOT / "search_spaces/joint.yaml", spec)
    assert set(whole.dimensions) - set(space.dimensions) == gone


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected a mapping at the top"),
        ("seed: !foo 3\n", "could not determine a constructor"),
    ],
)
def test_odd_yaml(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SpecError, match=message):
        load_spec(tmp_path / "s.yaml", {"seed": 1})
    (tmp_path / "s.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="can't be read"):
        load_spec(tmp_path / "s.yaml")


def test_a_document_travels_without_closing_what_was_open(tiny, tmp_path):
    import yaml

    (tmp_path / "sent.yaml").write_text(
        yaml.safe_dump(load_document(tiny / "spec.yaml", {"seed": 3, "search.ray_address": "auto"}))
    )
    sent = load_spec(tmp_path / "sent.yaml")
    assert sent.seed == 3 and sent.nodes["vision"].source == str(tiny / "clip")
    space = load_space(
        ROOT / "search_spaces/joint.yaml", sent, fixed=list_given_keys(tmp_path / "sent.yaml")
    )
    assert space == load_space(ROOT / "search_spaces/joint.yaml", load_spec(tiny / "spec.yaml"))


def test_a_number_without_a_point_is_a_number(tmp_path):
    text = (ROOT / "pipelines/clip_captioner.yaml").read_text()
    (tmp_path / "a.yaml").write_text(
        text.replace("minutes: 3.4", "learning_rate: 1e-4, minutes: 3.4")
    )
    assert load_spec(tmp_path / "a.yaml").distill.learning_rate == 1e-4


def test_all_that_is_wrong_with_a_spec_is_told_at_once(tiny, tmp_path):
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    text = text.replace("candidates: 2", "candidates: 0").replace(
        "  calibration: 16", "  calibrate: 16"
    )
    text = text.replace("distill: {steps: 4", "distill: {steps: four")
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "spec.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{tmp_path / 'spec.yaml'}:") for line in lines)
    assert any("must lie in 1 .. 64, got 0" in line for line in lines)
    assert any("unknown key 'calibrate'; did you mean 'calibration'?" in line for line in lines)
    wanted = "distill.steps: expected 'auto' or a whole number, got 'four'"
    assert any(wanted in line for line in lines)
    with pytest.raises(SpecError, match=r"must lie in 0 .. 1e[+]06, got -1"):
        load_spec(tiny / "spec.yaml", {"distill.steps": -1})


def test_targets_options_and_graph_are_told_of_at_once(tiny, tmp_path):
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    (tmp_path / "spec.yaml").write_text(text.replace("choose.best", "chose.best"))
    wrong = {"target": "0.5x", "prune.sensitivity": "estimated"}
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "spec.yaml", wrong)
    message = str(caught.value)
    assert len(message.splitlines()) == 3
    for place in ("--set target", "--set prune.sensitivity", "outputs.caption"):
        assert place in message


WRONG_VALUES = {
    "candidates: 2": "candidates: 0",
    "distill: {steps: 4": "distill: {steps: four",
    "choose.best, embedding": "chose.best, embedding",
    "target: 1.22x": "target: 0.2x",
    "kind: nearest": "kind: nearst",
}
"""Parts of the tiny spec, and what stands there instead."""


@pytest.mark.parametrize("last", [None, "kind: nearest"])
def test_values_graph_and_target_are_told_of_at_once(tiny, tmp_path, last):
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    changes = {key: value for key, value in WRONG_VALUES.items() if last or key != "kind: nearest"}
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "spec.yaml")
    message = str(caught.value)
    assert len(message.splitlines()) == len(changes), message
    for place in ("captioner.candidates", "distill.steps", "outputs.caption", "target"):
        assert f"{place}: " in message
    if last:
        assert "did you mean 'nearest'?" in message


def test_references_to_a_node_of_unknown_kind_are_let_pass(tiny, tmp_path):
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    (tmp_path / "spec.yaml").write_text(text.replace("kind: image_encoder", "kind: image_encodr"))
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "spec.yaml")
    assert len(str(caught.value).splitlines()) == 1
    assert "nodes.vision.kind: " in str(caught.value)


def test_all_that_is_wrong_with_a_space_is_told_at_once(tiny, tmp_path):
    path = tmp_path / "space.yaml"
    dimensions = "  nodes.*.prune.fnn: {low: 0, high: 1}\n  nodes.*.prune.ffn: {low: 0, high: 2}\n"
    path.write_text(f"name: wrong\ndimensions:\n{dimensions}")
    with pytest.raises(SpecError) as caught:
        load_space(path, load_spec(tiny / "spec.yaml"))
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["3", "4"]


def test_all_that_is_wrong_with_a_graph_is_told_at_once(tiny, tmp_path):
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    text = text.replace("vision.tokens", "vision.token").replace("choose.best", "chose.best")
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "spec.yaml")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(("old", "new"), OLD_KEYS.items())
def test_an_old_key_is_read_with_a_warning_that_names_the_new_one(tiny, old, new):
    section, key, *names = new.split(".")
    value = getattr(getattr(load_spec(tiny / "spec.yaml"), section), key)
    if names:
        value = 0.5  # the weight of a loss, which stands for itself
    with pytest.warns(FutureWarning, match=f"'{old}' is called '{new}' now"):
        spec = load_spec(tiny / "spec.yaml", {old: value})
    read = getattr(getattr(spec, section), key)
    assert (read[names[0]] if names else read) == value


def test_an_old_key_in_a_file_keeps_its_line(tiny, tmp_path):
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    (tmp_path / "spec.yaml").write_text(text.replace("validation_pairs: 16", "choosing: none"))
    place = r"spec.yaml:\d+: data.validation_pairs"
    with pytest.warns(FutureWarning), pytest.raises(SpecError, match=place):
        load_spec(tmp_path / "spec.yaml")


def test_every_key_of_the_schema_is_described():
    schema = describe_spec()
    definitions = schema["$defs"]
    missing = []
    for name, record in {"Spec": schema, **definitions}.items():
        for key, facts in record["properties"].items():
            target = definitions.get(facts.get("$ref", "").rpartition("/")[2], {})
            if not (facts.get("description") or target.get("description")):
                missing.append(f"{name}.{key}")
    assert missing == []


SHIPPED = [
    ("pipelines", "spec.schema.json", describe_spec),
    ("search_spaces", "space.schema.json", partial(describe_record, Space)),
]


def drop_examples(schema):
    """Leave out the names that other tests add kinds to in this process."""
    if isinstance(schema, dict):
        return {key: drop_examples(value) for key, value in schema.items() if key != "examples"}
    if isinstance(schema, list):
        return [drop_examples(value) for value in schema]
    return schema


@pytest.mark.parametrize(("folder", "name", "describe"), SHIPPED)
def test_shipped_files_name_the_schema_that_lets_an_editor_complete_them(folder, name, describe):
    written = json.loads((ROOT / folder / name).read_text())
    assert drop_examples(written) == drop_examples(describe()), (
        f"write it anew: mmcompress schema > {folder}/{name}"
    )
    for file in (ROOT / folder).glob("*.yaml"):
        assert file.read_text().startswith(f"# yaml-language-server: $schema={name}\n"), file


@pytest.fixture
def farthest(monkeypatch):
    """A kind of node of a plug-in, with an option of its own."""
    reach = NodeOption(about="Texts that are looked at.", default=2, minimum=1, maximum=9)
    entry = replace(NODE_KINDS.get("nearest"), options={"reach": reach})
    monkeypatch.setattr(NODE_KINDS, "_entries", dict(NODE_KINDS._entries))
    NODE_KINDS.add("farthest", entry, "the farthest of a few texts")


def test_a_kind_of_a_plugin_has_options_of_its_own(tiny, tmp_path, farthest):
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    text = text.replace("kind: nearest", "kind: farthest")
    path = tmp_path / "spec.yaml"
    path.write_text(text.replace("prior: 0.1", "reach: 3"))
    spec = load_spec(path)
    assert spec.nodes["choose"].options == {"reach": 3}
    assert spec.nodes["choose"].get_option("reach", 0) == 3
    assert build_record(Spec, to_plain(spec)) == spec
    assert to_plain(spec)["nodes"]["choose"]["reach"] == 3
    node_schema = describe_record(Spec)["$defs"]["Node"]["properties"]
    assert node_schema["reach"] == {
        "default": 2,
        "description": "Texts that are looked at.",
        "type": "integer",
        "minimum": 1,
        "maximum": 9,
    }
    path.write_text(text.replace("prior: 0.1", "\n    ".join(["raech: 3", "prune: {heads: 2}"])))
    line = text[: text.index("prior: 0.1")].count("\n") + 1
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    message = str(caught.value)
    assert f":{line}: nodes.choose.raech: unknown key 'raech'; did you mean 'reach'?" in message
    assert f":{line + 1}: nodes.choose.prune.heads: must lie in 0 .. 1, got 2" in message
    for value, problem in (
        ("10", "must lie in 1 .. 9, got 10"),
        ("true", "expected a whole number, got True"),
    ):
        path.write_text(text.replace("prior: 0.1", f"reach: {value}"))
        with pytest.raises(SpecError, match=f":{line}: nodes.choose.reach: {problem}"):
            load_spec(path)


def test_a_node_of_an_older_run_with_the_defaults_of_other_kinds_is_read(tiny):
    """Every node had the options of all kinds once."""
    spec = load_spec(tiny / "spec.yaml")
    plain = to_plain(spec)
    plain["nodes"]["choose"] |= {"candidates": 1, "prompt": "", "texts": ""}
    assert build_record(Spec, plain) == spec
    plain["nodes"]["choose"]["candidates"] = 2
    with pytest.raises(InvalidValue, match=r"nodes.choose.candidates: a nearest has no candidates"):
        build_record(Spec, plain)


def test_options_beside_an_unknown_kind_are_not_wrong(tiny, tmp_path):
    with pytest.raises(SpecError) as caught:
        load_spec(edited(tiny, tmp_path, "kind: nearest", "kind: nearst"))
    assert "unknown kind of node 'nearst'" in str(caught.value)
    assert "prior" not in str(caught.value)


def test_metrics_that_nobody_wrote_are_those_that_fit(tmp_path):
    """A dual encoder writes no captions: the default must not ask for them."""
    text = (ROOT / "pipelines/retrieval.yaml").read_text()
    without = re.sub(r"^metrics:.*\n", "", text, flags=re.M)
    assert without != text or "metrics" not in text
    (tmp_path / "spec.yaml").write_text(without)
    spec = load_spec(tmp_path / "spec.yaml")
    assert [metric.kind for metric in spec.metrics] == ["retrieval"]


TEMPLATES = [entry.stem for entry in sorted((ROOT / "pipelines").glob("*.yaml"))]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_editor_finds_no_fault_in_a_shipped_spec(name):
    """Read as YAML 1.1 and checked by the published schema, as an editor does it."""
    schema = json.loads((ROOT / "pipelines/spec.schema.json").read_text())
    spec = yaml.safe_load((ROOT / f"pipelines/{name}.yaml").read_text())
    faults = [fault.message for fault in Draft202012Validator(schema).iter_errors(spec)]
    assert faults == []
    spec["metrics"] = [3]
    assert list(Draft202012Validator(schema).iter_errors(spec))
