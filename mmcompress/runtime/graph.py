"""A bundle as a callable: the graph of `manifest.json` executed in order."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import BundleError, DataError
from mmcompress.registry import NODE_KINDS, resolve_entry
from mmcompress.runtime.bundle import Manifest, read_manifest, verify_files
from mmcompress.runtime.machine import describe_cpu
from mmcompress.runtime.sessions import TimedSession


def sum_critical_path(seconds: Mapping[str, float], reads: Mapping[str, Collection[str]]) -> float:
    """The longest way through a graph whose nodes take so long each; `reads`: the nodes that each waits for."""
    ends: dict[str, float] = {}

    def end(node: str) -> float:
        if node not in ends:
            ends[node] = seconds.get(node, 0.0) + max((end(n) for n in reads[node]), default=0.0)
        return ends[node]

    return max(map(end, reads), default=0.0)


class Pipeline:
    """Callable with the pipeline's inputs by name; gives its outputs by name.

    After each call `node_seconds` holds the wall time of every node and `model_seconds` the part of each spent inside
    its model sessions, `inside` what of the whole was: their sum, or where branches run in parallel the longest way.
    Not safe for concurrent calls: load one per thread.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int):
        self.folder, self.manifest, self.threads = folder, manifest, threads
        graph = manifest["graph"]
        self.inputs: dict[str, str] = graph["inputs"]
        self.outputs: dict[str, str] = graph["outputs"]
        self.wiring: dict[str, dict[str, str]] = {}
        self.nodes: dict[str, Any] = {}
        self.sessions: dict[str, dict[str, TimedSession]] = {}
        for name, node in graph["nodes"].items():
            if node["kind"] not in NODE_KINDS.names():
                raise BundleError(
                    f"{folder}: node '{name}' is of kind '{node['kind']}', which this runtime doesn't know"
                )
            if (needed := set(node.get("cpu_flags", ()))) and not needed & set(
                describe_cpu()["flags"]
            ):
                raise BundleError(
                    f"{folder}: node '{name}' is in {node['precision']}, which needs a CPU with one of "
                    f"{', '.join(sorted(needed))}: without, its results would be wrong"
                )
            self.sessions[name] = {
                k: TimedSession(folder / f, threads) for k, f in node.get("files", {}).items()
            }
            self.nodes[name] = resolve_entry(NODE_KINDS.get(node["kind"]).deployed)(
                self.sessions[name], node.get("config", {}), folder
            )
            self.wiring[name] = node["inputs"]
        self.node_seconds: dict[str, float] = {}
        self.model_seconds: dict[str, float] = {}
        sources = lambda wires: {r.partition(".")[0] for r in wires.values()} & set(self.nodes)
        self.reads = {n: sources(wires) for n, wires in self.wiring.items()}
        self.pool = ThreadPoolExecutor(len(self.nodes)) if manifest.get("parallel") else None

    def make_noise_request(self) -> dict[str, Any]:
        """A request of the right kind that says nothing: a picture of 224 x 224 pixels, or two seconds of sound."""
        name, kind = next(iter(self.inputs.items()))
        rng = np.random.default_rng(0)
        if kind == "image":
            return {name: rng.integers(0, 255, (224, 224, 3), np.uint8)}
        return {name: rng.normal(0, 0.1, 32_000).astype(np.float32)}

    @property
    def session_seconds(self) -> float:
        return (
            sum_critical_path(self.model_seconds, self.reads)
            if self.pool
            else sum(self.model_seconds.values())
        )

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        values = self.run(**inputs)
        return {name: self.value_of(values, reference) for name, reference in self.outputs.items()}

    def run(self, **inputs: Any) -> dict[str, dict[str, Any]]:
        """Every node's outputs. Raises `DataError` for a missing or unknown input."""
        if set(inputs) != set(self.inputs):
            raise DataError(
                f"this pipeline takes {', '.join(self.inputs)}; got {', '.join(inputs) or 'nothing'}"
            )
        values: dict[str, dict[str, Any]] = {name: {"": v} for name, v in inputs.items()}
        if self.pool is None:
            for name in self.nodes:
                self._answer(name, values)
            return values
        waiting, done = dict(self.reads), set(inputs)
        running: dict[Future, str] = {}
        while waiting or running:
            for name in [n for n, needed in waiting.items() if needed <= done]:
                del waiting[name]
                running[self.pool.submit(self._answer, name, values)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done.add(running.pop(future))
                future.result()
        return values

    def _answer(self, name: str, values: dict[str, dict[str, Any]]) -> None:
        feed = {
            port: self.value_of(values, reference) for port, reference in self.wiring[name].items()
        }
        before = sum(s.seconds for s in self.sessions[name].values())
        start = time.perf_counter()
        values[name] = self.nodes[name](**feed)
        self.node_seconds[name] = time.perf_counter() - start
        self.model_seconds[name] = sum(s.seconds for s in self.sessions[name].values()) - before

    @staticmethod
    def value_of(values: dict[str, dict[str, Any]], reference: str) -> Any:
        node, _, port = reference.partition(".")
        return values[node][port]


def load_bundle(bundle: str | Path, threads: int | None = None) -> Pipeline:
    """Load a bundle after checking every file. `threads` defaults to what it was measured with.

    Raises `BundleError` when a file is missing, altered or unreadable.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    try:
        return Pipeline(folder, manifest, threads=threads or int(manifest.get("threads", 1)))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BundleError(f"{folder}/manifest.json: damaged: {type(e).__name__}: {e}") from e
