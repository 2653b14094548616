"""YAML as people write it: merge keys and anchors are followed, and long or odd values stay readable in messages."""

from __future__ import annotations

import pytest
import yaml

from mmcompress.errors import ModelError, SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.models.sources import locate_source
from mmcompress.registry import METRICS
from mmcompress.spec.loader import YamlSource

MERGED = """\
defaults: &defaults {kind: text_decoder, candidates: 4, prune: {heads: 0.5}}
other: &other {candidates: 5, prompt: "a cat"}
single:
  candidates: 7
  <<: *defaults
several:
  <<: [*other, *defaults]
  max_tokens: 9
nested: {<<: {<<: *other, kind: lookup}}
alias: *defaults
list: [&one 1, *one]
"<<": a text
"""


def test_merge_keys_and_anchors_are_followed_as_the_yaml_library_does(tmp_path):
    (tmp_path / "a.yaml").write_text(MERGED)
    source = YamlSource(tmp_path / "a.yaml")
    expected = yaml.safe_load(MERGED)
    # of several mappings the earlier one counts (yaml.org/type/merge.html); PyYAML 6.0.4 takes either
    expected["several"]["candidates"] = 5
    assert source.data == expected
    assert source.data["single"] == {
        "kind": "text_decoder",
        "candidates": 7,
        "prune": {"heads": 0.5},
    }
    # an error of a value that was taken over names the line where it stands
    assert source.lines["single", "candidates"] == 4
    assert source.lines["single", "prune", "heads"] == 1
    assert source.lines["several", "prompt"] == 2
    assert source.lines["several", "max_tokens"] == 8


def test_a_spec_may_share_options_of_its_nodes(tiny, tmp_path):
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    head, _, tail = text.partition(f"source: {tiny}/clip\n")
    tail = tail.replace(f"source: {tiny}/clip\n", "<<: *tower\n", 1)
    text = head + f"<<: &tower {{source: {tiny}/clip}}\n" + tail
    (tmp_path / "spec.yaml").write_text(text)
    spec = load_spec(tmp_path / "spec.yaml")
    assert spec.nodes["text"].source == spec.nodes["vision"].source == f"{tiny}/clip"


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {<<: 3}", r"a.yaml:1: '<<' takes a mapping, or a list of mappings"),
        ("a: 1\nb: {<<: [1]}", r"a.yaml:2: '<<' takes a mapping"),
        ("a: &a {b: *a}", r"a.yaml:1: an anchor stands inside itself"),
        ("a: &a [*a]", r"a.yaml:1: an anchor stands inside itself"),
        ("a: &a {<<: *a}", r"a.yaml:1: an anchor stands inside itself"),
        ("a: *b", r"a.yaml:1: not valid YAML: found undefined alias"),
        (BOMB, r"more than 100,000 values"),
        pytest.param("a: " + "[" * 5000, r"a.yaml: nested too deeply", marks=pytest.mark.slow),
        ("? [1, 2]\n: 3", r"a.yaml:1: a key must be a text"),
        ("a: 2024-13-45", r"a.yaml:1: 2024-13-45: month must be in 1..12"),
        ("a: !!int b", r"a.yaml:1: b: invalid literal"),
        ("a: !!python/object:os.system {}", r"a.yaml:1: "),
    ],
)
def test_yaml_that_can_not_be_followed_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    if "python" in text:
        # a mapping stays a mapping: no tag makes an object of it
        assert YamlSource(tmp_path / "a.yaml").data == {"a": {}}
        return
    with pytest.raises(SpecError, match=message):
        YamlSource(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("3.5", r"plugins: expected a list of modules, such as \[my.module\]; got 3.5"),
        ("my.module", r"plugins: expected a list of modules, .*; got 'my.module'"),
        ("{a: b}", r"plugins: expected a list of modules"),
        ("[3.5]", r"plugins.0: expected the name of a module, got 3.5"),
        ("['.mine']", r"plugins.0: expected the name of a module, got '.mine'"),
        ("['']", r"plugins.0: expected the name of a module, got ''"),
        ("[broken_plugin]", r"can't import 'broken_plugin': ZeroDivisionError"),
        ("[" + "a" * 5000 + "]", r"can't import 'a{50}…a{50} \(5,000 letters\)'"),
    ],
)
def test_plugins_that_can_not_be_imported_are_told(tiny, tmp_path, monkeypatch, value, message):
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    (tmp_path / "spec.yaml").write_text(text + f"plugins: {value}\n")
    with pytest.raises(SpecError, match=message) as caught:
        load_spec(tmp_path / "spec.yaml")
    assert "spec.yaml:" in str(caught.value)


LONG = "n" * 5000


@pytest.mark.parametrize(
    "override",
    [
        {"nodes.vision.kind": LONG},
        {"nodes.vision.precision": LONG},
        {"data.kind": LONG},
        {"data.labels": LONG},
        {"data.batch": LONG},
        {f"data.{LONG}": 1},
        {"prune.importance": f"{LONG} + fisher"},
        {"prune.importance": f"{LONG} * fisher"},
        {"metrics": [LONG]},
        {"metrics": [{"kind": "agreement", "of": LONG}]},
        {"search.sampler": LONG},
        {"outputs.caption": LONG},
        {"nodes.captioner.inputs.context": LONG},
        {f"nodes.captioner.inputs.{LONG}": "vision.tokens"},
        {f"limits.node_ms.{LONG}": 3.0},
        {"target": LONG},
        {"name": LONG, "target": "x"},
    ],
    ids=lambda override: next(iter(override)).replace(LONG, "LONG"),
)
def test_a_value_of_5000_letters_is_cut_in_the_message(tiny, override):
    with pytest.raises(SpecError) as caught:
        load_spec(tiny / "spec.yaml", override)
    lines = str(caught.value).splitlines()
    # a message may list all known names, but repeats no long text
    assert max(len(line) for line in lines) < 1200, caught.value


def test_an_unknown_name_of_5000_letters_is_cut():
    assert "(5,000 letters)" in METRICS.find_problem(LONG)
    with pytest.raises(KeyError) as caught:
        METRICS.get(LONG)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["a/b", "../../out", "a\\b", " "])
def test_a_name_that_can_be_no_folder_is_refused(tiny, name):
    with pytest.raises(SpecError, match=r"name: .*can't be part of a folder's name"):
        load_spec(tiny / "spec.yaml", {"name": name})


def test_a_pipeline_that_gives_nothing_is_refused(tiny, tmp_path):
    text = (tiny / "spec.yaml").read_text()
    given = "outputs: {caption: choose.best, embedding: vision.embedding}"
    assert given in text
    (tmp_path / "s.yaml").write_text(text.replace(given, "outputs: {}"))
    with pytest.raises(SpecError, match=r"s\.yaml:\d+: outputs: name at least one value .*known:"):
        load_spec(tmp_path / "s.yaml")


def test_a_home_that_is_not_known_here_is_a_missing_folder(tiny):
    spec = load_spec(tiny / "spec.yaml", {"nodes.vision.source": "~nobody-of-that-name/clip"})
    with pytest.raises(ModelError, match=r"~nobody-of-that-name/clip.*no such folder"):
        locate_source(spec.nodes["vision"].source)
