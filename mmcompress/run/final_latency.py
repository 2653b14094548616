"""The latency of both bundles, measured in turn and in several parts spread over the evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.drift import (
    compute_machine_speed_factor,
    include_latest_run,
)
from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement
from mmcompress.measure.cost_model.plan import DENSE_NAME
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.latency.bench import (
    MAX_REQUESTS_FACTOR,
    BenchmarkOptions,
    PipelineLatency,
    Samples,
    bench_repeats,
    choose_comparison_seconds,
    has_time_budget,
    summarize_pipelines,
)
from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated
from mmcompress.results.records import FreeWriting
from mmcompress.run.answers import list_bundles
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.free_writing import estimate_free_writing
from mmcompress.run.profile import Profile, count_bench_batches, load_bench_requests
from mmcompress.run.run_policy import MeasuringLimits
from mmcompress.run.structure_benchmark import find_reference_bundles
from mmcompress.stats import Latency, estimate_relative_margin, summarize_latency
from mmcompress.workspace.context import RunContext


class FinalLatency:
    """Measures both bundles, and the reference pipelines that show how fast the machine is now.

    There is one part before and one after every split that is judged. For a machine that others use
    is faster and slower by the minute, and not equally so for large and small models. Bundles stay
    loaded as long as those of a fit. Loaded for three seconds, a small pipeline seems 1 to 2 %
    quicker beside a large one than when it is loaded for eight.
    """

    def __init__(self, run: RunContext, *, dense: Profile, candidate: Candidate):
        self._run = run
        self._dense = dense
        self._candidate = candidate
        self._references: dict[str, Path] = {}
        if not run.device_readings:
            self._references = find_reference_bundles(run, candidate, dense=dense)
        self._parts: list[dict[str, Samples]] = []

    @property
    def repeats(self) -> int:
        """In how many parts the latency was measured."""
        return len(self._parts)

    def measure_part(self) -> None:
        """Measure all bundles in turn for a while, from the request where the part before ended.

        Nothing is measured for another device.
        """
        run = self._run
        if run.device_readings:
            self._parts.append({})
            return
        measure = run.spec.measure
        dense_ms = self._dense.latency_ms.p50
        expected_parts = 2 + len(run.spec.data.report)
        # Two bundles share the time of a part; every reference adds half of theirs.
        share = (1 + len(self._references) / 2) / expected_parts
        min_requests = -(-measure.requests // expected_parts)
        sent = sum(len(part["baseline"].ms) for part in self._parts)
        run.on_progress("measure", "baseline and compressed, interleaved", None)
        with run.time_stage("measure"):
            samples = bench_repeated(
                {**list_bundles(run), **self._references},
                load_bench_requests(run),
                options=BenchmarkOptions(
                    warmup=measure.warmup,
                    max_requests=MAX_REQUESTS_FACTOR * min_requests,
                    min_requests=min_requests,
                    seconds=share * choose_comparison_seconds(dense_ms),
                    first_request=sent,
                    threads=measure.threads,
                    batch=measure.batch,
                    loads=max(1, round(share * bench_repeats(dense_ms))),
                ),
                benchmark=run.bench.benchmark_bundles,
            )
        self._parts.append(samples)

    def measure_until_certain(self, limits: MeasuringLimits) -> None:
        """Measure further parts until the ratio of the two latencies is certain enough."""
        if self._run.device_readings or not has_time_budget(self._dense.latency_ms.p50):
            return
        while self.repeats < limits.max_parts and self.estimate_margin() > limits.wanted_margin:
            self.measure_part()

    def estimate_margin(self) -> float:
        """Return the share that the ratio of the two latencies may be off by.

        It is the half-width of the interval of 95 % over the loads, each with its own ratio. Within
        a load, the requests share the speed of the machine and the places of the weights in memory.
        0 where nothing is measured.
        """
        if self._run.device_readings:
            return 0.0
        statistic = self._run.goal.statistic
        ratios: list[float] = []
        for part in self._parts:
            compressed_loads = part["compressed"].split_loads()
            dense_loads = part["baseline"].split_loads()
            for compressed_ms, dense_ms in zip(compressed_loads, dense_loads, strict=True):
                compressed = getattr(summarize_latency(compressed_ms), statistic)
                dense = getattr(summarize_latency(dense_ms), statistic)
                ratios.append(compressed / dense)
        return estimate_relative_margin(ratios)

    def summarize(self, predictor: Predictor) -> dict[str, PipelineMeasurement]:
        """Return the latency of both sides over all parts.

        For another device these are what it measured of the dense pipeline, and what is predicted
        of the compressed one.
        """
        if self._run.device_readings:
            dense = self._run.device_readings.baseline
            unscaled = replace(predictor, p95_ratio=1.0)
            compressed = _predict_measurement(unscaled, self._candidate, dense=dense)
            return {"baseline": dense, "compressed": compressed}
        return {
            name: PipelineMeasurement.from_latency(latency)
            for name, latency in self._sum_parts().items()
        }

    def estimate_writing(self, fitted: FittedStructure) -> FreeWriting:
        """Return what it costs that generators write freely; nothing where nothing is measured."""
        if self._run.device_readings:
            return FreeWriting()
        samples = self._join_parts()
        return estimate_free_writing(
            samples["compressed"],
            samples["baseline"],
            fitted=fitted,
            distinct_requests=count_bench_batches(self._run),
            statistic=self._run.goal.statistic,
        )

    def estimate_speed_factor(self) -> float:
        """Return latency of the artifact on this machine in the long run / latency measured now.

        It is 1 where no reference pipeline was measured, or where the target is in milliseconds.
        """
        if not self._references or self._run.goal.kind != "speedup":
            return 1.0
        samples = self._join_parts()
        compressed = samples.pop("compressed").summarize()
        node_ms = {name: latency.p50 for name, latency in compressed.nodes.items()}
        samples[DENSE_NAME] = samples.pop("baseline")
        # This is not added to the record: there generators replay, here they write freely.
        runs = include_latest_run(self._run.shared.reference_runs, samples)
        return compute_machine_speed_factor(node_ms, self._candidate.precision, reference_runs=runs)

    def _sum_parts(self) -> dict[str, PipelineLatency]:
        """Return the latency of every bundle over all parts."""
        return summarize_pipelines(self._join_parts())

    def _join_parts(self) -> dict[str, Samples]:
        """Return what was observed of every bundle in all parts."""
        joined = {}
        for name in self._parts[0]:
            samples = Samples()
            for part in self._parts:
                samples = samples + part[name]
            joined[name] = samples
        return joined


def _predict_measurement(
    predictor: Predictor, candidate: Candidate, *, dense: PipelineMeasurement
) -> PipelineMeasurement:
    """Return the prediction for another device in the form of a measurement of no samples.

    Args:
        predictor: Predicts medians.
        candidate: The structure.
        dense: What the device measured of the dense pipeline; its p95 / p50 is taken over.
    """
    p50 = predictor(candidate)
    p95_ratio = dense.latency.p95 / dense.latency.p50
    nodes = {}
    for node_name in predictor.deployed:
        node_ms = predictor.predict_node_ms(node_name, candidate)
        nodes[node_name] = Latency(p50=node_ms, p95=node_ms * p95_ratio, n=0)
    outside_ms = predictor.overhead_ms + predictor.combine_node_ms(predictor.outside_sessions_ms)
    return replace(
        dense,
        latency=Latency(p50=p50, p95=p50 * p95_ratio, n=0),
        nodes=nodes,
        model_share=1 - predictor.correction * outside_ms / p50,
    )
