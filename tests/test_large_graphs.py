"""Graphs of many tiny nodes: what ten times as many take, in processor seconds of this process."""

from __future__ import annotations

import itertools
import time

import pytest

from mmcompress.graph.load_spec import load_spec
from mmcompress.run.fit_structure import open_search
from mmcompress.run.stages import prepare_run
from mmcompress.workspace.context import open_run

COUNTS = (3, 30, 300)
"""Nodes of the graphs."""

MAX_RATIO = 15
"""Seconds of 300 nodes / seconds of 30."""

OVERRIDES = {
    "prune.importance": "fisher",
    "prune.sensitivity": "estimated",
    "quantize.max_loss_increase": 0,
    "search.evaluator": "estimated",
    "search.linearization_rounds": 0,
    "search.trials": 6,
    "search.level_switches": 4,
    "metrics": ["embedding"],
}
"""Losses are sums of estimates: what is measured here is the graph, not the models."""


def write_graph(tiny, path, count):
    """Write a spec of so many image encoders that read the same image."""
    nodes = [
        f"  v{i}: {{kind: image_encoder, source: {tiny}/clip, inputs: {{image: image}}}}"
        for i in range(count)
    ]
    outputs = ", ".join(f"e{i}: v{i}.embedding" for i in range(count))
    tail = (tiny / "spec.yaml").read_text().partition("data:\n")[2]
    path.write_text(
        "name: many\ninputs: {image: image}\nnodes:\n"
        + "\n".join(nodes)
        + f"\noutputs: {{{outputs}}}\ndata:\n{tail}"
    )
    return path


@pytest.mark.very_slow
@pytest.mark.timeout(1200)
def test_ten_times_the_nodes_take_at_most_fifteen_times_as_long(tiny, tmp_path, machine):
    seconds = {}
    for count in COUNTS:
        spec_path = write_graph(tiny, tmp_path / f"{count}.yaml", count)
        marks = [time.process_time()]
        spec = load_spec(spec_path, OVERRIDES)
        marks.append(time.process_time())
        run = open_run(spec_path, tmp_path / f"r{count}", overrides=OVERRIDES, **machine)
        prepared = prepare_run(run)
        marks.append(time.process_time())
        budget_ms = 0.8 * prepared.dense.latency_ms.p50
        with open_search(prepared.run, prepared.sensitivity) as propose:
            trial = propose(prepared.predictor, budget_ms, attempt=0)
        marks.append(time.process_time())
        assert len(spec.nodes) == count and trial.latency_ms <= budget_ms
        parts = [end - start for start, end in itertools.pairwise(marks)]
        seconds[count] = dict(zip(("validate", "profile", "search"), parts, strict=True))
    for part in ("validate", "profile", "search"):
        # Below a tenth of a second, fixed costs hide the rest.
        assert seconds[300][part] <= MAX_RATIO * max(seconds[30][part], 0.1), seconds
    assert sum(seconds[300].values()) <= MAX_RATIO * sum(seconds[30].values()), seconds
