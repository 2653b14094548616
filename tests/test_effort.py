"""Levels of effort: one word sets trials, pairs, steps, minutes and parts; single settings win."""

from typing import get_args, get_type_hints

import pytest
import yaml

from mmcompress.graph.load_spec import load_document, load_spec
from mmcompress.spec.effort import CHANGES, SECTIONS, apply_effort
from mmcompress.spec.schema import Spec


@pytest.fixture()
def write_spec(tiny, tmp_path):
    """Write the tiny spec with sections changed; returns its path."""

    def write(**sections):
        data = yaml.safe_load((tiny / "spec.yaml").read_text())
        for name, section in sections.items():
            data[name] = {**data.get(name, {}), **section} if isinstance(section, dict) else section
        path = tiny / f"effort-{tmp_path.name}.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


def test_every_level_of_the_schema_has_its_changes():
    levels = get_args(get_type_hints(Spec)["effort"])
    assert set(levels) == set(CHANGES)
    for changes in CHANGES.values():
        for dotted in changes:
            section, key = dotted.split(".")
            assert hasattr(SECTIONS[section], key), dotted


def test_an_option_scales_what_the_file_says(write_spec):
    path = write_spec(
        search={"trials": 40, "level_switches": 40, "short_finetunings": 5},
        distill={"steps": 2000, "minutes": 8.0},
    )
    quick = load_spec(path, {"effort": "quick"})
    assert (quick.search.trials, quick.search.level_switches) == (20, 10)
    assert (quick.search.short_finetunings, quick.search.linearization_rounds) == (2, 1)
    assert (quick.distill.steps, quick.distill.minutes) == (500, 1.0)
    assert quick.measure.max_parts == 2
    best = load_spec(path, {"effort": "best"})
    assert (best.search.trials, best.distill.steps, best.distill.minutes) == (80, "auto", 90.0)
    assert load_spec(path, {"effort": "normal"}).search == load_spec(path).search


def test_a_single_setting_beside_the_level_wins(write_spec):
    path = write_spec(search={"trials": 40, "level_switches": 40})
    overrides = {"effort": "quick", "search.trials": 33, "distill": {"minutes": 7.0}}
    spec = load_spec(path, overrides)
    assert (spec.search.trials, spec.search.level_switches, spec.distill.minutes) == (33, 10, 7.0)
    with pytest.warns(FutureWarning, match="level_switches"):
        spec = load_spec(path, {"effort": "quick", "search.mutations": 31})
    assert spec.search.level_switches == 31


def test_in_a_file_its_own_values_win(write_spec):
    spec = load_spec(write_spec(effort="quick", search={"trials": 40}))
    assert spec.search.trials == 40
    assert spec.search.max_artifacts == 1


def test_small_values_do_not_grow(write_spec):
    spec = load_spec(write_spec(search={"trials": 2}), {"effort": "quick"})
    assert spec.search.trials == 2


def test_what_a_cluster_is_sent_means_the_same_there(write_spec, tmp_path):
    path = write_spec(search={"trials": 40})
    document = load_document(path, {"effort": "quick"})
    sent = tmp_path / "sent.yaml"
    sent.write_text(yaml.safe_dump(document))
    assert load_spec(sent) == load_spec(path, {"effort": "quick"})


def test_a_wrong_value_is_still_told_with_its_line(write_spec):
    from mmcompress.errors import SpecError

    path = write_spec(search={"trials": "many"}, effort="fast")
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    message = str(caught.value)
    assert "trials" in message and "effort" in message and "quick" in message
    with pytest.raises(SpecError, match="trials"):
        load_spec(path, {"effort": "quick"})


def test_minutes_that_a_file_writes_as_a_whole_number_stay_minutes():
    for minutes in (1, 2, 4, 5):
        changed = apply_effort({"effort": "quick", "distill": {}}, {"effort": "quick"})
        assert changed["distill"]["minutes"] > 0
        data = {"effort": "quick", "distill": {"minutes": minutes}}
        scaled = apply_effort(data, {"effort": "quick"})["distill"]["minutes"]
        assert scaled == pytest.approx(max(minutes / 8, min(0.5, minutes)))
