"""A search over two nodes of two blocks each, in milliseconds: its problem, and how it is run.

A process that imports this file needs neither torch nor a cluster.
"""

from __future__ import annotations

from deadly_trials import evaluate_units

from mmcompress.graph.blocks import Block, count_steps, count_units_after
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.device_table import DeviceTable, TableRow
from mmcompress.measure.cost_model.microbenchmarks import TableKey
from mmcompress.measure.cost_model.predictor import DeployedBlock, LinearFit, Predictor
from mmcompress.runtime.progress import ignore_progress
from mmcompress.search import study
from mmcompress.search.executors import InlineExecutor
from mmcompress.search.ordered_study import OrderedTrials, run_ordered_study
from mmcompress.search.problem import SearchProblem
from mmcompress.search.search_session import SearchEffort, SessionInputs, run_study
from mmcompress.spec.space import Dimension, Space


def block(name, units=64, step=16):
    return Block(
        name=name,
        kind="ffn",
        reader=name,
        writers=(),
        units=units,
        width=1,
        granularity=step,
        module=name,
        reads=("stream",),
        drop=((name, "plain"),),
    )


BLOCKS = {"a": (block("0"), block("1")), "b": (block("0"), block("1"))}
KEY = TableKey(kind="ffn", width=8, head=1, positions=1, keys=1, batch=1)
TABLE = DeviceTable(
    device="here",
    threads=1,
    rows=tuple(
        TableRow(key=KEY, precision=p, units=(16, 64), ms=(0.25 * f, 1.0 * f))
        for p, f in (("fp32", 1.0), ("int8", 0.5))
    ),
)
PLACED = {
    n: tuple(
        DeployedBlock(name=b.name, units=b.units, granularity=b.granularity, key=KEY, calls=1.0)
        for b in bs
    )
    for n, bs in BLOCKS.items()
}
PREDICT = Predictor(
    table=TABLE,
    deployed=PLACED,
    fits={n: {p: LinearFit(base=0.1, scale=1.0) for p in ("fp32", "int8")} for n in BLOCKS},
    overhead_ms=0.2,
)
SPACE = Space(
    name="s",
    dimensions={f"nodes.{n}.prune.ffn": Dimension(low=0.0, high=0.9) for n in BLOCKS}
    | {f"nodes.{n}.precision": Dimension(choices=("fp32", "int8")) for n in BLOCKS},
)


KEPT = {n: dict.fromkeys(("0", "1"), 32) for n in BLOCKS}


def resolve_in_steps(overrides):
    """Cut each block by the steps that are nearest to the share of its node."""
    kept = {}
    for node, node_blocks in BLOCKS.items():
        share = overrides.get(f"nodes.{node}.prune.ffn", 0)
        kept[node] = {
            block.name: int(count_units_after(block, round(share * count_steps(block))))
            for block in node_blocks
        }
    return Candidate(
        kept_units=kept,
        precision={n: overrides.get(f"nodes.{n}.precision", "fp32") for n in BLOCKS},
    )


def problem(budget=2.5):
    return SearchProblem(
        space=SPACE,
        blocks=BLOCKS,
        resolve=resolve_in_steps,
        predict=PREDICT,
        budget_ms=budget,
        precisions=dict.fromkeys(BLOCKS, ("fp32", "int8")),
    )


def go(path, evaluate=evaluate_units, **options):
    """Search the small space; `make_inputs` has the options."""
    inputs = make_inputs(evaluate, **options)
    return run_study(study.open_study(path), problem(), inputs=inputs)


def make_inputs(
    evaluate=evaluate_units,
    trials=10,
    mutations=6,
    max_results=0,
    executor=None,
    workers=1,
    retries=0,
    starts=(),
    seeds=(),
    sampler="tpe",
    progress=None,
):
    """Return what a search of the small space works with."""
    return SessionInputs(
        executor=executor or InlineExecutor(None),
        evaluate=evaluate,
        starts=starts,
        seeds=[("knapsack", c) for c in seeds],
        effort=SearchEffort(
            trials=trials,
            level_switches=mutations,
            max_results=max_results,
            workers=workers,
            retries=retries,
        ),
        seed=0,
        sampler=sampler,
        progress=progress or ignore_progress,
    )


def go_in_order(
    path,
    evaluate=evaluate_units,
    executor=None,
    trials=14,
    mutations=8,
    sampler="tpe",
    artifact=0,
):
    """Search deterministically, in batches of four."""
    book = study.open_study(path)
    ordered = OrderedTrials()
    ordered.begin(book, artifact)
    half = Candidate(
        kept_units={n: dict.fromkeys(("0", "1"), 32) for n in BLOCKS},
        precision=dict.fromkeys(BLOCKS, "int8"),
    )
    inputs = SessionInputs(
        executor=executor or InlineExecutor(None),
        evaluate=evaluate,
        starts=[{f"nodes.{n}.prune.ffn": 0.45 for n in BLOCKS}],
        seeds=[("knapsack", half)],
        effort=SearchEffort(trials=trials, level_switches=mutations, retries=0, batch=4),
        seed=3,
        sampler=sampler,
    )
    return run_ordered_study(book, problem(), inputs=inputs, ordered=ordered)
