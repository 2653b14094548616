"""Measure latencies on the node of a Ray cluster that is the target device.

A measurement reserves every CPU and GPU of that node, so nothing else of the cluster runs there
meanwhile. Bundles and requests travel through Ray's object store, which keeps them on the node.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmcompress.errors import ClusterError, MmcompressError
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.cost_model.device_table import DeviceTable, TableNeed
from mmcompress.measure.cost_model.plan import Export
from mmcompress.measure.latency.bench import Samples
from mmcompress.measure.latency.benchmark_in_subprocess import (
    REQUESTS_FILE,
    BenchmarkJob,
    SavedRequest,
)
from mmcompress.runtime.bundle import read_manifest
from mmcompress.runtime.check_manifest import TEXT_TYPE
from mmcompress.runtime.progress import StageProgress, ignore_progress
from mmcompress.runtime.providers import CPU_PROVIDER
from mmcompress.search.executors import ExecutorSettings
from mmcompress.search.ray_executor import use_ray
from mmcompress.spec.schema import Spec

FolderContent = dict[str, bytes]
"""What the files of a folder hold, by their path in it."""

Answer = TypeVar("Answer")

MAX_KEPT_BUNDLES = 8
"""Bundles that stay in the object store: a comparison loads the same few again and again."""


@dataclass(frozen=True, kw_only=True)
class MeasuringNode:
    """The node of a cluster where latencies are measured."""

    node_id: str
    """Ray's name of it."""
    address: str
    """Its address, for a person."""
    reserved: dict[str, float]
    """What a measurement reserves: all CPUs and GPUs, and the resources that the spec names."""


@contextmanager
def open_node_benchmarker(spec: Spec) -> Iterator[Benchmarker]:
    """Give a benchmarker that measures on the node of `resources.measure`.

    Raises:
        ClusterError: No cluster answers, or no node of it carries the resources.
    """
    trial = spec.resources.trial
    with use_ray(ExecutorSettings.from_spec(spec), cpus=spec.search.workers * trial.cpu):
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        yield NodeBenchmarker(choose_node(nodes, spec.resources.measure.custom))


def choose_node(nodes: Sequence[Mapping[str, Any]], custom: Mapping[str, float]) -> MeasuringNode:
    """Return the node that carries the resources; the first one by its name where several do.

    Args:
        nodes: The nodes of the cluster, as Ray lists them.
        custom: The resources that the spec names.

    Raises:
        ClusterError: No node that is alive carries all of them.
    """
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in sorted(custom.items()))
    alive = [node for node in nodes if node["Alive"]]
    for node in sorted(alive, key=_get_node_id):
        available: dict[str, float] = node["Resources"]
        if all(available.get(name, 0.0) >= amount for name, amount in custom.items()):
            return MeasuringNode(
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
                reserved={
                    "CPU": available.get("CPU", 0.0),
                    "GPU": available.get("GPU", 0.0),
                    **custom,
                },
            )
    raise ClusterError(
        f"resources.measure: none of the {len(alive)} nodes of the cluster carries {wanted}. "
        "Start the node of the target device with it, as in "
        f"`ray start --address HEAD:6379 --resources '{{\"{min(custom)}\": 1}}'`"
    )


def _get_node_id(node: Mapping[str, Any]) -> str:
    return str(node["NodeID"])


class NodeBenchmarker(Benchmarker):
    """Measures on one node of a cluster, which it has for itself meanwhile.

    Args:
        node: The node.
    """

    def __init__(self, node: MeasuringNode):
        self.node = node
        self._kept_bundles: dict[str, ray.ObjectRef[FolderContent]] = {}

    def complete_device_table(
        self,
        needs: Iterable[TableNeed],
        threads: int,
        *,
        precisions: Sequence[str],
        progress: StageProgress,
        provider: str = CPU_PROVIDER,
    ) -> DeviceTable:
        progress(f"on the node {self.node.address}, which keeps the table", 0.0)
        return self.call_alone(
            partial(
                _complete_table_there,
                tuple(needs),
                threads=threads,
                precisions=tuple(precisions),
                provider=provider,
            )
        )

    def time_export(
        self, export: Export, folder: Path, *, threads: int, provider: str = CPU_PROVIDER
    ) -> float:
        content: FolderContent = {}
        for call in export.graphs.values():
            for name in (call.file, call.feed):
                content[name] = (folder / name).read_bytes()
                # Weights beyond the limit of a graph lie in a file beside it.
                for path in folder.glob(f"{name}.*"):
                    content[path.relative_to(folder).as_posix()] = path.read_bytes()
        return self.call_alone(
            partial(_time_export_there, export, content, threads=threads, provider=provider)
        )

    def benchmark_bundles(self, job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
        bundles = {name: self._send_bundle(Path(place)) for name, place in job.bundles.items()}
        requests, files = pack_request_files(job)
        shipment = _BundleShipment(
            job=replace(job, requests=requests, bundles={}),
            arrays=(folder / REQUESTS_FILE).read_bytes(),
            request_files=files,
            file_inputs=list_file_inputs(job),
            bundles=bundles,
        )
        return self.call_alone(partial(_benchmark_there, shipment))

    def measure_memory_mb(self, bundle: Path | None = None) -> float:
        content = self._send_bundle(bundle) if bundle else None
        return self.call_alone(partial(_measure_memory_there, content))

    def describe_cpu(self) -> dict[str, Any]:
        return self.call_alone(_describe_cpu_there)

    def fingerprint_device(self, threads: int, provider: str = CPU_PROVIDER) -> str:
        return self.call_alone(partial(_fingerprint_there, threads, provider=provider))

    def call_alone(self, function: Callable[[], Answer]) -> Answer:
        """Call a function on the node, while nothing else of the cluster runs there.

        Raises:
            MmcompressError: What the function raises.
            ClusterError: The node is lost, or its worker was killed twice.
        """
        reserved = dict(self.node.reserved)
        remote: Any = ray.remote(_call).options(
            num_cpus=reserved.pop("CPU"),
            num_gpus=reserved.pop("GPU"),
            resources=reserved,
            max_retries=1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                node_id=self.node.node_id, soft=False
            ),
        )
        try:
            answer: Answer = ray.get(remote.remote(function))
        except RayTaskError as error:
            if isinstance(error.cause, MmcompressError):
                raise error.cause from error
            raise
        except RayError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ClusterError(
                f"the node {self.node.address}, where latencies are measured, gives no answer: "
                f"{reason}"
            ) from error
        return answer

    def _send_bundle(self, bundle: Path) -> ray.ObjectRef[FolderContent]:
        """Put a bundle into the object store, unless the same one is there."""
        # The manifest holds the hash of every other file.
        digest = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
        if digest not in self._kept_bundles:
            if len(self._kept_bundles) == MAX_KEPT_BUNDLES:
                del self._kept_bundles[next(iter(self._kept_bundles))]
            self._kept_bundles[digest] = ray.put(_read_folder(bundle))
        return self._kept_bundles[digest]


@dataclass(frozen=True, kw_only=True)
class _BundleShipment:
    """What a node needs to measure bundles."""

    job: BenchmarkJob
    """The job. Its bundles are those below; its requests name files by their place there."""
    arrays: bytes
    """The arrays of the requests, as they lie in `requests.npz`."""
    request_files: FolderContent
    """The files that requests name: pictures and recordings."""
    file_inputs: frozenset[str]
    """The inputs that name files."""
    bundles: dict[str, ray.ObjectRef[FolderContent]]
    """The bundles by name."""


def list_file_inputs(job: BenchmarkJob) -> frozenset[str]:
    """List the inputs of the bundles of a job that are no texts: a text there names a file."""
    manifest = read_manifest(Path(next(iter(job.bundles.values()))))
    input_types: dict[str, str] = manifest["graph"]["inputs"]
    return frozenset(name for name, value_type in input_types.items() if value_type != TEXT_TYPE)


def pack_request_files(job: BenchmarkJob) -> tuple[tuple[SavedRequest, ...], FolderContent]:
    """Return the requests of a job with files named by their place, and these files.

    An input that is no text and is given as one is the name of a file.
    """
    file_inputs = list_file_inputs(job)
    packed_requests: list[SavedRequest] = []
    places: dict[str, str] = {}
    files: FolderContent = {}
    for request in job.requests:
        packed: SavedRequest = {}
        for name, value in request.items():
            if isinstance(value, str) and name in file_inputs:
                if value not in places:
                    path = Path(value)
                    places[value] = f"{len(places)}{path.suffix}"
                    files[places[value]] = path.read_bytes()
                packed[name] = places[value]
            else:
                packed[name] = value
        packed_requests.append(packed)
    return tuple(packed_requests), files


def _read_folder(folder: Path) -> FolderContent:
    """Read all files of a folder."""
    content: FolderContent = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content[path.relative_to(folder).as_posix()] = path.read_bytes()
    return content


def _write_folder(folder: Path, content: FolderContent) -> Path:
    """Write files into a new folder, and return it."""
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


# What runs on the node. Ray sends these functions by their name: the nodes have this package.


def _call(function: Callable[[], Answer]) -> Answer:
    return function()


def _complete_table_there(
    needs: Sequence[TableNeed], *, threads: int, precisions: Sequence[str], provider: str
) -> DeviceTable:
    return Benchmarker().complete_device_table(
        needs, threads, precisions=precisions, progress=ignore_progress, provider=provider
    )


def _time_export_there(
    export: Export, content: FolderContent, *, threads: int, provider: str
) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        folder = _write_folder(Path(scratch), content)
        return Benchmarker().time_export(export, folder, threads=threads, provider=provider)


def _benchmark_there(shipment: _BundleShipment) -> dict[str, Samples]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundles: dict[str, str] = {}
        for name, reference in shipment.bundles.items():
            bundles[name] = str(_write_folder(folder / "bundles" / name, ray.get(reference)))
        files = _write_folder(folder / "files", shipment.request_files)
        requests: list[SavedRequest] = []
        for request in shipment.job.requests:
            placed = dict(request)
            for name, value in request.items():
                if isinstance(value, str) and name in shipment.file_inputs:
                    placed[name] = str(files / value)
            requests.append(placed)
        (folder / REQUESTS_FILE).write_bytes(shipment.arrays)
        job = replace(shipment.job, bundles=bundles, requests=tuple(requests))
        return Benchmarker().benchmark_bundles(job, folder)


def _measure_memory_there(content: ray.ObjectRef[FolderContent] | None) -> float:
    if content is None:
        return Benchmarker().measure_memory_mb()
    with tempfile.TemporaryDirectory() as scratch:
        return Benchmarker().measure_memory_mb(_write_folder(Path(scratch), ray.get(content)))


def _describe_cpu_there() -> dict[str, Any]:
    return Benchmarker().describe_cpu()


def _fingerprint_there(threads: int, *, provider: str) -> str:
    return Benchmarker().fingerprint_device(threads, provider)
