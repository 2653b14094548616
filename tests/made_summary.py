"""Summaries made by hand: what pages and charts show, without a run and without torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate
from mmcompress.results.records import (
    Attempt,
    Bound,
    NodeResult,
    Proof,
    Sample,
    SearchResult,
    ShownInput,
    Side,
    Summary,
    Target,
    Trial,
)
from mmcompress.stats import Latency, Quality

KEPT_UNITS = {"vision": {"0.attention": 2, "0.ffn": 16}, "captioner": {"0.cross_attention": 4}}


def make_quality(value: float, *, is_error_rate: bool = False) -> Quality:
    """A metric with an interval of ten points, cut at 0."""
    return Quality(
        value=value, low=max(value - 0.05, 0), high=value + 0.05, n=24, is_error_rate=is_error_rate
    )


def make_block(name: str, kind: str, *, units: int) -> Block:
    """A block of a name, kind and size; where its layers are doesn't matter here."""
    return Block(
        name=name,
        kind=kind,
        reader="layer.out",
        writers=(),
        units=units,
        width=8,
        granularity=1,
        module="layer",
        reads=("stream",),
        drop=(),
    )


def make_node(latency_ms: float, *, precision: str, cross_modal_ratio: float | None) -> NodeResult:
    """One model."""
    return NodeResult(
        latency_ms_p50=latency_ms,
        params=1_234_567,
        macs=10**6,
        size_mb=4.9,
        precision=precision,
        unimodal_ratio=0.5,
        cross_modal_ratio=cross_modal_ratio,
    )


def make_side(latency_ms: float, *, precision: str, samples: int = 48) -> Side:
    """A pipeline of two models that spends a tenth of a request outside of them."""
    return Side(
        latency_ms=Latency(p50=latency_ms, p95=latency_ms * 1.2, n=samples),
        quality={
            "caption_exact_match": make_quality(0.9),
            "wer": make_quality(1.2, is_error_rate=True),
        },
        size_mb=9.8,
        params=2_469_134,
        nodes={
            "vision": make_node(latency_ms * 0.3, precision=precision, cross_modal_ratio=None),
            "captioner": make_node(latency_ms * 0.6, precision=precision, cross_modal_ratio=0.1),
        },
        model_share=0.9,
        memory_mb=120.0,
    )


def make_trial(number: int, *, latency_ms: float, loss: float, origin: str = "sampler") -> Trial:
    """A trial of the structure that was chosen."""
    precision = {"vision": "int8", "captioner": "int8"}
    return Trial(
        number=number,
        origin=origin,
        overrides={},
        candidate=Candidate(kept_units=KEPT_UNITS, precision=precision),
        latency_ms=latency_ms,
        loss=loss,
        quality={},
        evaluation_seconds=1.0,
    )


def make_summary(**changes: Any) -> Summary:
    """A run that met its target of 2x; `changes` are fields that differ."""
    summary = Summary(
        pipeline="made",
        target=Target(latency_ms=5.0, speedup=2.0, met=True, text="2x"),
        baseline=make_side(10.0, precision="fp32"),
        compressed=make_side(4.8, precision="int8"),
        speedup=10 / 4.8,
        quality_retained=0.97,
        predicted_latency_ms_p50=4.7,
        unimodal_ratio=0.4,
        cross_modal_ratio=0.1,
        kept_units=KEPT_UNITS,
        blocks={
            "vision": (
                make_block("0.attention", "attention", units=4),
                make_block("0.ffn", "ffn", units=32),
            ),
            "captioner": (make_block("0.cross_attention", "cross_attention", units=4),),
        },
        cross_modal_reasons={"captioner": {"0.cross_attention": "values meet: text and <image>"}},
        proofs=(
            Proof(name="torch == onnx", node="vision", difference=1e-6, bound=1e-4, passed=True),
        ),
        search=SearchResult(trials=3, feasible=2, failed=0, seconds=12.0, workers={"a/1": 3}),
        trials=(
            make_trial(0, latency_ms=4.7, loss=0.2),
            make_trial(1, latency_ms=5.4, loss=0.1, origin="mutation"),
            make_trial(2, latency_ms=4.2, loss=0.9),
        ),
        warnings=("wer: the interval is wide",),
        timings={"profile": 3.0, "search": 12.0},
        settings={"measure": {"threads": 2}},
        versions={"mmcompress": "0.1.0", "onnxruntime": "1.20"},
        cpu={"name": "Some CPU", "cores": 4, "flags": ["avx2"], "system": "Linux"},
        seed=7,
        commit="0123456789abcdef",
        command="mmcompress run made.yaml",
        samples=(
            Sample(
                reference="a fox",
                baseline="a fox",
                compressed="a <cat>",
                shown=ShownInput(media="data:image/jpeg;base64,/9j/4AAQ"),
            ),
        ),
        attempts=(Attempt(predicted_ms=4.6, measured_ms=4.9, target_ms=5.0),),
        bench_repeats=3,
    )
    return replace(summary, **changes)


def make_missed_summary() -> Summary:
    """A run that missed its target."""
    target = Target(
        latency_ms=1.0,
        speedup=10.0,
        met=False,
        text="10x p95",
        statistic="p95",
        exceeded_bounds=(Bound(kind="p95", value=5.76, limit=1.0, unit="ms"),),
    )
    return make_summary(target=target)


def make_bare_summary() -> Summary:
    """A run of which every optional record is empty."""
    return make_summary(
        trials=(),
        warnings=(),
        timings={},
        commit="",
        samples=(),
        attempts=(),
        bench_repeats=0,
        proofs=(),
        cross_modal_reasons={},
        cross_modal_ratio=None,
        search=SearchResult(trials=0, feasible=0, failed=0, seconds=0.0),
    )
