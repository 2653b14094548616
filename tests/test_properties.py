"""Properties that hold for every input: repair, split of the budget, beam search, figures, records.

Each property is held against an oracle of its own: an enumeration, or a definition written out here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import random
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any

import numpy as np
import pytest
import yaml
from conftest import SPEC
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from mmcompress.graph.blocks import Block, Writer, count_units_after, cut_by_share
from mmcompress.graph.load_spec import load_spec
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.device_table import DeviceTable, TableRow
from mmcompress.measure.cost_model.microbenchmarks import TableKey
from mmcompress.measure.cost_model.predictor import DeployedBlock, LinearFit, Predictor
from mmcompress.results import claims, records
from mmcompress.results.records import Trial
from mmcompress.runtime.beam_search import (
    MASKED_SCORE,
    NO_TOKEN,
    BeamMove,
    Generation,
    ScoredSequence,
    beam_search,
    count_repeated_tail,
)
from mmcompress.runtime.token_scores import TokenScores
from mmcompress.search.allocation import (
    allocate_by_knapsack,
    allocate_by_rank,
    allocate_uniformly,
)
from mmcompress.search.bisection import bisect_share
from mmcompress.search.knapsack import (
    BUDGET_BINS,
    choose_options_at_total,
    choose_options_within_budget,
)
from mmcompress.search.neighbors import MIN_BUDGET_USE, switch_levels
from mmcompress.search.problem import (
    LossIncrease,
    SearchProblem,
    find_best_trial,
    scale_to_budget,
    to_overrides,
    to_search_point,
)
from mmcompress.search.repair import (
    cut_to_budget,
    enforce_protection,
    grow_to_budget,
    restore_dropped,
    trade_for_precision,
)
from mmcompress.search.sensitivity.curves import SensitivityCurve, SensitivityTable
from mmcompress.search.split_budget import split_budget
from mmcompress.search.split_by_knapsack import SplitInputs, split_by_knapsack
from mmcompress.spec.overrides import OLD_KEYS, OLD_VALUES, apply_overrides
from mmcompress.spec.schema import Node, Spec
from mmcompress.spec.space import Dimension, Space
from mmcompress.stats import (
    PerSampleScores,
    SplitScores,
    decide_claim,
    estimate_paired_difference,
    estimate_quality,
    summarize_latency,
)
from mmcompress.storage import build_record, read_record, to_plain, write_record

SETTINGS = settings()
"""`conftest.py` decides how many examples are drawn: fewer in the fast suite."""
FEW = settings(max_examples=SETTINGS.max_examples // 2)

PRECISIONS = ("fp32", "int8", "int4")
ROUNDING_ERROR = 1e-9
"""Share of a figure: what sums may be off by."""


# --- problems of the search ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A random problem of the search, with the tables that its predictions and losses come from."""

    problem: SearchProblem
    sensitivity: SensitivityTable
    smallest: Candidate
    """Every block at its fewest units, every node in its quickest precision."""
    largest: Candidate
    """Every block at its most units, every node in its mildest precision."""

    @property
    def loss_increase(self) -> LossIncrease:
        return self.sensitivity.estimate_loss_increase

    def places(self) -> Iterator[tuple[str, Block]]:
        for node, blocks in self.problem.blocks.items():
            for block in blocks:
                yield node, block

    def choices(self, node: str, block: Block) -> tuple[int, ...]:
        return self.problem.unit_choices[node][block.name]


def make_block(name: str, *, kind: str, units: int, granularity: int, droppable: bool, width: int):
    return Block(
        name=name,
        kind=kind,
        reader=name,
        writers=(Writer(path=name, parts=1, width=width),),
        units=units,
        width=width,
        granularity=granularity,
        module=name,
        reads=("stream",),
        drop=((name, "plain"),) if droppable else (),
    )


seeds = st.integers(0, 2**32 - 1)
"""Seeds of what is drawn at once: drawn value by value, most problems would be next to nothing."""


def draw_blocks(rng: random.Random, *, most=3, most_units=48) -> tuple[Block, ...]:
    blocks = []
    for i in range(rng.randint(1, most)):
        units = rng.randint(1, most_units)
        block = make_block(
            f"{i}.block",
            kind=rng.choice(("ffn", "attention", "cross_attention")),
            units=units,
            granularity=rng.randint(1, min(units, 9)),
            droppable=rng.random() < 0.5,
            width=rng.randint(1, 4),
        )
        blocks.append(block)
    return tuple(blocks)


@st.composite
def blocks_of_a_node(draw, *, most=3, most_units=48) -> tuple[Block, ...]:
    return draw_blocks(random.Random(draw(seeds)), most=most, most_units=most_units)


def sizes_of(block: Block) -> list[int]:
    """Every size of a block, by its definition: whole steps from the top, and the fewest units."""
    fewest = 0 if block.drop else min(block.granularity, block.units)
    sizes = {fewest}
    for size in range(block.units, fewest, -block.granularity):
        sizes.add(size)
    return sorted(sizes)


@st.composite
def cases(draw, *, limited=True) -> Case:
    """A problem: `limited` ones bound dropped blocks and protect cross-modal blocks."""
    rng = random.Random(draw(seeds))
    names = ("a", "b")[: rng.randint(1, 2)]
    blocks = {name: draw_blocks(rng) for name in names}
    unit_choices: dict[str, dict[str, tuple[int, ...]]] = {}
    curves: dict[str, dict[str, SensitivityCurve]] = {}
    ms_per_unit: dict[tuple[str, str], float] = {}
    for name in names:
        unit_choices[name] = {}
        curves[name] = {}
        for block in blocks[name]:
            sizes = sizes_of(block)
            if rng.random() < 0.25:
                sizes = [rng.choice(sizes)]
            unit_choices[name][block.name] = tuple(sizes)
            ms_per_unit[name, block.name] = rng.uniform(0.01, 1.0)
            curves[name][block.name] = SensitivityCurve.from_points(
                {0: rng.uniform(2.0, 4.0), block.units // 2: rng.random(), block.units: 0.0}
                if block.units > 1
                else {0: rng.random(), block.units: 0.0}
            )
    factors = {"fp32": 1.0, "int8": 0.7, "int4": 0.5}
    rounding = {name: {"fp32": 0.0, "int8": rng.random(), "int4": 1.0} for name in names}
    precisions = {
        name: PRECISIONS[: rng.randint(1, 3)] if rng.random() < 0.7 else ("int8",) for name in names
    }

    def predict(candidate: Candidate) -> float:
        total_ms = 0.1
        for node, kept in candidate.kept_units.items():
            for block_name, units in kept.items():
                cost = ms_per_unit[node, block_name] * units
                total_ms += cost * factors[candidate.precision[node]]
        return total_ms

    smallest = Candidate(
        kept_units={
            n: {b: min(c) for b, c in choices.items()} for n, choices in unit_choices.items()
        },
        precision={name: precisions[name][-1] for name in names},
    )
    largest = Candidate(
        kept_units={
            n: {b: max(c) for b, c in choices.items()} for n, choices in unit_choices.items()
        },
        precision={name: precisions[name][0] for name in names},
    )
    cross_modal: dict[str, set[str]] = {name: set() for name in names}
    max_drops: dict[str, int] = {}
    input_readers: dict[str, set[str]] = {}
    protection = 0.0
    if limited:
        for name in names:
            fixed = [max(c) == 0 for c in unit_choices[name].values()]
            max_drops[name] = sum(fixed) + rng.randint(0, 1)
            readers = {b.name for b in blocks[name] if rng.random() < 0.5}
            if any(max(unit_choices[name][reader]) > 0 for reader in readers):
                input_readers[name] = readers
            cross_modal[name] = {b.name for b in blocks[name] if rng.random() < 0.5}
        protection = rng.choice((0.0, 1.0, 2.0, 3.0))
    low_ms = predict(smallest)
    high_ms = predict(largest)
    problem = SearchProblem(
        space=Space(name="none"),
        blocks=blocks,
        resolve=lambda overrides: largest,
        predict=predict,
        budget_ms=low_ms + draw(st.floats(-0.05, 1.05)) * (high_ms - low_ms),
        precisions=precisions,
        unit_choices=unit_choices,
        max_drops=max_drops,
        input_readers=input_readers,
        cross_modal=cross_modal,
        protection=protection,
    )
    if compute_excess(problem, largest) > ROUNDING_ERROR:
        # Cuts that the spec fixes come before the protection.
        problem = dataclasses.replace(problem, protection=0.0)
    sensitivity = SensitivityTable(curves=curves, rounding=rounding)
    return Case(problem=problem, sensitivity=sensitivity, smallest=smallest, largest=largest)


@st.composite
def cases_with_a_candidate(draw, **options) -> tuple[Case, Candidate]:
    case = draw(cases(**options))
    rng = random.Random(draw(seeds))
    kept: dict[str, dict[str, int]] = {}
    for node, block in case.places():
        units = rng.choice(case.choices(node, block))
        kept.setdefault(node, {})[block.name] = units
    precision = {}
    for node, choices in case.problem.precisions.items():
        precision[node] = rng.choice(choices)
    return case, Candidate(kept_units=kept, precision=precision)


def compute_excess(problem: SearchProblem, candidate: Candidate) -> float:
    """Share cut beyond the protection: weights cut over all weights, of each side."""
    removed = {True: 0, False: 0}
    whole = {True: 0, False: 0}
    for node, blocks in problem.blocks.items():
        for block in blocks:
            side = block.name in problem.cross_modal[node]
            weights = block.width + sum(writer.parts * writer.width for writer in block.writers)
            whole[side] += weights * block.units
            removed[side] += weights * (block.units - candidate.kept_units[node][block.name])
    if not whole[True] or not whole[False]:
        return 0.0
    return problem.protection * removed[True] / whole[True] - removed[False] / whole[False]


def count_dropped(candidate: Candidate, node: str) -> int:
    return list(candidate.kept_units[node].values()).count(0)


def is_within_limits(problem: SearchProblem, candidate: Candidate) -> bool:
    for node, most in problem.max_drops.items():
        if count_dropped(candidate, node) > most:
            return False
    for node, readers in problem.input_readers.items():
        if not any(candidate.kept_units[node][name] for name in readers):
            return False
    return compute_excess(problem, candidate) <= 2e-9


def assert_made_of_choices(case: Case, candidate: Candidate) -> None:
    """Every size is one that the block may have; what the spec fixes has one."""
    for node, block in case.places():
        assert candidate.kept_units[node][block.name] in case.choices(node, block)
    for node, precision in candidate.precision.items():
        assert precision in case.problem.precisions[node]


def assert_only_smaller(small: Candidate, large: Candidate) -> None:
    for node, kept in small.kept_units.items():
        for name, units in kept.items():
            assert units <= large.kept_units[node][name]


def with_units(candidate: Candidate, node: str, *, block: str, units: int) -> Candidate:
    kept = {name: dict(node_units) for name, node_units in candidate.kept_units.items()}
    kept[node][block] = units
    return Candidate(kept_units=kept, precision=dict(candidate.precision))


# --- repair -------------------------------------------------------------------------------------


@SETTINGS
@given(cases_with_a_candidate(limited=False))
def test_a_cut_reaches_the_budget_whenever_the_smallest_pipeline_does(drawn):
    case, start = drawn
    problem = case.problem
    cut = cut_to_budget(problem, start, loss_increase=case.loss_increase)
    smallest = Candidate(kept_units=case.smallest.kept_units, precision=start.precision)
    fits = problem.predict(smallest) <= problem.budget_ms
    assert (cut is not None) == fits
    if cut is not None:
        assert problem.predict(cut) <= problem.budget_ms


@SETTINGS
@given(cases_with_a_candidate())
def test_a_cut_keeps_every_limit_and_is_made_once(drawn):
    case, start = drawn
    problem = case.problem
    cut = cut_to_budget(problem, start, loss_increase=case.loss_increase)
    if problem.predict(start) <= problem.budget_ms:
        assert cut == start
    if cut is None:
        return
    assert problem.predict(cut) <= problem.budget_ms
    assert_made_of_choices(case, cut)
    assert_only_smaller(cut, start)
    assert cut.precision == start.precision
    if cut != start or is_within_limits(problem, start):
        assert is_within_limits(problem, cut)
    assert cut_to_budget(problem, cut, loss_increase=case.loss_increase) == cut


@SETTINGS
@given(cases_with_a_candidate())
def test_dropped_blocks_come_back_where_their_drop_hurts_most(drawn):
    case, start = drawn
    problem = dataclasses.replace(case.problem, protection=0.0, input_readers={})
    for begun in (start, case.smallest):
        check_dropped_blocks(case, begun, problem=problem)


@SETTINGS
@given(cases_with_a_candidate())
def test_one_of_the_blocks_that_read_the_input_comes_back(drawn):
    case, start = drawn
    # No other limit brings blocks back.
    problem = dataclasses.replace(case.problem, protection=0.0, max_drops={})
    for begun in (start, case.smallest):
        restored = restore_dropped(problem, begun, loss_increase=case.loss_increase)
        assert is_within_limits(problem, restored)
        back = []
        for node, block in case.places():
            before = begun.kept_units[node][block.name]
            after = restored.kept_units[node][block.name]
            if before != after:
                assert before == 0 and block.name in problem.input_readers[node]
                back.append(node)
        # At most one a node, and only where none was left.
        assert len(back) == len(set(back))
        for node in back:
            assert problem.lost_its_input(begun, node)


def check_dropped_blocks(case: Case, start: Candidate, *, problem: SearchProblem) -> None:
    restored = restore_dropped(problem, start, loss_increase=case.loss_increase)
    assert_made_of_choices(case, restored)
    for node, most in problem.max_drops.items():
        gains = {}
        for block in problem.blocks[node]:
            before = start.kept_units[node][block.name]
            after = restored.kept_units[node][block.name]
            positive = [units for units in case.choices(node, block) if units]
            if before:
                assert after == before
                continue
            assert after in (0, min(positive, default=0))
            if positive:
                curve = case.sensitivity.curves[node][block.name]
                gain = curve.loss_increases[0] - np.interp(
                    positive[0], curve.kept_units, curve.loss_increases
                )
                gains[block.name] = (gain, after > 0)
        back = [gain for gain, is_back in gains.values() if is_back]
        gone = [gain for gain, is_back in gains.values() if not is_back]
        assert min(back, default=math.inf) >= max(gone, default=-math.inf) - ROUNDING_ERROR
        assert len(back) == min(max(count_dropped(start, node) - most, 0), len(gains))
    assert restore_dropped(problem, restored, loss_increase=case.loss_increase) == restored


@SETTINGS
@given(cases_with_a_candidate())
def test_the_protection_holds_after_repair_and_costs_cross_modal_cuts_alone(drawn):
    case, start = drawn
    problem = case.problem
    repaired = enforce_protection(problem, start, loss_increase=case.loss_increase)
    assert compute_excess(problem, repaired) <= 2e-9 or all(
        repaired.kept_units[node][block.name] == max(case.choices(node, block))
        for node, block in case.places()
        if block.name in problem.cross_modal[node]
    )
    assert_made_of_choices(case, repaired)
    assert_only_smaller(start, repaired)
    for node, block in case.places():
        if block.name not in problem.cross_modal[node]:
            assert repaired.kept_units[node][block.name] == start.kept_units[node][block.name]
    if compute_excess(problem, start) <= 0:
        assert repaired == start
    assert enforce_protection(problem, repaired, loss_increase=case.loss_increase) == repaired


@SETTINGS
@given(cases_with_a_candidate())
def test_a_repaired_candidate_keeps_both_limits_wherever_the_space_does(drawn):
    case, start = drawn
    repaired = restore_dropped(case.problem, start, loss_increase=case.loss_increase)
    for node, most in case.problem.max_drops.items():
        assert count_dropped(repaired, node) <= most
    again = restore_dropped(case.problem, repaired, loss_increase=case.loss_increase)
    assert again == repaired
    # The largest pipeline shows which protection can be reached with these unimodal cuts.
    fullest = repaired
    for node, block in case.places():
        if block.name in case.problem.cross_modal[node]:
            most_units = max(case.choices(node, block))
            fullest = with_units(fullest, node, block=block.name, units=most_units)
    if compute_excess(case.problem, fullest) <= 0:
        assert is_within_limits(case.problem, repaired)


def list_steps_up(case: Case, candidate: Candidate) -> Iterator[Candidate]:
    """Every candidate that is one step better: the next size of a block, or a milder precision."""
    for node, block in case.places():
        kept = candidate.kept_units[node][block.name]
        larger = [units for units in case.choices(node, block) if units > kept]
        if larger:
            yield with_units(candidate, node, block=block.name, units=larger[0])
    for node, precisions in case.problem.precisions.items():
        losses = case.sensitivity.rounding[node]
        for precision in precisions:
            if losses[precision] < losses[candidate.precision[node]]:
                changed = {**candidate.precision, node: precision}
                yield Candidate(kept_units=candidate.kept_units, precision=changed)


@SETTINGS
@given(cases_with_a_candidate())
def test_growth_uses_the_budget_up_and_keeps_every_limit(drawn):
    case, start = drawn
    problem = case.problem
    begun = cut_to_budget(problem, start, loss_increase=case.loss_increase)
    if begun is None or not is_within_limits(problem, begun):
        return
    rounding = case.sensitivity.rounding
    grown = grow_to_budget(problem, begun, loss_increase=case.loss_increase, rounding=rounding)
    assert problem.predict(grown) <= problem.budget_ms
    assert is_within_limits(problem, grown)
    assert_made_of_choices(case, grown)
    assert_only_smaller(begun, grown)
    for node, precision in grown.precision.items():
        assert rounding[node][precision] <= rounding[node][begun.precision[node]]
    for better in list_steps_up(case, grown):
        # A step that fits by rounding alone may be left.
        fits = problem.predict(better) <= problem.budget_ms - 1e-9
        assert not (fits and compute_excess(problem, better) <= 0 and problem.is_allowed(better))
    again = grow_to_budget(problem, grown, loss_increase=case.loss_increase, rounding=rounding)
    assert again == grown


@SETTINGS
@given(cases_with_a_candidate())
def test_a_trade_fits_the_budget_and_rounds_one_node_less(drawn):
    case, start = drawn
    problem = case.problem
    if not is_within_limits(problem, start):
        return
    rounding = case.sensitivity.rounding
    traded = trade_for_precision(
        problem, start, loss_increase=case.loss_increase, rounding=rounding
    )
    possible = 0
    for node, precisions in problem.precisions.items():
        now = rounding[node][start.precision[node]]
        possible += sum(rounding[node][precision] < now for precision in precisions)
    assert len(traded) <= possible
    for candidate in traded:
        assert problem.predict(candidate) <= problem.budget_ms
        assert is_within_limits(problem, candidate)
        assert_made_of_choices(case, candidate)
        losses = [
            (rounding[n][p], rounding[n][start.precision[n]])
            for n, p in candidate.precision.items()
        ]
        assert all(after <= before for after, before in losses)
        assert any(after < before for after, before in losses)


# --- neighbours and the ways between structures and specs ---------------------------------------


def make_trial(candidate: Candidate, *, latency_ms: float = 1.0, loss: float = 0.0) -> Trial:
    return Trial(
        number=0,
        origin="sampler",
        overrides={},
        candidate=candidate,
        latency_ms=latency_ms,
        loss=loss,
        quality={},
        evaluation_seconds=0.0,
    )


@settings(SETTINGS, max_examples=3 * SETTINGS.max_examples // 10)
@given(cases_with_a_candidate(), seeds)
def test_a_neighbour_is_new_valid_and_near_the_budget(drawn, seed):
    case, start = drawn
    problem = case.problem
    seen = {start.make_key()}
    for _ in range(3):
        rng = random.Random(seed)
        neighbour = switch_levels(problem, make_trial(start), seen_keys=seen, rng=rng)
        twin = switch_levels(problem, make_trial(start), seen_keys=seen, rng=random.Random(seed))
        assert neighbour == twin
        if neighbour is None:
            return
        assert neighbour.make_key() not in seen and neighbour != start
        assert_made_of_choices(case, neighbour)
        assert is_within_limits(problem, neighbour)
        share = problem.predict(neighbour) / problem.budget_ms
        assert MIN_BUDGET_USE - ROUNDING_ERROR <= share <= 1 + ROUNDING_ERROR
        seen.add(neighbour.make_key())


def test_a_neighbour_keeps_the_precision_of_a_node_that_has_no_choice():
    block = make_block("0.ffn", kind="ffn", units=8, granularity=1, droppable=False, width=1)
    problem = SearchProblem(
        space=Space(name="none"),
        blocks={"a": (block,)},
        resolve=lambda overrides: Candidate(kept_units={}, precision={}),
        predict=lambda candidate: 1.0,
        budget_ms=1.0,
        unit_choices={"a": {"0.ffn": tuple(range(1, 9))}},
    )
    start = Candidate(kept_units={"a": {"0.ffn": 4}}, precision={"a": "int8"})
    for seed in range(50):
        rng = random.Random(seed)
        neighbour = switch_levels(problem, make_trial(start), seen_keys={start.make_key()}, rng=rng)
        assert neighbour is None or neighbour.precision == {"a": "int8"}


@SETTINGS
@given(blocks_of_a_node(), st.randoms(use_true_random=False))
def test_overrides_give_back_the_structure_they_were_made_of(blocks, rng):
    kept = {block.name: rng.choice(sizes_of(block)) for block in blocks}
    problem = SearchProblem(
        space=Space(name="none"),
        blocks={"a": blocks},
        resolve=lambda overrides: Candidate(kept_units={}, precision={}),
        predict=lambda candidate: 1.0,
        budget_ms=1.0,
    )
    overrides = to_overrides(problem, Candidate(kept_units={"a": kept}, precision={"a": "int8"}))
    assert overrides["nodes.a.precision"] == "int8"
    for block in blocks:
        share = overrides[f"nodes.a.prune.blocks.{block.name}"]
        assert cut_by_share(block, float(share)) == kept[block.name]


@SETTINGS
@given(blocks_of_a_node(most=1))
def test_steps_lead_through_the_sizes_of_a_block(blocks):
    (block,) = blocks
    sizes = {int(count_units_after(block, steps)) for steps in range(block.units + 2)}
    assert sorted(sizes) == sizes_of(block)


@st.composite
def ranges(draw, *, most=1.0) -> Dimension:
    """A range of a search space, with or without steps."""
    low = draw(st.floats(0, most * 0.5))
    high = draw(st.floats(low, most))
    return Dimension(low=low, high=high, step=draw(st.none() | st.floats(0.01, 0.3)))


@SETTINGS
@given(blocks_of_a_node(), ranges(), ranges(), st.integers(0, 3), seeds)
def test_a_point_of_a_structure_lies_in_the_space(blocks, heads, ffn, most_drops, seed):
    rng = random.Random(seed)
    kept = {block.name: rng.choice(sizes_of(block)) for block in blocks}
    precision = rng.choice(PRECISIONS)
    dimensions = {
        "nodes.a.prune.heads": heads,
        "nodes.a.prune.ffn": ffn,
        "nodes.a.prune.drop": Dimension(low=0, high=most_drops, step=1),
        "nodes.a.precision": Dimension(choices=("fp32", "int8")),
    }
    problem = SearchProblem(
        space=Space(name="some", dimensions=dimensions),
        blocks={"a": blocks},
        resolve=lambda overrides: Candidate(kept_units={}, precision={}),
        predict=lambda candidate: 1.0,
        budget_ms=1.0,
    )
    point = to_search_point(problem, Candidate(kept_units={"a": kept}, precision={"a": precision}))
    assert list(point) == list(dimensions)
    assert point["nodes.a.precision"] == (precision if precision != "int4" else "fp32")
    assert point["nodes.a.prune.drop"] == min(list(kept.values()).count(0), most_drops)
    for key in ("heads", "ffn"):
        dimension = dimensions[f"nodes.a.prune.{key}"]
        value = point[f"nodes.a.prune.{key}"]
        assert dimension.low <= value <= dimension.high
        group = [block for block in blocks if (block.kind == "ffn") == (key == "ffn")]
        whole = sum(block.units for block in group)
        cut = 1 - sum(kept[block.name] for block in group) / whole if whole else 1.0
        nearest = min(max(cut, dimension.low), dimension.high)
        if dimension.step is None:
            assert value == pytest.approx(nearest)
        else:
            steps = (value - dimension.low) / dimension.step
            assert steps == pytest.approx(round(steps), abs=1e-6)
            assert abs(value - nearest) <= dimension.step + 1e-9


@SETTINGS
@given(ranges(), ranges(), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0, 1))
def test_a_proposal_is_scaled_to_the_largest_pipeline_within_the_budget(
    one, other, one_ratio, other_ratio, place
):
    paths = ("nodes.a.prune.ffn", "nodes.b.prune.ffn")
    bounds = dict(zip(paths, (one, other), strict=True))

    def resolve(overrides) -> Candidate:
        kept = {path.split(".")[1]: {"0": round(1e6 * (1 - overrides[path]))} for path in paths}
        return Candidate(kept_units=kept, precision={})

    def predict(candidate: Candidate) -> float:
        return sum(kept["0"] for kept in candidate.kept_units.values()) / 1e6

    def scale(factor: float) -> dict[str, float]:
        ratios = (factor * one_ratio, factor * other_ratio)
        scaled = {}
        for path, ratio in zip(paths, ratios, strict=True):
            scaled[path] = round(min(max(ratio, bounds[path].low), bounds[path].high), 4)
        return scaled

    smallest_ms = predict(resolve(scale(8.0)))
    largest_ms = predict(resolve(scale(0.0)))
    problem = SearchProblem(
        space=Space(name="some", dimensions=bounds),
        blocks={},
        resolve=resolve,
        predict=predict,
        budget_ms=(smallest_ms + place * (largest_ms - smallest_ms)) * 1.01,
    )
    start = {**dict(zip(paths, (one_ratio, other_ratio), strict=True)), "nodes.a.precision": "int8"}
    overrides, candidate = scale_to_budget(problem, start)
    assert overrides["nodes.a.precision"] == "int8"
    assert candidate == resolve(overrides)
    assert predict(candidate) <= problem.budget_ms
    # No factor that is clearly smaller would do: 8 / 2^12 is how finely factors are told apart.
    for factor in np.arange(0.0, 8.0, 0.05):
        cut_less = scale(factor)
        if predict(resolve(cut_less)) <= 0.995 * problem.budget_ms:
            assert predict(candidate) >= predict(resolve(cut_less)) - 0.01
            break


@SETTINGS
@given(st.lists(st.tuples(st.floats(0, 9), st.floats(-9, 9))), st.floats(0, 9))
def test_the_best_trial_is_the_least_loss_within_the_budget(pairs, budget_ms):
    candidate = Candidate(kept_units={}, precision={})
    trials = [make_trial(candidate, latency_ms=ms, loss=loss) for ms, loss in pairs]
    best = find_best_trial(trials, budget_ms)
    losses = [loss for ms, loss in pairs if ms <= budget_ms]
    assert (best.loss if best else None) == (min(losses) if losses else None)


# --- the split of the budget --------------------------------------------------------------------


@st.composite
def knapsacks(draw, *, most_size=30) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Groups of options: whole sizes and losses."""
    sizes = []
    losses = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 4))
        option_sizes = st.lists(st.integers(0, most_size), min_size=count, max_size=count)
        option_losses = st.lists(st.floats(0, 10), min_size=count, max_size=count)
        sizes.append(np.array(draw(option_sizes)))
        losses.append(np.array(draw(option_losses)))
    return sizes, losses


def enumerate_choices(sizes, losses) -> Iterator[tuple[float, float, tuple[int, ...]]]:
    """Every choice, with its size and its loss."""
    for choice in itertools.product(*[range(len(group)) for group in sizes]):
        size = sum(float(group[i]) for group, i in zip(sizes, choice, strict=True))
        loss = sum(float(group[i]) for group, i in zip(losses, choice, strict=True))
        yield size, loss, choice


def find_least_loss(sizes, losses, *, budget: float) -> float:
    fitting = [loss for size, loss, _ in enumerate_choices(sizes, losses) if size <= budget]
    return min(fitting, default=math.inf)


def measure_choice(sizes, losses, *, choice) -> tuple[float, float]:
    size = sum(float(group[i]) for group, i in zip(sizes, choice, strict=True))
    loss = sum(float(group[i]) for group, i in zip(losses, choice, strict=True))
    return size, loss


@SETTINGS
@given(knapsacks(), st.integers(1, 125))
def test_the_knapsack_is_the_best_of_all_choices_where_costs_are_whole_bins(drawn, budget):
    # A budget that divides the bins: every whole cost is a whole number of them.
    budget = min(d for d in (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 80, 100, 125) if d >= budget)
    sizes, losses = drawn
    choice = choose_options_within_budget(sizes, losses, budget=budget)
    least = find_least_loss(sizes, losses, budget=budget)
    assert (choice is None) == math.isinf(least)
    if choice is not None:
        size, loss = measure_choice(sizes, losses, choice=choice)
        assert size <= budget
        assert loss == pytest.approx(least, abs=1e-9)


@SETTINGS
@given(knapsacks(), st.floats(0.1, 100), st.floats(0.01, 3))
def test_the_knapsack_stays_within_its_budget_and_loses_a_bin_a_group_at_most(drawn, budget, unit):
    whole_sizes, losses = drawn
    sizes = [unit * group for group in whole_sizes]
    choice = choose_options_within_budget(sizes, losses, budget=budget)
    sure = find_least_loss(sizes, losses, budget=budget * (1 - len(sizes) / BUDGET_BINS))
    ideal = find_least_loss(sizes, losses, budget=budget * (1 + ROUNDING_ERROR))
    if choice is None:
        assert math.isinf(sure)
        return
    size, loss = measure_choice(sizes, losses, choice=choice)
    assert size <= budget * (1 + ROUNDING_ERROR)
    assert ideal - 1e-9 <= loss <= sure + 1e-9


@SETTINGS
@given(knapsacks(), st.floats(0.1, 100), st.floats(1.002, 3))
def test_a_larger_budget_never_loses_more(drawn, budget, factor):
    sizes, losses = drawn
    small = choose_options_within_budget(sizes, losses, budget=budget)
    large = choose_options_within_budget(sizes, losses, budget=budget * factor)
    if small is None:
        return
    assert large is not None
    small_loss = measure_choice(sizes, losses, choice=small)[1]
    assert measure_choice(sizes, losses, choice=large)[1] <= small_loss + 1e-9


@SETTINGS
@given(knapsacks(most_size=6), st.data())
def test_the_knapsack_is_the_best_of_all_choices_at_an_exact_total(drawn, data):
    sizes, losses = drawn
    loss_by_total: dict[int, float] = {}
    for size, loss, _ in enumerate_choices(sizes, losses):
        loss_by_total[int(size)] = min(loss, loss_by_total.get(int(size), math.inf))
    total = data.draw(st.sampled_from(sorted(loss_by_total)))
    choice = choose_options_at_total(sizes, losses, total=total)
    size, loss = measure_choice(sizes, losses, choice=choice)
    assert size == total
    assert loss == pytest.approx(loss_by_total[total], abs=1e-9)


@SETTINGS
@given(st.floats(0, 1), st.floats(-3, 3), st.floats(0.1, 5), st.integers(1, 20))
def test_bisection_encloses_the_smallest_share_that_is_enough(place, low, width, steps):
    high = low + width
    smallest = low + place * width
    calls = []

    def is_enough(share: float) -> bool:
        calls.append(share)
        return share >= smallest

    below, above = bisect_share(is_enough, low=low, high=high, steps=steps)
    assert len(calls) == steps
    assert above - below == pytest.approx(width / 2**steps)
    assert below <= smallest <= above


@dataclass(frozen=True, kw_only=True)
class SplitCase:
    """A problem that can be enumerated, with its predictor."""

    problem: SearchProblem
    sensitivity: SensitivityTable
    predictor: Predictor

    def list_candidates(self) -> Iterator[Candidate]:
        places = [(n, b.name) for n, blocks in self.problem.blocks.items() for b in blocks]
        sizes = [self.problem.unit_choices[node][block] for node, block in places]
        precisions = list(self.problem.precisions.values())
        for units in itertools.product(*sizes):
            kept: dict[str, dict[str, int]] = {node: {} for node in self.problem.blocks}
            for (node, block), size in zip(places, units, strict=True):
                kept[node][block] = size
            for choice in itertools.product(*precisions):
                yield Candidate(
                    kept_units=kept, precision=dict(zip(self.problem.blocks, choice, strict=True))
                )

    def compute_loss(self, candidate: Candidate) -> float:
        loss = 0.0
        for node, kept in candidate.kept_units.items():
            loss += self.sensitivity.rounding[node][candidate.precision[node]]
            for block, units in kept.items():
                curve = self.sensitivity.curves[node][block]
                loss += curve.loss_increases[curve.kept_units.index(units)]
        return loss

    def find_least(self, budget_ms: float) -> float:
        losses = []
        for candidate in self.list_candidates():
            if self.predictor(candidate) <= budget_ms:
                losses.append(self.compute_loss(candidate))
        return min(losses, default=math.inf)


@st.composite
def split_cases(draw, *, parallel=False, limited=False) -> SplitCase:
    rng = random.Random(draw(seeds))
    blocks: dict[str, tuple[Block, ...]] = {}
    rows = []
    deployed = {}
    unit_choices: dict[str, dict[str, tuple[int, ...]]] = {}
    curves: dict[str, dict[str, SensitivityCurve]] = {}
    for node in ("a", "b"):
        node_blocks = []
        node_deployed = []
        unit_choices[node] = {}
        curves[node] = {}
        for i in range(rng.randint(1, 2)):
            name = f"{i}.ffn"
            kind = rng.choice(("ffn", "attention"))
            block = make_block(name, kind=kind, units=64, granularity=16, droppable=True, width=1)
            node_blocks.append(block)
            key = TableKey(kind="ffn", width=len(rows) + 1, head=1, positions=1, keys=1, batch=1)
            slope = rng.uniform(0.002, 0.03)
            for precision, factor in (("fp32", 1.0), ("int8", 0.5)):
                ms = (16 * slope * factor, 64 * slope * factor)
                rows.append(TableRow(key=key, precision=precision, units=(16, 64), ms=ms))
            placed = DeployedBlock(name=name, units=64, granularity=16, key=key, calls=1.0)
            node_deployed.append(placed)
            sizes = sorted(rng.sample((0, 16, 32, 48, 64), rng.randint(1, 4)))
            unit_choices[node][name] = tuple(sizes)
            falling = sorted((rng.random() for _ in range(4)), reverse=True)
            points = dict(zip((0, 16, 32, 48, 64), (*falling, 0.0), strict=True))
            curves[node][name] = SensitivityCurve.from_points(points)
        blocks[node] = tuple(node_blocks)
        deployed[node] = tuple(node_deployed)
    fits = {}
    for node in blocks:
        line = LinearFit(base=rng.uniform(0.0, 0.3), scale=rng.uniform(0.5, 1.5))
        fits[node] = {"fp32": line, "int8": line}
    predictor = Predictor(
        table=DeviceTable(device="here", threads=1, rows=tuple(rows)),
        deployed=deployed,
        fits=fits,
        overhead_ms=rng.uniform(0.0, 0.2),
        correction=rng.uniform(0.8, 1.2),
        reads={"a": (), "b": ()} if parallel else {},
    )
    precisions = {node: rng.choice((("fp32",), ("fp32", "int8"))) for node in blocks}
    sensitivity = SensitivityTable(
        curves=curves, rounding={node: {"fp32": 0.0, "int8": rng.random() / 4} for node in blocks}
    )
    cross_modal: dict[str, tuple[str, ...]] = dict.fromkeys(blocks, ())
    max_drops: dict[str, int] = {}
    if limited:
        cross_modal["b"] = ("0.ffn",)
        for node, choices in unit_choices.items():
            fixed = [max(sizes) == 0 for sizes in choices.values()]
            max_drops[node] = sum(fixed)
    problem = SearchProblem(
        space=Space(name="none"),
        blocks=blocks,
        resolve=lambda overrides: Candidate(kept_units={}, precision={}),
        predict=predictor,
        budget_ms=draw(st.floats(0.2, 4.0)),
        precisions=precisions,
        unit_choices=unit_choices,
        max_drops=max_drops,
        cross_modal=cross_modal,
        protection=rng.choice((0.0, 2.0)) if limited else 0.0,
    )
    mildest = {node: {} for node in blocks}
    for node, choices in unit_choices.items():
        for name, sizes in choices.items():
            mildest[node][name] = max(sizes) if name in cross_modal[node] else min(sizes)
    if compute_excess(problem, Candidate(kept_units=mildest, precision={})) > 0:
        # Cuts that the spec fixes come before the protection.
        problem = dataclasses.replace(problem, protection=0.0)
    return SplitCase(problem=problem, sensitivity=sensitivity, predictor=predictor)


def list_split_inputs(case: SplitCase) -> SplitInputs:
    return SplitInputs(
        blocks=case.problem.blocks,
        sensitivity=case.sensitivity,
        cut_weights={},
        unit_choices=case.problem.unit_choices,
        precisions=case.problem.precisions,
        predictor=case.predictor,
    )


@FEW
@given(split_cases())
def test_a_split_of_the_budget_is_the_best_of_all_structures_within_its_grid(case):
    budget_ms = case.problem.budget_ms
    splits = split_by_knapsack(list_split_inputs(case), budget_ms)
    block_count = sum(len(blocks) for blocks in case.problem.blocks.values())
    sure = case.find_least(budget_ms * (1 - block_count / BUDGET_BINS))
    ideal = case.find_least(budget_ms * (1 + ROUNDING_ERROR))
    losses = [split.loss_increase for split in splits]
    assert losses == sorted(losses)
    for split in splits:
        assert case.predictor(split.candidate) <= budget_ms * (1 + ROUNDING_ERROR)
        assert split.loss_increase == pytest.approx(case.compute_loss(split.candidate))
    assert ideal - 1e-9 <= min(losses, default=math.inf) <= sure + 1e-9


@FEW
@given(split_cases(), st.floats(1.01, 2))
def test_a_larger_budget_never_gives_a_split_that_loses_more(case, factor):
    inputs = list_split_inputs(case)
    small = split_by_knapsack(inputs, case.problem.budget_ms)
    large = split_by_knapsack(inputs, factor * case.problem.budget_ms)
    if small:
        assert large[0].loss_increase <= small[0].loss_increase + 1e-9


@FEW
@given(split_cases(limited=True) | split_cases(parallel=True), st.sampled_from((1.0, 1.5)))
def test_repaired_splits_keep_the_budget_and_every_limit(case, factor):
    """The budget that is split holds, even if that of the problem is larger."""
    budget_ms = case.problem.budget_ms
    problem = dataclasses.replace(case.problem, budget_ms=factor * budget_ms)
    candidates = split_budget(
        problem, case.sensitivity, predictor=case.predictor, budget_ms=budget_ms
    )
    for candidate in candidates:
        assert case.predictor(candidate) <= budget_ms * (1 + ROUNDING_ERROR)
        assert case.problem.is_allowed(candidate)
        for node, kept in candidate.kept_units.items():
            for name, units in kept.items():
                assert units in case.problem.unit_choices[node][name]
    losses = []
    for candidate in candidates:
        losses.append(case.compute_loss(candidate))
        assert losses[-1] >= case.find_least(budget_ms * (1 + ROUNDING_ERROR)) - 1e-9


# --- allocation ---------------------------------------------------------------------------------


@st.composite
def parts(draw) -> tuple[tuple[Block, ...], int, dict[str, SensitivityCurve], dict[str, list]]:
    """Blocks, steps to remove, curves and scores."""
    blocks = draw(blocks_of_a_node(most_units=8))
    steps = sum(math.ceil(block.units / block.granularity) for block in blocks)
    rng = random.Random(draw(seeds))
    curves = {}
    scores = {}
    for block in blocks:
        points = {units: rng.random() for units in range(block.units)}
        curves[block.name] = SensitivityCurve.from_points({**points, block.units: 0.0})
        scores[block.name] = [rng.random() for _ in range(block.units)]
    return blocks, draw(st.integers(0, steps)), curves, scores


def list_removals(blocks: Sequence[Block], steps: int) -> Iterator[tuple[int, ...]]:
    ranges = [range(math.ceil(block.units / block.granularity) + 1) for block in blocks]
    for removal in itertools.product(*ranges):
        if sum(removal) == steps:
            yield removal


@SETTINGS
@given(parts())
def test_the_allocation_by_knapsack_is_the_best_of_all_removals(drawn):
    blocks, steps, curves, scores = drawn
    kept = allocate_by_knapsack(blocks, steps, curves, scores)
    losses = []
    for removal in list_removals(blocks, steps):
        loss = 0.0
        for block, removed in zip(blocks, removal, strict=True):
            fewest = 0 if block.drop else min(block.granularity, block.units)
            units = max(block.units - removed * block.granularity, fewest)
            curve = curves[block.name]
            loss += curve.loss_increases[curve.kept_units.index(units)]
        losses.append(loss)
    given_loss = 0.0
    for block in blocks:
        assert kept[block.name] in sizes_of(block)
        given_loss += curves[block.name].loss_increases[kept[block.name]]
    assert given_loss == pytest.approx(min(losses), abs=1e-9)


@SETTINGS
@given(parts())
def test_every_allocation_keeps_to_the_sizes_of_its_blocks(drawn):
    blocks, steps, curves, scores = drawn
    for allocate in (allocate_by_knapsack, allocate_by_rank, allocate_uniformly):
        kept = allocate(blocks, steps, curves, scores)
        assert list(kept) == [block.name for block in blocks]
        for block in blocks:
            assert kept[block.name] in sizes_of(block)
    kept = allocate_uniformly(blocks, steps, curves, scores)
    counts = [math.ceil(block.units / block.granularity) for block in blocks]
    for block, count in zip(blocks, counts, strict=True):
        share = steps * count / sum(counts)
        fair = {
            int(count_units_after(block, math.floor(share))),
            int(count_units_after(block, math.ceil(share))),
        }
        assert kept[block.name] in fair


# --- beam search --------------------------------------------------------------------------------

BOS = 0
EOS = 1


@dataclass(frozen=True, kw_only=True)
class RandomModel:
    """A random distribution of the next token for every prefix. Its cache is the prefix itself."""

    seed: int
    vocabulary: int
    calls: list[int] = field(default_factory=list)
    lists_best: bool = False
    """Whether a step lists as many of the best tokens as it needs, and not the scores of all."""

    def log_probabilities(self, prefix: Sequence[int]) -> np.ndarray:
        rng = np.random.default_rng([self.seed, *[int(token) for token in prefix]])
        logits = 2 * rng.standard_normal(self.vocabulary)
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    def decode(self, ids_BT, position, past, best_tokens=0):
        (history_BS,) = past
        assert history_BS.shape[1] == position
        self.calls.append(position)
        prefixes = np.concatenate([history_BS, ids_BT], axis=1)
        scores_BV = np.stack([self.log_probabilities(prefix) for prefix in prefixes])
        if not best_tokens:
            return TokenScores(scores_BV), [prefixes]
        ids_BK = np.argsort(-scores_BV, axis=1, kind="stable")[:, :best_tokens]
        return TokenScores(np.take_along_axis(scores_BV, ids_BK, 1), ids_BK), [prefixes]

    def write(self, generation: Generation, **options) -> list[ScoredSequence]:
        best_tokens = 0
        if self.lists_best and not generation.needs_all_scores:
            best_tokens = generation.count_best_tokens()
        decode = functools.partial(self.decode, best_tokens=best_tokens)
        past = [np.zeros((generation.beams, 0), np.int64)]
        return beam_search(decode, past, generation=generation, **options)


def list_sequences(model: RandomModel, generation: Generation) -> list[ScoredSequence]:
    """Every sequence that may be written, with its mean log-probability; the best first."""
    prompt = list(generation.prompt or (generation.bos,))
    complete: list[ScoredSequence] = []

    def extend(ids: list[int], total: float) -> None:
        count = len(ids) - len(prompt)
        if count and (ids[-1] == generation.eos or len(ids) == generation.max_tokens):
            complete.append((total / count, ids))
            return
        scores = model.log_probabilities(ids)
        for token in range(model.vocabulary):
            is_banned = token in generation.suppress
            if is_banned or (not count and token in generation.begin_suppress):
                continue
            extend([*ids, token], total + float(scores[token]))

    extend(prompt, 0.0)
    return sorted(complete, key=lambda scored: -scored[0])


@st.composite
def models(draw, *, vocabularies=(3, 4)) -> RandomModel:
    return RandomModel(
        seed=draw(seeds),
        vocabulary=draw(st.sampled_from(vocabularies)),
        lists_best=draw(st.booleans()),
    )


@st.composite
def generations(draw, *, most_beams=4, most_tokens=6) -> Generation:
    prompt = draw(st.sampled_from(((), (0,), (2, 0), (0, 2, 2))))
    return Generation(
        bos=BOS,
        eos=EOS,
        pad=BOS,
        beams=draw(st.integers(1, most_beams)),
        max_tokens=len(prompt or (BOS,)) + draw(st.integers(1, most_tokens)),
        prompt=prompt,
        early_stopping=draw(st.booleans()),
        suppress=draw(st.sampled_from(((), (0,)))),
        begin_suppress=draw(st.sampled_from(((), (1,), (0, 1)))),
    )


@SETTINGS
@given(models(), generations(most_tokens=3))
def test_wide_beams_write_what_an_enumeration_lists(model, generation):
    expected = list_sequences(model, generation)
    # One more beam than sequences: nothing that is possible is ever left out.
    wide = dataclasses.replace(generation, beams=len(expected) + 1, early_stopping=False)
    written = model.write(wide)[: len(expected)]
    for (score, ids), (expected_score, expected_ids) in zip(written, expected, strict=True):
        assert score == pytest.approx(expected_score, abs=1e-5)
        assert ids == expected_ids


@SETTINGS
@given(models(vocabularies=(3, 5, 9)), generations(most_beams=1, most_tokens=9))
def test_one_beam_follows_the_most_probable_token(model, generation):
    ids = list(generation.prompt or (BOS,))
    start = len(ids)
    total = 0.0
    while len(ids) < generation.max_tokens:
        scores = model.log_probabilities(ids).astype(float)
        scores[list(generation.suppress)] = -np.inf
        if len(ids) == start:
            scores[list(generation.begin_suppress)] = -np.inf
        ids.append(int(scores.argmax()))
        total += float(scores.max())
        if ids[-1] == EOS:
            break
    ((score, written),) = model.write(generation)
    assert written == ids
    assert score == pytest.approx(total / (len(ids) - start), abs=1e-5)


@SETTINGS
@given(models(vocabularies=(5, 9)), generations(most_tokens=8))
def test_every_sequence_is_scored_by_its_mean_and_keeps_to_the_rules(model, generation):
    written = model.write(generation)
    prompt = list(generation.prompt or (BOS,))
    assert len(written) == generation.beams
    scores = [score for score, _ in written]
    assert scores == sorted(scores, reverse=True)
    # Where fewer sequences are possible than there are beams, copies of masked ones fill the list.
    possible = [scored for scored in written if scored[0] > MASKED_SCORE / 100]
    allowed = set(range(model.vocabulary)) - {*generation.suppress, *generation.begin_suppress}
    has_one_step = generation.max_tokens == len(prompt) + 1
    assert len(possible) == (min(len(allowed), len(written)) if has_one_step else len(written))
    texts = {tuple(ids) for _, ids in possible}
    assert len(texts) == len(possible)
    for score, ids in possible:
        assert ids[: len(prompt)] == prompt
        new = ids[len(prompt) :]
        assert len(new) > 0 and len(ids) <= generation.max_tokens
        assert EOS not in new[:-1]
        ending = "end" if new[-1] == EOS else "length"
        assert generation.describe_ending(ids) == ending
        assert ending == "end" or len(ids) == generation.max_tokens
        assert not set(new) & set(generation.suppress)
        assert new[0] not in generation.begin_suppress
        total = 0.0
        for i, token in enumerate(new):
            total += float(model.log_probabilities(ids[: len(prompt) + i])[token])
        assert score == pytest.approx(total / len(new), abs=1e-5)


@SETTINGS
@given(models(vocabularies=(5, 9)), generations(most_tokens=8))
def test_a_replay_of_the_moves_writes_the_same(model, generation):
    moves: list[BeamMove] = []
    written = model.write(generation, made_moves=moves)
    replayed: list[BeamMove] = []
    again = model.write(generation, moves_to_follow=moves, made_moves=replayed)
    assert again == written
    assert replayed == moves


@SETTINGS
@given(models(vocabularies=(5, 9)), generations(most_tokens=8), st.integers(0, 99))
def test_another_model_that_follows_the_moves_does_the_same_work(model, generation, seed):
    moves: list[BeamMove] = []
    model.write(generation, made_moves=moves)
    paced = generation.set_pace(len(moves) + 1)
    assert paced.eos == NO_TOKEN
    other = RandomModel(seed=seed, vocabulary=model.vocabulary)
    replayed: list[BeamMove] = []
    written = other.write(paced, moves_to_follow=moves, made_moves=replayed)
    assert len(other.calls) == len(moves) + 1
    assert replayed == moves
    prompt = list(generation.prompt or (BOS,))
    rows = [prompt] * generation.beams
    for beams, tokens in moves:
        rows = [[*rows[beam], token] for beam, token in zip(beams, tokens, strict=True)]
    assert all(ids[:-1] in rows for _, ids in written)


@SETTINGS
@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=17),
    st.integers(0, 20),
)
def test_a_loop_is_a_span_that_fills_the_end(head, span, copies):
    ids = head + span * copies
    expected = 0
    for length in range(16, 0, -1):
        needed = max(4, math.ceil(16 / length))
        tail = ids[-length:] * needed
        if len(ids) >= length * needed and ids[len(ids) - len(tail) :] == tail:
            expected = length * (needed - 1)
    assert count_repeated_tail(ids) == expected


# --- figures ------------------------------------------------------------------------------------

hits = st.lists(st.booleans(), min_size=1, max_size=200)


def count_hits(right: Sequence[bool], *, is_error_rate: bool = False) -> PerSampleScores:
    numerators = tuple(float(is_right) for is_right in right)
    return PerSampleScores(numerators=numerators, is_error_rate=is_error_rate)


@SETTINGS
@given(hits)
def test_the_interval_of_a_share_is_that_of_wilson(right):
    quality = estimate_quality(count_hits(right))
    assert quality.value == pytest.approx(sum(right) / len(right))
    assert 0 <= quality.low <= quality.value + 1e-12 and quality.value - 1e-12 <= quality.high <= 1
    expected = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    assert quality.low == pytest.approx(expected.low, abs=1e-6)
    assert quality.high == pytest.approx(expected.high, abs=1e-6)


counts = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40)


@FEW
@given(counts, st.booleans())
def test_the_interval_of_a_ratio_is_drawn_the_same_way_each_time(pairs, is_error_rate):
    scores = PerSampleScores(
        numerators=tuple(float(errors) for errors, _ in pairs),
        denominators=tuple(float(words) for _, words in pairs),
        is_error_rate=is_error_rate,
    )
    quality = estimate_quality(scores)
    assert quality == estimate_quality(scores)
    errors = sum(errors for errors, _ in pairs)
    words = max(sum(words for _, words in pairs), 1)
    assert quality.value == pytest.approx(errors / words)
    assert quality.low <= quality.high
    ratios = [errors / words for errors, words in pairs if words]
    if ratios and len(ratios) == len(pairs):
        # A ratio of sums lies among the ratios of its parts.
        assert min(ratios) - 1e-9 <= quality.low and quality.high <= max(ratios) + 1e-9
    share = 1 - errors / words if is_error_rate else errors / words
    assert scores.share_right == pytest.approx(share)


@st.composite
def two_sides(draw, *, most_runs=1):
    count = draw(st.integers(2, 40))
    lists = st.lists(st.booleans(), min_size=count, max_size=count)
    sides = []
    for _ in range(2):
        runs = []
        for _ in range(draw(st.integers(1, most_runs))):
            runs.append(
                {"one": count_hits(draw(lists)), "two": count_hits(draw(lists), is_error_rate=True)}
            )
        sides.append(runs)
    return sides


def mean_share(runs: Sequence[Mapping[str, PerSampleScores]]) -> float:
    shares = []
    for run in runs:
        for scores in run.values():
            share = sum(scores.numerators) / len(scores.numerators)
            shares.append(1 - share if scores.is_error_rate else share)
    return sum(shares) / len(shares)


@FEW
@given(two_sides())
def test_a_paired_difference_changes_its_sign_with_its_sides(sides):
    one, other = sides
    difference, half = estimate_paired_difference(one, other)
    opposite, opposite_half = estimate_paired_difference(other, one)
    assert difference == pytest.approx(mean_share(one) - mean_share(other), abs=1e-12)
    assert opposite == pytest.approx(-difference, abs=1e-12)
    assert half >= 0 and opposite_half == pytest.approx(half, abs=1e-12)
    flipped = {"supported": "not supported", "not supported": "supported"}
    if abs(abs(difference) - half) > 1e-9:
        verdict = decide_claim(one, other)[0]
        assert decide_claim(other, one)[0] == flipped.get(verdict, verdict)


@FEW
@given(two_sides(most_runs=3))
def test_a_difference_of_several_runs_is_that_of_their_means(sides):
    one, other = sides
    difference, half = estimate_paired_difference(one, other)
    assert (difference, half) == estimate_paired_difference(one, other)
    assert difference == pytest.approx(mean_share(one) - mean_share(other), abs=1e-12)
    same, spread = estimate_paired_difference(one[:1], one[:1])
    assert same == pytest.approx(0, abs=1e-12) and spread == pytest.approx(0, abs=1e-9)


def interpolate_percentile(values: Sequence[float], percent: float) -> float:
    """A percentile by its definition: linear between the sorted values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@SETTINGS
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_latency_is_made_of_percentiles(samples):
    latency = summarize_latency(samples)
    assert latency.n == len(samples)
    quarter = interpolate_percentile(samples, 25)
    assert latency.p50 == pytest.approx(interpolate_percentile(samples, 50), abs=1e-6)
    assert latency.p95 == pytest.approx(interpolate_percentile(samples, 95), abs=1e-6)
    assert latency.iqr == pytest.approx(interpolate_percentile(samples, 75) - quarter, abs=1e-6)


# --- specs --------------------------------------------------------------------------------------

names = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=8)
shares = st.floats(0, 1)
weights = st.floats(0, 1e6)
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "name": names,
    "target": st.sampled_from(("2x", "1.5x,2x", "12ms", "12.5ms p95")),
    "seed": st.integers(0, 2**31),
    "nodes.vision.prune.heads": shares,
    "nodes.vision.prune.ffn": shares,
    "nodes.vision.prune.drop": st.integers(0, 9),
    "nodes.vision.prune.blocks.0.ffn": shares,
    "nodes.captioner.precision": st.sampled_from(("auto", "fp32", "int8")),
    "nodes.captioner.max_tokens": st.integers(0, 4096),
    "data.calibration": st.integers(8, 1_000_000),
    "data.sensitivity_pairs": st.integers(8, 1_000_000),
    "data.validation_pairs": st.integers(8, 1_000_000),
    "data.final_pairs_factor": st.integers(1, 1000),
    "data.labels": st.sampled_from(("reference", "teacher")),
    "prune.protection": st.floats(1, 100),
    "prune.refit": st.booleans(),
    "prune.ridge": st.floats(1e-6, 10),
    "prune.sensitivity": st.just("measured"),
    "quantize.max_loss_increase": st.floats(0, 1000),
    "distill.minutes": st.floats(0, 100_000),
    "distill.learning_rate": shares,
    "distill.find_learning_rate": st.booleans(),
    "distill.losses.embedding": weights,
    "distill.losses.tokens": weights,
    "distill.losses.affinity": weights,
    "distill.losses.contrast": weights,
    "distill.losses.caption": weights,
    "distill.losses.logits": weights,
    "distill.losses.hidden": weights,
    "distill.losses.cross": weights,
    "distill.validations": st.integers(0, 1000),
    "distill.distinct_pairs": st.integers(0, 1_000_000_000),
    "distill.max_passes": st.integers(1, 1_000_000),
    "search.level_switches": st.integers(0, 100_000),
    "search.linearization_rounds": st.integers(0, 100),
    "search.evaluator": st.sampled_from(("measured", "estimated")),
    "search.short_finetunings": st.integers(0, 100),
    "search.max_artifacts": st.integers(1, 10),
    "search.ray_address": st.none() | names,
    "limits.size_mb": st.none() | st.floats(0, 1e9),
    "limits.node_ms": st.dictionaries(st.sampled_from(("vision", "text")), st.floats(0.01, 1e3)),
    "compute.device": st.sampled_from(["auto", "cpu", "cuda", "mps"]),
    "compute.precision": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
    "resources.trial.gpu": st.floats(0, 8),
    "search.deterministic": st.booleans(),
    "search.batch": st.integers(1, 64),
    "measure.readings": st.just(""),
    "measure.requests": st.integers(2, 100_000),
    "measure.parallel": st.booleans(),
}
"""Values that fit, by key of the spec."""


@st.composite
def changes_of_a_spec(draw) -> dict[str, Any]:
    keys = draw(st.lists(st.sampled_from(sorted(CHANGES)), unique=True, max_size=12))
    return {key: draw(CHANGES[key]) for key in keys}


def read_key(spec: Spec, dotted: str) -> Any:
    """Read what a spec has at a key."""
    head, marker, block = dotted.partition(".prune.blocks.")
    keys = [*head.split("."), "prune", "blocks", block] if marker else dotted.split(".")
    value: Any = spec
    for key in keys:
        if isinstance(value, Node) and key in value.options:
            value = value.options[key]
        else:
            value = value[key] if isinstance(value, dict) else getattr(value, key)
    return value


@pytest.fixture(scope="module")
def spec_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_text(SPEC)
    return path


@FEW
@given(changes=changes_of_a_spec())
def test_an_override_is_read_back_and_a_spec_survives_its_file(spec_file, changes):
    spec = load_spec(spec_file, changes)
    for dotted, value in changes.items():
        assert read_key(spec, dotted) == value
    assert build_record(Spec, to_plain(spec)) == spec
    copy = spec_file.with_name("copy.yaml")
    copy.write_text(yaml.safe_dump(to_plain(spec)))
    assert load_spec(copy) == spec
    # A file that holds the changes says the same as one that is changed.
    changed = spec_file.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(apply_overrides(yaml.safe_load(SPEC), changes)))
    assert load_spec(changed) == spec


@FEW
@given(key=st.sampled_from(sorted(OLD_KEYS)), data=st.data())
def test_an_old_name_says_what_the_new_one_says(spec_file, key, data):
    new_key = OLD_KEYS[key]
    value = data.draw(CHANGES[new_key])
    expected = load_spec(spec_file, {new_key: value})
    with pytest.warns(FutureWarning, match=f"'{key}' is called '{new_key}' now"):
        assert load_spec(spec_file, {key: value}) == expected
    section, name = key.split(".")
    text = yaml.safe_load(SPEC)
    settings_of_section = text.setdefault(section, {})
    # Where both names are given, the old one is unknown.
    new_section, _, new_name = new_key.partition(".")
    text.setdefault(new_section, {}).pop(new_name, None)
    settings_of_section[name] = value
    old_file = spec_file.with_name("old.yaml")
    old_file.write_text(yaml.safe_dump(text))
    with pytest.warns(FutureWarning, match=f"'{key}' is called '{new_key}' now"):
        assert load_spec(old_file) == expected


@pytest.mark.parametrize(("place", "new_value"), OLD_VALUES.items())
def test_an_old_value_says_what_the_new_one_says(spec_file, place, new_value):
    key, old_value = place
    with pytest.warns(FutureWarning, match=f"'{key}: {old_value}' is called"):
        assert load_spec(spec_file, {key: old_value}) == load_spec(spec_file, {key: new_value})


# --- records ------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    Any: json_values,
    float: numbers,
    int: st.integers(-(2**53), 2**53),
    bool: st.booleans(),
    str: words,
    NoneType: st.none(),
}


def build_values(hint: Any) -> st.SearchStrategy[Any]:
    """Make values of a type hint as records have them."""
    if hint in LEAVES:
        return LEAVES[hint]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        fields = [f.name for f in dataclasses.fields(hint) if f.init]
        return st.builds(hint, **{name: build_values(hints[name]) for name in fields})
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is Annotated:
        return build_values(arguments[0])
    if origin in (typing.Union, UnionType):
        return st.one_of([build_values(argument) for argument in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is dict:
        return st.dictionaries(words, build_values(arguments[1]), max_size=2)
    if origin is tuple and arguments[-1] is ...:
        return st.lists(build_values(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*[build_values(argument) for argument in arguments])
    raise TypeError(f"no values are known for {hint}")


def list_record_types() -> list[type]:
    """Every record of the results, and the scores that are stored beside them."""
    types = [SplitScores]
    for module in (records, claims):
        for value in vars(module).values():
            is_own = getattr(value, "__module__", "") == module.__name__
            if is_own and dataclasses.is_dataclass(value):
                types.append(value)
    return types


@pytest.mark.parametrize("record_type", list_record_types(), ids=lambda record: record.__name__)
def test_a_record_survives_its_file(record_type, tmp_path):
    @FEW
    @given(build_values(record_type))
    def check(record):
        assert build_record(record_type, json.loads(json.dumps(to_plain(record)))) == record
        path = write_record(tmp_path / "record.json", record)
        assert read_record(record_type, path) == record
        assert [file.name for file in tmp_path.iterdir()] == ["record.json"]

    check()
