"""A bundle as a callable: the graph of `manifest.json`, run node by node."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mmcompress.errors import BundleError, DataError, MmcompressError
from mmcompress.registry import INPUT_TYPES, NODE_KINDS, PROVIDERS, resolve_entry
from mmcompress.runtime.bundle import read_manifest, verify_files
from mmcompress.runtime.check_manifest import (
    MAX_THREADS,
    Manifest,
    list_wiring_problems,
    sort_nodes,
)
from mmcompress.runtime.check_values import Rules, list_problems
from mmcompress.runtime.machine import describe_cpu
from mmcompress.runtime.providers import CPU_PROVIDER, count_fallbacks
from mmcompress.runtime.replay import TextWriter
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values


@runtime_checkable
class AnswersBatches(Protocol):
    """A deployed node that answers several requests with as few calls of its models as it can."""

    def answer_batch(self, requests: Sequence[Values]) -> list[Values]:
        """Return its outputs for each request; one is what it reads, by port."""
        ...


def sum_critical_path(seconds: Mapping[str, float], reads: Mapping[str, Collection[str]]) -> float:
    """Sum the longest way through a graph.

    Args:
        seconds: What each node takes, in any unit; a node that is missing takes nothing.
        reads: The nodes that each node waits for.

    Returns:
        What all nodes take when each starts as soon as it can, in the unit of `seconds`.
    """
    end_by_node: dict[str, float] = {}

    def find_end(node: str) -> float:
        if node not in end_by_node:
            start = max((find_end(source) for source in reads[node]), default=0.0)
            end_by_node[node] = seconds.get(node, 0.0) + start
        return end_by_node[node]

    return max((find_end(node) for node in reads), default=0.0)


class Pipeline:
    """Runs the pipeline of a bundle: takes its inputs by name, gives its outputs by name.

    It may be called from several threads: it answers one request after the other, each on the
    threads of its sessions. To answer several at once, load one for each thread. A process that is
    forked after loading must load its own.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        threads: Threads of a session.
        provider: What sessions run on.

    Raises:
        BundleError: A node is of an unknown kind, needs another processor, or can't be loaded.
        MissingProvider: The provider is not installed, or finds no device here.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, threads: int, provider: str = CPU_PROVIDER
    ):
        self.folder = folder
        self.manifest = manifest
        self.threads = threads
        self.provider = provider
        graph = manifest["graph"]
        self.inputs: dict[str, str] = graph["inputs"]
        """Value types of the inputs, by name."""
        self.outputs: dict[str, str] = graph["outputs"]
        """References (`node.port`) of the outputs, by name."""
        self.nodes: dict[str, Callable[..., Values]] = {}
        self.writers: dict[str, TextWriter] = {}
        """The nodes that write text."""
        self.sessions: dict[str, dict[str, TimedSession]] = {}
        """Sessions by node and graph."""
        self.wiring: dict[str, dict[str, str]] = {}
        """References by node and port."""
        for name in sort_nodes(graph["nodes"]):
            self._load_node(name, graph["nodes"][name])
        self.node_seconds: dict[str, float] = {}
        """Seconds of every node in the last call."""
        self.model_seconds: dict[str, float] = {}
        """The part of them that was spent inside sessions."""
        self.reads = {name: self._list_sources(name) for name in self.wiring}
        """Nodes that each node waits for."""
        self.needs = self._list_needed_inputs()
        """Inputs of the pipeline that each node needs, itself or by a node that it reads."""
        runs_branches_at_once = bool(manifest.get("parallel"))
        self.pool = ThreadPoolExecutor(len(self.nodes)) if runs_branches_at_once else None
        """Threads of the branches; None where nodes run one after the other."""
        self._lock = threading.Lock()
        self._process = os.getpid()

    def _load_node(self, name: str, node: Values) -> None:
        """Load the sessions of a node, and build it."""
        self._check_cpu(name, node)
        entry = NODE_KINDS.get(node["kind"])
        build_node = resolve_entry(entry.deployed)
        config = node.get("config", {})
        key = f"graph.nodes.{name}"
        rules: Rules = getattr(build_node, "CONFIG_RULES", {})
        problem = next(list_problems(config, rules, key=f"{key}.config"), "")
        if problem:
            raise BundleError(f"{self.folder}/manifest.json: {problem}")
        sessions: dict[str, TimedSession] = {}
        for graph, file in node.get("files", {}).items():
            sessions[graph] = TimedSession(self.folder / file, self.threads, provider=self.provider)
        self.sessions[name] = sessions
        try:
            self.nodes[name] = deployed_node = build_node(sessions, config, self.folder)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise BundleError(
                f"{self.folder}/manifest.json: {key}: a {node['kind']} can't be made of it: "
                f"{type(error).__name__}: {error}"
            ) from error
        if entry.writes_text:
            self.writers[name] = deployed_node
        self.wiring[name] = node["inputs"]

    def _check_cpu(self, name: str, node: Values) -> None:
        """Raise a `BundleError` when this processor would round a node wrongly."""
        needed_flags = set(node.get("cpu_flags", ()))
        if needed_flags and not needed_flags & set(describe_cpu()["flags"]):
            raise BundleError(
                f"{self.folder}: node '{name}' is in {node.get('precision')}, "
                f"which needs a CPU with one of {', '.join(sorted(needed_flags))}: "
                "without, its results would be wrong"
            )

    def _list_sources(self, name: str) -> set[str]:
        """List the nodes that a node reads."""
        sources: set[str] = set()
        for reference in self.wiring[name].values():
            source, _, _ = reference.partition(".")
            if source in self.nodes:
                sources.add(source)
        return sources

    def _list_needed_inputs(self) -> dict[str, frozenset[str]]:
        """List the inputs of the pipeline that each node needs, in the order of the nodes."""
        needs: dict[str, frozenset[str]] = {}
        for name, references in self.wiring.items():
            needed: set[str] = set()
            for reference in references.values():
                source, _, _ = reference.partition(".")
                needed |= needs.get(source, {source})
            needs[name] = frozenset(needed)
        return needs

    def list_fallbacks(self) -> dict[str, Counter[str]]:
        """List the operators that the provider can't run, and the processor runs in its place.

        Returns:
            How many there are of each type, by node and graph (`captioner/step`); empty where all
            run on the provider.
        """
        fallbacks: dict[str, Counter[str]] = {}
        if self.provider == CPU_PROVIDER:
            return fallbacks
        for node_name, sessions in self.sessions.items():
            for graph_name, session in sessions.items():
                counts = count_fallbacks(session.inner)
                if counts:
                    fallbacks[f"{node_name}/{graph_name}"] = counts
        return fallbacks

    def make_noise_request(self) -> Values:
        """Make a request that says nothing, of the types that the pipeline takes."""
        rng = np.random.default_rng(0)
        request: Values = {}
        for name, value_type in self.inputs.items():
            make_noise = resolve_entry(INPUT_TYPES.get(value_type).make_noise)
            request[name] = make_noise(rng)
        return request

    @property
    def session_seconds(self) -> float:
        """Seconds of the last call inside sessions: their sum, or the longest way where branches
        run at once."""
        if self.pool is not None:
            return sum_critical_path(self.model_seconds, self.reads)
        return sum(self.model_seconds.values())

    def __call__(self, **inputs: object) -> Values:
        """Answer a request.

        Args:
            inputs: Values of the pipeline's inputs, by name: a file, bytes, an array or a text. Of
                several inputs some may be left out: what needs them is then not computed.

        Returns:
            Values of the pipeline's outputs, by name. Where a node has something to say of its
            input, such as that a sound is silent, `warnings` is a list of it.

        Raises:
            DataError: No input is given, or one that the pipeline has not, or one can't be read.
            BundleError: A node can't answer: its models don't fit its configuration.
        """
        return self._select_outputs(self.run(**inputs), inputs)

    def answer_batch(self, requests: Sequence[Mapping[str, object]]) -> list[Values]:
        """Answer several requests together: models are called once for all of them.

        Args:
            requests: Inputs by name, as a single call takes them. All give the same inputs.

        Returns:
            The outputs of every request, as a single call gives them, in the order of the requests.

        Raises:
            DataError: The requests give different inputs, or what a single call raises.
            BundleError: A node can't answer: its models don't fit its configuration.
        """
        if not requests:
            return []
        given = set(requests[0])
        for place, request in enumerate(requests):
            self._check_inputs(request)
            if set(request) != given:
                raise DataError(
                    "the requests of a batch give the same inputs: the first gives "
                    f"{', '.join(requests[0])}; number {place + 1} gives {', '.join(request)}"
                )
        answers: list[Values] = []
        for values, request in zip(self._answer(requests), requests, strict=True):
            answers.append(self._select_outputs(values, request))
        return answers

    def _select_outputs(self, values: Mapping[str, Values], inputs: Mapping[str, object]) -> Values:
        """Return the outputs of a request, from the values of its nodes."""
        outputs: Values = {}
        for name, reference in self.outputs.items():
            node_name, _, _ = reference.partition(".")
            if not self.needs.get(node_name, frozenset()) <= set(inputs):
                continue
            try:
                outputs[name] = _read_value(values, reference)
            except KeyError as error:
                raise BundleError(f"{self.folder}: nothing gives '{reference}'") from error
        warnings: list[str] = []
        for name, node_values in values.items():
            # only nodes that look at raw inputs have any
            warnings += [f"{name}: {text}" for text in node_values.get("warnings", ())]
        if warnings:
            outputs.setdefault("warnings", warnings)
        return outputs

    def run(self, **inputs: object) -> dict[str, Values]:
        """Answer a request with the outputs of every node, by node and port. See `__call__`."""
        self._check_inputs(inputs)
        return self._answer([inputs])[0]

    def _check_inputs(self, inputs: Mapping[str, object]) -> None:
        """Raise `DataError` for a request of no input, or of one that the pipeline has not."""
        if not inputs or not set(inputs) <= set(self.inputs):
            given_names = ", ".join(inputs) or "nothing"
            raise DataError(f"this pipeline takes {', '.join(self.inputs)}; got {given_names}")

    def _answer(self, requests: Sequence[Mapping[str, object]]) -> list[dict[str, Values]]:
        """Answer requests together. Nothing else runs meanwhile: nodes keep the times of the last
        call."""
        if os.getpid() != self._process:
            # The threads of its sessions stayed in the other process: a call would wait for ever.
            raise BundleError(
                f"{self.folder}: this process was forked after the bundle was loaded; load it again"
                " in this process, or start processes by multiprocessing's 'spawn'"
            )
        given = set(requests[0])
        with self._lock:
            runnable_nodes = [name for name in self.nodes if self.needs[name] <= given]
            for name in self.nodes:
                self.node_seconds[name] = 0.0
                self.model_seconds[name] = 0.0
            answers: list[dict[str, Values]] = []
            for inputs in requests:
                # the reference of an input has no port
                answers.append({name: {"": value} for name, value in inputs.items()})
            if self.pool is not None:
                self._run_branches(self.pool, runnable_nodes, answers=answers)
            else:
                for name in runnable_nodes:
                    self._run_node(name, answers)
            return answers

    def _run_branches(
        self,
        pool: ThreadPoolExecutor,
        nodes: Collection[str],
        *,
        answers: Sequence[dict[str, Values]],
    ) -> None:
        """Run every node of some as soon as all that it reads is there."""
        sources_by_node = {name: self.reads[name] for name in nodes}
        finished_nodes = set(answers[0])
        running: dict[Future[None], str] = {}
        while sources_by_node or running:
            ready_nodes = [
                name for name, sources in sources_by_node.items() if sources <= finished_nodes
            ]
            for name in ready_nodes:
                del sources_by_node[name]
                running[pool.submit(partial(self._run_node, name, answers))] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finished_nodes.add(running.pop(future))
                future.result()

    def _run_node(self, name: str, answers: Sequence[dict[str, Values]]) -> None:
        """Run one node, add its outputs to those of every request, and keep the time it took."""
        seconds_before = self._count_session_seconds(name)
        try:
            requests = [self._read_ports(name, values) for values in answers]
            start = time.perf_counter()
            outputs = answer_together(self.nodes[name], requests)
            for values, node_outputs in zip(answers, outputs, strict=True):
                values[name] = node_outputs
        except MmcompressError:
            raise
        except Exception as error:  # onnxruntime raises types that it does not export
            raise BundleError(
                f"{self.folder}: node '{name}' can't answer: {type(error).__name__}: {error}"
            ) from error
        self.node_seconds[name] = time.perf_counter() - start
        self.model_seconds[name] = self._count_session_seconds(name) - seconds_before

    def _read_ports(self, name: str, values: Mapping[str, Values]) -> Values:
        """Return what a node reads of a request, by port."""
        ports: Values = {}
        for port, reference in self.wiring[name].items():
            ports[port] = _read_value(values, reference)
        return ports

    def _count_session_seconds(self, name: str) -> float:
        """Return the seconds inside the sessions of a node so far."""
        return sum(session.seconds for session in self.sessions[name].values())


def answer_together(node: Callable[..., Values], requests: Sequence[Values]) -> list[Values]:
    """Return what a deployed node says to several requests.

    Args:
        node: The node. A method `answer_batch` answers them with as few calls of its models as it
            can. A node without that method is asked one by one.
        requests: What it reads, by port.
    """
    if len(requests) > 1 and isinstance(node, AnswersBatches):
        return node.answer_batch(requests)
    return [node(**ports) for ports in requests]


def _read_value(values: Mapping[str, Values], reference: str) -> object:
    """Return the value behind a reference: `node.port`, or the name of an input."""
    node, _, port = reference.partition(".")
    return values[node][port]


def load_bundle(
    bundle: str | Path, threads: int | None = None, *, provider: str | None = None
) -> Pipeline:
    """Load a bundle after checking every file.

    Args:
        bundle: The folder.
        threads: Threads of a session; default: as many as the bundle was measured with.
        provider: What sessions run on; default: what the bundle was measured on. `cpu` is always
            there.

    Returns:
        The pipeline, ready to answer requests.

    Raises:
        BundleError: A file is missing, altered or unreadable, or the manifest asks for what can't
            be.
        DataError: The threads are too many, or there is no such provider.
        MissingProvider: The provider is not installed, or finds no device here.
    """
    folder = Path(bundle)
    if threads is not None and not 0 <= threads <= MAX_THREADS:
        raise DataError(f"threads: expected a whole number in 1 .. {MAX_THREADS}, got {threads}")
    if provider is not None:
        problem = PROVIDERS.find_problem(provider)
        if problem:
            raise DataError(problem)
    manifest = read_manifest(folder)
    problem = next(list_wiring_problems(manifest), "")
    if problem:
        raise BundleError(f"{folder}/manifest.json: damaged: {problem}")
    verify_files(folder, manifest)
    return Pipeline(
        folder,
        manifest,
        threads=threads or manifest.get("threads", 1),
        provider=provider or manifest.get("provider", CPU_PROVIDER),
    )
