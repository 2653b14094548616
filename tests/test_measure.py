"""Latency and counts."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from scipy.optimize import isotonic_regression

from mmcompress.errors import BundleError
from mmcompress.graph.blocks import ConvGeometry
from mmcompress.measure.cost_model import device_table as table
from mmcompress.measure.cost_model import drift as anchors
from mmcompress.measure.cost_model.calibrate import plan_measurements
from mmcompress.measure.cost_model.microbenchmarks import (
    BLOCK_BUILDERS,
    SizedBlock,
    TableKey,
    build_stack,
    make_random_feed,
)
from mmcompress.measure.latency import benchmark_in_subprocess as apart
from mmcompress.measure.latency.bench import (
    BenchmarkOptions,
    Samples,
    bench_pipelines,
)
from mmcompress.models.base import ImageEncoderModel
from mmcompress.models.counts import count_block_params, count_params_and_macs
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.machine import describe_cpu, fingerprint_device, list_package_versions
from mmcompress.runtime.sessions import open_session
from mmcompress.runtime.timing import find_lowest_median, time_call, time_calls_in_turn
from mmcompress.runtime.token_scores import TokenScores

ALONE = apart.benchmark_in_subprocess  # as it is; tests measure in their own process


def bench(pipelines, requests, warmup, max_requests, traces=(), **turns):
    options = BenchmarkOptions(warmup=warmup, max_requests=max_requests, traces=tuple(traces))
    return bench_pipelines(pipelines, requests, options=options, **turns)


def end_to_end(pipelines, requests, warmup, rounds, said=()):
    return {n: s.summarize() for n, s in bench(pipelines, requests, warmup, rounds, said).items()}


@pytest.mark.parametrize("kind", BLOCK_BUILDERS)
@pytest.mark.parametrize("copies", [0, 3])
def test_stacks_are_valid_and_run(kind, copies):
    positions = 1 if kind == "cross_attention" else 5
    key = TableKey(kind=kind, width=32, head=8, positions=positions, keys=5, batch=2)
    block = SizedBlock(key=key, units=2)
    if kind == "conv":
        geometry = ConvGeometry(first_kernel=3, last_kernel=1, stride=2, depthwise_kernel=3)
        key = replace(key, head=24, positions=16, keys=1, conv=geometry)
        block = SizedBlock(key=key, units=16)
    model = build_stack(block, copies)
    onnx.checker.check_model(model)
    out = open_session(model.SerializeToString(), 1).run(None, make_random_feed(model))
    assert out[-1].shape == (2, key.positions, 32)
    if kind == "conv":
        assert [o.shape for o in out[:-1]] == [(2, 24, 2, 2)] * copies


def test_convolutions_differ_by_their_kernels_and_their_stride():
    """Every number of the geometry is in the graph: kernels [o, i, k, k] of 5, 3 and 1, a stride of 2."""
    geometry = ConvGeometry(first_kernel=5, last_kernel=1, stride=2, depthwise_kernel=3)
    key = TableKey(kind="conv", width=6, head=10, positions=64, keys=1, batch=1, conv=geometry)

    def list_convolutions(key):
        graph = build_stack(SizedBlock(key=key, units=4), 1).graph
        shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
        nodes = [node for node in graph.node if node.op_type == "Conv"]
        strides = [{a.name: list(a.ints) for a in node.attribute}["strides"] for node in nodes]
        return [(shapes[node.input[1]], s[0]) for node, s in zip(nodes, strides, strict=True)]

    assert list_convolutions(key) == [
        ((4, 6, 5, 5), 1),
        ((4, 1, 3, 3), 2),
        ((10, 4, 1, 1), 1),
    ]
    without_depthwise = replace(key, conv=replace(geometry, depthwise_kernel=0))
    assert list_convolutions(without_depthwise) == [((4, 6, 5, 5), 2), ((10, 4, 1, 1), 1)]


def test_a_cached_step_appends_to_its_past():
    key = TableKey(kind="attention", width=32, head=8, positions=1, keys=7, batch=3)
    model = build_stack(SizedBlock(key=key, units=2), 1)
    out = open_session(model.SerializeToString(), 1).run(None, make_random_feed(model))
    assert out[0].shape == (3, 2, 7, 8)


FFN_KEY = TableKey(kind="ffn", width=32, head=1, positions=4, keys=4, batch=1)


def test_rows_that_are_slower_than_larger_ones_are_out_of_order():
    """Of one block at 2, 4 and 8 positions, the row at 4 was measured while something else ran."""
    rows = {}
    for positions, ms in ((2, 1.0), (4, 3.0), (8, 2.0)):
        key = replace(FFN_KEY, positions=positions)
        rows[key, "fp32"] = table.TableRow(
            key=key, precision="fp32", units=(32, 64), ms=(ms / 2, ms)
        )
    slow = (replace(FFN_KEY, positions=4), "fp32")
    assert table.list_disordered_rows(rows) == [slow]
    # Another precision, another width, or fewer keys for more positions: nothing is compared.
    for changed in (
        {slow: replace(rows[slow], precision="int8")},
        {slow: replace(rows[slow], units=(32, 48))},
    ):
        assert table.list_disordered_rows(rows | changed) == []


def test_a_row_out_of_order_is_measured_once_more(monkeypatch):
    measured = []

    def measure_rows(need, precisions, **_):
        measured.append(need.key.positions)
        ms = {2: 1.0, 4: 3.0 if measured.count(4) == 1 else 1.5, 8: 2.0}[need.key.positions]
        return [
            table.TableRow(key=need.key, precision=precision, units=(64,), ms=(ms,))
            for precision in precisions
        ]

    monkeypatch.setattr(table, "_measure_rows", measure_rows)
    needs = [
        table.TableNeed(key=replace(FFN_KEY, positions=positions), units=64, granularity=64)
        for positions in (2, 4, 8)
    ]
    found = table.measure_table(needs, 1, precisions=["fp32"])
    assert measured == [2, 4, 8, 4]
    assert [row.ms for row in found.rows] == [(1.0,), (1.5,), (2.0,)]
    # What is on record from before stays as it is.
    kept = table.measure_table(needs, 1, precisions=["fp32"], cached=found)
    assert kept == found and measured == [2, 4, 8, 4]


def test_the_table_measures_only_what_is_missing(monkeypatch):
    need = [table.TableNeed(key=FFN_KEY, units=64, granularity=16)]
    first = table.measure_table(need, 1)
    assert len(first.rows) == 2 and first.device == fingerprint_device(1)
    assert all(list(r.ms) == sorted(r.ms) and r.units == (16, 32, 48, 64) for r in first.rows)
    monkeypatch.setattr(table, "build_stack", None)  # nothing is built
    assert table.measure_table(need, 1, cached=first) == first


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_the_isotonic_regression_of_what_was_measured(seed):
    measured = np.random.default_rng(seed).normal(np.arange(8), 2.0)
    expected = isotonic_regression(measured).x
    assert table.fit_rising(measured.tolist()) == pytest.approx(expected.tolist())


def test_blocks_that_are_large_in_memory_are_measured_in_several_turns(monkeypatch):
    turns = []

    def time_in_turn(calls, *others, **options):
        turns.append(len(calls))
        return [1.0, *(3.0 for _ in calls[1:])]

    monkeypatch.setattr(table, "time_calls_in_turn", time_in_turn)
    monkeypatch.setattr(table, "MAX_BYTES_IN_TURN", 100_000)
    rows = table.measure_table([table.TableNeed(key=FFN_KEY, units=64, granularity=16)], 1).rows
    # 8 stacks, and an empty call in every turn
    assert len(turns) > 1 and sum(turns) == 8 + len(turns)
    assert all(row.ms == pytest.approx([2.0 / table.STACKED_COPIES] * 4) for row in rows)


def test_a_table_of_another_device_is_not_used():
    need = [table.TableNeed(key=FFN_KEY, units=16, granularity=16)]
    foreign = table.DeviceTable(
        device="another",
        threads=1,
        rows=tuple(
            table.TableRow(key=FFN_KEY, precision=p, units=(16,), ms=(99.0,))
            for p in ("fp32", "int8")
        ),
    )
    assert all(r.ms[0] < 99 for r in table.measure_table(need, 1, cached=foreign).rows)


def test_a_kept_table_of_the_old_form_is_not_read(tmp_path, monkeypatch):
    """Neither under its own name, nor when its content lies under the present one."""
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path))
    folder = tmp_path / "mmcompress"
    folder.mkdir()
    device = fingerprint_device(1)
    old_row = {"kind": "ffn", "width": 32, "head": 1, "positions": 4, "keys": 4, "batch": 1}
    old_row |= {"precision": "fp32", "units": [16], "ms": [99.0]}
    old_table = json.dumps({"device": device, "threads": 1, "rows": [old_row]})
    need = [table.TableNeed(key=FFN_KEY, units=16, granularity=16)]
    assert table.TABLE_FORMAT > 2
    for version in (2, table.TABLE_FORMAT):
        (folder / f"device-{device}-{version}.json").write_text(old_table)
        found = table.complete_table(need, 1, precisions=("fp32",))
        assert [row.key for row in found.rows] == [FFN_KEY] and found.rows[0].ms[0] < 99
        (folder / f"device-{device}-{table.TABLE_FORMAT}.json").unlink()


@pytest.mark.parametrize("passes", [True, False])
def test_a_cut_shortens_a_context_only_where_its_positions_come_out(
    spec, models, monkeypatch, passes
):
    """An encoder that pools its positions by a few queries gives as many tokens whatever is cut."""
    monkeypatch.setattr(ImageEncoderModel, "passes_positions", property(lambda self: passes))
    plan = plan_measurements(spec, models, calls={}, largest_cut_shares={"vision": 0.5})
    assert {block.window for block in plan.deployed["vision"]} == {"vision"}
    windows = {block.window for block in plan.deployed["captioner"] if block.context}
    assert windows == {"vision" if passes else ""}


@pytest.fixture()
def passing(monkeypatch):
    """A clock that only a call of this moves, by so many seconds."""
    now = [0.0]
    monkeypatch.setattr(
        "mmcompress.runtime.timing.time", SimpleNamespace(perf_counter=lambda: now[0])
    )

    def sleep(seconds):
        now[0] += seconds

    return sleep


def test_clock_measures_what_passes(passing):
    found = time_call(lambda: passing(0.003), 1, rounds=8)
    assert found.p50 == pytest.approx(3.0) == found.p95 and found.n == 8
    assert time_call(lambda: passing(0.003), 1, rounds=8, limit=0.0).n == 3


def test_end_to_end_counts_nodes_and_calls(run_folder):
    import numpy as np

    image = np.zeros((32, 32, 3), np.uint8)
    pair = {"a": load_bundle(run_folder / "baseline"), "b": load_bundle(run_folder / "bundle")}
    found = end_to_end(pair, [{"image": image}], 1, 6)
    for m in found.values():
        assert m.latency.n == 6 and 0 < m.model_share < 1
        assert (
            m.calls["vision/model"] == 1
            and m.calls["captioner/step"] >= 1
            and m.calls.get("captioner/context", 0) <= 1
        )
        assert sum(n.p50 for n in m.nodes.values()) < 1.5 * m.latency.p50


def seen(**ms):
    """A measurement of a pipeline, milliseconds by node."""
    return Samples(ms=[sum(ms.values())] * 9, nodes={n: [v] * 9 for n, v in ms.items()})


def p50s(m):
    return {n: ms[0] for n, ms in m.nodes.items()}


def test_a_structure_is_held_against_what_feels_the_same(tmp_path):
    record, precision = tmp_path / "w.json", {"a": "int8", "b": "fp32"}
    anchors.append_reference_run(
        record, {"fp32": seen(a=10.0, b=10.0, c=1.0), "int8": seen(a=5.0, b=5.0, c=1.0)}
    )
    usual = anchors.append_reference_run(
        record, {"fp32": seen(a=10.0, b=10.0, c=1.0), "int8": seen(a=5.0, b=5.0, c=1.0)}
    )
    quiet_ms = seen(a=4.0, b=8.0, c=1.0)
    assert anchors.compute_machine_speed_factor(
        p50s(quiet_ms), precision, reference_runs=usual
    ) == pytest.approx(1.0)
    # what is rounded takes a fifth longer for a while; three quiet measurements are known beside it
    now = {"fp32": seen(a=10.0, b=10.0, c=1.0), "int8": seen(a=6.0, b=6.0, c=1.0)}
    anchors.append_reference_run(
        record, {"fp32": seen(a=10.0, b=10.0, c=1.0), "int8": seen(a=5.0, b=5.0, c=1.0)}
    )
    busy, disturbed = anchors.append_reference_run(record, now), seen(a=4.8, b=8.0, c=1.0)
    factor = anchors.compute_machine_speed_factor(p50s(disturbed), precision, reference_runs=busy)
    assert factor * disturbed.ms[0] == pytest.approx(4.8 * 5.25 / 6 + 8 + 1)
    assert anchors.compute_machine_speed_factor(
        {"a": 9.0, "b": 8.0}, {"a": "fp32", "b": "fp32"}, reference_runs=busy
    ) == pytest.approx(1.0)
    # not measured whole: as the dense one
    assert anchors.compute_machine_speed_factor(
        {"a": 9.0}, {"a": "w4"}, reference_runs=busy
    ) == pytest.approx(1.0)


def test_sittings_add_up(run_folder):
    import numpy as np

    pair, request = (
        {"a": load_bundle(run_folder / "baseline")},
        [{"image": np.zeros((32, 32, 3), np.uint8)}],
    )
    one, two = bench(pair, request, 0, 3)["a"], bench(pair, request, 1, 5)["a"]
    both = (Samples() + one + two).summarize()
    assert both.latency.n == 8 and both.samples == tuple(one.ms + two.ms) and len(both.traces) == 1
    assert both.calls == pytest.approx(one.summarize().calls) and both.nodes["vision"].n == 8
    assert min(one.summarize().latency.p50, two.summarize().latency.p50) <= both.latency.p50


def test_bundles_are_loaded_anew_in_every_sitting(run_folder, monkeypatch):
    import numpy as np

    made, given = [], []
    monkeypatch.setattr(
        apart,
        "load_bundle",
        lambda at, threads, provider: made.append(load_bundle(at, threads)) or made[-1],
    )

    def bench_recorded(job, folder):
        given.append((job.bundles, job.options.max_requests, job.options.first_request))
        return apart.bench_in_process(job, folder)

    requests = [{"image": np.full((32, 32, 3), i, np.uint8)} for i in range(5)]
    bundles = {"a": run_folder / "baseline", "b": run_folder / "bundle"}
    options = BenchmarkOptions(warmup=1, max_requests=9, first_request=3, loads=3)
    found = apart.bench_repeated(bundles, requests, options=options, benchmark=bench_recorded)
    assert len({id(p) for p in made}) == 6 and [list(p) for p, *_ in given] == [["a", "b"]] * 3
    assert [rest for _, *rest in given] == [
        [3, 3],
        [3, 1],
        [3, 4],
    ]  # each goes on where the last one ended
    assert all(len(s.ms) == len(s.nodes["vision"]) == 9 for s in found.values())


def test_bundles_are_measured_in_a_process_of_their_own(run_folder, tmp_path):
    """It answers the same to the same, and hands on what goes wrong."""
    import numpy as np
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    requests = [{"image": np.full((32, 32, 3), 9, np.uint8)}, {"image": tmp_path / "red.png"}]
    left = apart.save_requests(tmp_path, requests)
    where = {"a": str(run_folder / "baseline")}
    options = BenchmarkOptions(warmup=0, max_requests=2, min_requests=2, threads=1)
    job = apart.BenchmarkJob(bundles=where, requests=left, options=options)
    alone = ALONE(job, tmp_path)["a"]
    assert (
        alone.traces == apart.bench_in_process(job, tmp_path)["a"].traces and len(alone.traces) == 2
    )
    assert len(alone.ms) == len(alone.nodes["vision"]) == 2 and min(alone.ms) > 0
    with pytest.raises(BundleError, match="nowhere"):
        ALONE(replace(job, bundles={"a": str(tmp_path / "nowhere")}), tmp_path)


def test_pipelines_take_turns_and_the_first_request_of_a_turn_is_not_counted(run_folder):
    """Who answers after another finds its weights out of the caches; of one alone, or slow, every request counts."""
    import numpy as np

    class Recorded:
        def __init__(self, name):
            self.name, self.inner = name, load_bundle(run_folder / "baseline")

        def __getattr__(self, key):
            return getattr(self.inner, key)

        def __call__(self, **given):
            sent.append((self.name, int(given["image"][0, 0, 0])))
            return self.inner(**given)

    requests = [{"image": np.full((32, 32, 3), i, np.uint8)} for i in range(40)]
    pair, sent = {n: Recorded(n) for n in "ab"}, []
    found = bench(pair, requests, 1, 6, turn_seconds=1e9)
    assert sent[2:] == [(n, i) for n in "ba" for i in (39, *range(6))]
    assert all(len(found[n].ms) == 6 and found[n].calls["vision/model"] == 6 for n in "ab")
    sent.clear()
    bench(pair, requests, 1, 3, turn_seconds=0.0)
    assert sent[2:] == [(n, i) for i, names in enumerate(("ba", "ab", "ba")) for n in names]
    sent.clear()
    bench({**pair, "c": Recorded("c")}, requests, 1, 60, turn_seconds=0.0)
    turns = ["".join(n for n, _ in sent[i : i + 3]) for i in range(3, len(sent), 3)]
    assert (
        all(sorted(t) == list("abc") for t in turns) and len(set(turns)) == 6
    )  # no place is anyone's own
    sent.clear()
    bench({"a": pair["a"]}, requests, 1, 4, turn_seconds=1e9)
    assert sent[1:] == [("a", i) for i in range(4)]


def test_counts_are_those_of_the_modules(models):
    m = models["vision"]
    params, macs = count_params_and_macs(m, 1, beams=1)
    assert params == sum(p.numel() for p in m.parameters())
    tokens = 17
    linear = sum(
        p.numel()
        for n, p in m.named_parameters()
        if n.endswith("weight") and p.ndim == 2 and "resblocks" in n
    )
    patches = m.tower.conv1.weight.numel() * 16
    attention = 2 * tokens * tokens * 32 * 2
    assert macs == linear * tokens + patches + attention
    assert sum(count_block_params(m).values()) < params


def test_the_machine_is_described():
    facts = describe_cpu()
    assert facts["cores"] >= 1 and facts["name"] and "onnxruntime" in list_package_versions()


def test_the_predictor_gives_back_the_dense_pipeline(run_folder):
    """And what it predicts of the chosen structure is recorded beside what was measured."""
    from mmcompress.graph.structure import Candidate
    from mmcompress.measure.cost_model.predictor import Predictor
    from mmcompress.results.records import Summary
    from mmcompress.run.profile import Profile
    from mmcompress.storage import read_record

    predict, dense = (
        read_record(Predictor, run_folder / "predictor.json"),
        read_record(Profile, run_folder / "profile.json"),
    )
    nothing_cut = Candidate(
        kept_units={n: {} for n in dense.blocks}, precision=dict.fromkeys(dense.blocks, "fp32")
    )
    assert predict(nothing_cut) == pytest.approx(dense.latency_ms.p50, rel=1e-3)
    assert read_record(Summary, run_folder / "summary.json").predicted_latency_ms_p50 > 0


def test_calls_in_turn_all_meet_a_change_of_pace(passing):
    """The machine slows down half-way: the ratio of two calls is right all the same."""
    paces = iter([1.0] * 8 + [2.0] * 100)

    def wait(seconds):
        return lambda: passing(seconds * next(paces))

    first_ms, second_ms = time_calls_in_turn([wait(0.002), wait(0.006)], 1, rounds=9, limit=1e9)
    assert second_ms / first_ms == pytest.approx(3.0)
    assert time_calls_in_turn([wait(0.01)], 1, rounds=99, limit=0.05) == [pytest.approx(20.0)]


def test_quiet_ignores_what_only_adds_time(passing):
    calls = iter([0.02] * 6 + [0.002] * 100)
    assert find_lowest_median(
        lambda: passing(next(calls)), 1, rounds=5, limit=0.3
    ) == pytest.approx(2.0)


def test_generators_that_are_dictated_to_take_as_many_steps_and_give_just_that(run_folder):
    import numpy as np

    from mmcompress.runtime.replay import GenerationTrace

    images = [np.full((32, 32, 3), v, np.uint8) for v in (0, 90, 255)]
    requests = [{"image": i} for i in images]
    pair = {"a": load_bundle(run_folder / "baseline"), "b": load_bundle(run_folder / "bundle")}
    said = end_to_end({"a": pair["a"]}, requests, 0, 5)["a"].traces
    assert [set(s) for s in said] == [{"captioner"}] * 3
    found = end_to_end(pair, requests, 0, 6, said)
    mean = sum(w.steps for s in said for w in s["captioner"]) / 3
    assert (
        found["a"].calls["captioner/step"]
        == found["b"].calls["captioner/step"]
        == pytest.approx(mean)
    )
    line = GenerationTrace(
        steps=5, sequences=((-0.5, (1, 7, 2)),) * pair["b"].nodes["captioner"].generation.beams
    )
    longer = end_to_end(pair, requests, 0, 3, [{"captioner": (line,)}] * 3)
    assert longer["b"].calls["captioner/step"] == 5

    writer, eye = pair["b"].nodes["captioner"], pair["b"].nodes["vision"](images[0])["tokens"]
    free = writer(eye)
    writer.replay = (line,)
    assert writer(eye)["scores"] == [-0.5] * len(line.sequences)
    before = writer.step_session.calls
    assert writer(np.concatenate([eye, eye]))["scores"] == [-0.5] * len(
        line.sequences
    )  # windows share what was written of one
    assert writer.step_session.calls - before == 5
    writer.replay = ()
    assert writer(eye) == free


def test_what_follows_the_moves_of_beams_is_fed_the_same_and_moves_its_cache_alike():
    import numpy as np

    from mmcompress.runtime.beam_search import Generation, beam_search

    g, width = Generation(bos=0, eos=1, pad=2, beams=3, max_tokens=12), 20

    def run(seed, g, **how):
        rng, fed = np.random.default_rng(seed), []

        def step(ids, position, past):
            trail = np.concatenate([past[0], ids.astype(np.float32)], 1)
            fed.append((ids.tolist(), past[0].tolist()))
            scores = rng.normal(size=(len(ids), width)).astype(np.float32)
            return TokenScores(scores), [trail]

        return beam_search(step, [np.zeros((3, 0), np.float32)], generation=g, **how), fed

    made = []
    _, free = run(0, g, made_moves=made)
    assert len(made) == len(free) - 1 and any(beams != (0, 1, 2) for beams, _ in made)
    _, followed = run(1, g.set_pace(len(free)), moves_to_follow=made)
    assert followed == free
    assert run(1, g.set_pace(len(free)))[1] != free


def test_a_paced_generator_takes_its_steps_though_every_token_would_end_it():
    import numpy as np

    from mmcompress.runtime.beam_search import Generation, beam_search

    g, calls = Generation(bos=0, eos=1, pad=2, beams=2, max_tokens=12), []

    def step(ids, position, past):
        calls.append(position)
        row = np.log(np.array([[1e-6, 1.0, 1e-6, 1e-6]], np.float32))
        return TokenScores(np.tile(row, (len(ids), 1))), past

    for how, steps in (
        (g, 1),
        (g.set_pace(7), 7),
        (replace(g, early_stopping=True).set_pace(30), 30),
    ):
        calls.clear()
        beam_search(step, [np.zeros((2, 0), np.float32)], generation=how)
        assert len(calls) == steps or (how is g and len(calls) < 12)


def test_the_critical_path_is_the_longest_way():
    from mmcompress.runtime.graph import sum_critical_path

    reads = {"eye": (), "ear": (), "writer": ("eye",), "choose": ("writer", "ear")}
    assert sum_critical_path({"eye": 1.0, "ear": 5.0, "writer": 3.0}, reads) == 5.0
    assert sum_critical_path({"eye": 3.0, "ear": 5.0, "writer": 3.0}, reads) == 6.0
    assert sum_critical_path({}, {}) == 0.0


def test_branches_run_at_the_same_time_and_say_the_same(run_folder, tmp_path):
    import json
    import shutil

    import numpy as np

    shutil.copytree(run_folder / "bundle", tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["parallel"] is False
    (tmp_path / "b" / "manifest.json").write_text(json.dumps({**manifest, "parallel": True}))
    one, many = load_bundle(run_folder / "bundle"), load_bundle(tmp_path / "b")
    rng = np.random.default_rng(0)
    for image in rng.integers(0, 255, (4, 32, 32, 3), np.uint8):
        a, b = one(image=image), many(image=image)
        assert a["caption"] == b["caption"] and np.array_equal(a["embedding"], b["embedding"])
    assert many.reads["choose"] == {
        "vision",
        "text",
        "captioner",
    } and 0 < many.session_seconds <= sum(many.model_seconds.values())
    both = threading.Barrier(2)

    def meet(**_):  # neither goes on without the other
        both.wait(60)
        return {}

    many.nodes = {"vision": meet, "text": meet}
    many.wiring = {"vision": {}, "text": {}}
    many.reads = {"vision": set(), "text": set()}
    many.run(image=image)  # or the barrier breaks


@pytest.mark.very_slow
def test_what_is_predicted_of_parallel_branches_is_what_was_measured(tiny, tmp_path, machine):
    from mmcompress.graph.structure import Candidate
    from mmcompress.run.predictor import build_predictor
    from mmcompress.run.profile import profile_pipeline
    from mmcompress.workspace import context as workflow

    precisions = {f"nodes.{node}.precision": "fp32" for node in ("vision", "captioner", "text")}
    changes = {"measure.parallel": True, **precisions}
    r = workflow.open_run(tiny / "spec.yaml", tmp_path / "r", overrides=changes, **machine)
    dense = profile_pipeline(r)
    predict = build_predictor(r, dense)
    assert predict.reads["choose"] == ("captioner", "text", "vision")
    whole = Candidate(
        kept_units={n: {} for n in r.models}, precision=dict.fromkeys(r.models, "fp32")
    )
    assert predict(whole) == pytest.approx(dense.latency_ms.p50, rel=1e-3)


def test_a_node_is_fitted_from_pipelines_whole_small_and_without_some_blocks():
    """Base, scale and what every block costs beside its units are told apart; the whole is exact; none is negative."""
    from mmcompress.measure.cost_model.predictor import LinearFit

    sums, blocks, real = (
        [4.0, 1.0, 1.2],
        [8, 8, 4],
        LinearFit(base=0.5, scale=1.4, per_block_ms=0.05),
    )
    ms = [
        real.base + real.scale * s + real.per_block_ms * b
        for s, b in zip(sums, blocks, strict=True)
    ]
    found = LinearFit.fit_in_pipeline(sums, blocks, measured_ms=ms)
    assert (found.base, found.scale, found.per_block_ms) == pytest.approx((0.5, 1.4, 0.05))
    odd = LinearFit.fit_in_pipeline(
        sums, blocks, measured_ms=[4.0, 0.9, 1.4]
    )  # less than proportional: no negative base makes up for it
    assert min(odd.base, odd.scale, odd.per_block_ms) >= 0
    assert odd.base + odd.scale * 4.0 + odd.per_block_ms * 8 == pytest.approx(4.0)
