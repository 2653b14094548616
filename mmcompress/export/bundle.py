"""Writes bundles: ONNX files, tokenizers and `manifest.json`, whole or not at all.

`write_bundle` exports, proves and quantizes models. `quantize_bundle` makes a copy of an fp32
bundle in other precisions, only to be timed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import ModelError
from mmcompress.export.onnx import export_node, make_feed
from mmcompress.export.proofs import measure_drift, prove_export
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import parse_reference, sort_nodes
from mmcompress.graph.structure import KeptUnits
from mmcompress.models.base import ExportGraph, Model
from mmcompress.models.counts import count_params
from mmcompress.models.device import CPU, copy_to_device
from mmcompress.models.sources import list_hub_sources
from mmcompress.quantize.base import quantize_model
from mmcompress.registry import PRECISIONS, resolve_entry
from mmcompress.results.records import Proof
from mmcompress.runtime.bundle import BUNDLE_FORMAT, hash_file, read_manifest
from mmcompress.runtime.graph import Pipeline
from mmcompress.runtime.machine import describe_cpu, list_package_versions
from mmcompress.runtime.progress import StageProgress, ignore_progress
from mmcompress.runtime.sessions import TimedSession, open_session
from mmcompress.spec.schema import Node, Spec
from mmcompress.storage import replace_folder, to_plain, write_record

MAX_CALIBRATION_CALLS = 48
"""Calls of one graph that static ranges are taken from, about: a generator makes many per input."""

MAX_EMBEDDED_TEXTS = 64
"""Texts of a list that are embedded in one call: more would only take memory."""

UNROUNDED_PRECISION = "fp32"
"""The precision in which nothing is rounded."""

Feed = dict[str, np.ndarray]
"""The inputs of one call of a graph, by name."""

JsonMapping = dict[str, Any]
"""A part of `manifest.json`."""


@dataclass(frozen=True, kw_only=True)
class BundleContents:
    """What goes into a bundle beside the graph of its spec."""

    models: Mapping[str, Model]
    """The models by node, dense or pruned."""
    precisions: Mapping[str, str] = field(default_factory=dict)
    """Precision by node; nodes that are missing stay in fp32."""
    kept_units: Mapping[str, KeptUnits] = field(default_factory=dict)
    """Units kept by node and block, for the manifest; nodes that are missing are written as whole.
    """
    fp32_blocks: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Blocks by node that stay in fp32 while the rest of the node is quantized."""
    lookup_texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The texts that every lookup node searches."""
    calibration_requests: Sequence[Mapping[str, object]] = ()
    """Requests that static precisions take their ranges from; other precisions need none."""


def write_bundle(
    spec: Spec,
    contents: BundleContents,
    *,
    folder: Path,
    prove: bool = True,
    fp32_folder: Path | None = None,
    progress: StageProgress = ignore_progress,
) -> list[Proof]:
    """Export a pipeline, quantize it, prove it, and put the bundle in place, whole or not at all.

    Args:
        spec: The pipeline.
        contents: Its models and what is made of them.
        folder: Where the bundle goes; a bundle that lies there is replaced at the end.
        prove: Whether exports are compared with their models. Bundles that are only timed are not.
        fp32_folder: Where the fp32 files of quantized generators are kept, by node: their
            generation is proved in fp32.
        progress: Hears which node is exported, and the share of the nodes that is done.

    Returns:
        The proofs, failed ones included.

    Raises:
        ModelError: Layers that should stay in fp32 were not found in the exported graphs.
    """
    # ONNX Runtime's side of a proof runs on the processor, so the models do too.
    models = {name: copy_to_device(model, CPU) for name, model in contents.models.items()}
    contents = replace(contents, models=models)
    with replace_folder(folder) as new_folder:
        writer = _BundleWriter(
            spec, contents, folder=new_folder, prove=prove, fp32_folder=fp32_folder
        )
        written_count = 0
        for node_name in sort_nodes(spec):
            if node_name in models:
                progress(f"exporting {node_name}", written_count / len(models))
                written_count += 1
            writer.write_node(node_name)
        write_record(new_folder / "manifest.json", writer.build_manifest())
    return writer.proofs


def record_proofs(folder: Path, proofs: Sequence[Proof]) -> None:
    """Write all proofs of a bundle into its manifest, in place of those of its exports alone."""
    manifest = read_manifest(folder)
    manifest["proofs"] = to_plain(list(proofs))
    write_record(folder / "manifest.json", manifest)


def quantize_bundle(
    source: Path,
    models: Mapping[str, Model],
    *,
    precision: Mapping[str, str],
    folder: Path,
    max_products: int | None = None,
) -> Path:
    """Copy an fp32 bundle and put nodes into other precisions, without proofs.

    Only the speed and the size of the copy count. Static ranges are taken from example inputs of
    the right shape.

    Args:
        source: The fp32 bundle.
        models: Its models by node.
        precision: Precision by node; nodes that are missing stay in fp32.
        folder: Where the copy goes; a bundle that lies there is replaced at the end.
        max_products: Only so many matrix products of a graph are rounded; None: all.

    Returns:
        The folder.
    """
    with replace_folder(folder) as new_folder:
        shutil.copytree(source, new_folder, dirs_exist_ok=True)
        manifest = read_manifest(new_folder)
        for node_name, entry in manifest["graph"]["nodes"].items():
            node_precision = precision.get(node_name, UNROUNDED_PRECISION)
            if node_precision == UNROUNDED_PRECISION:
                continue
            graphs: dict[str, ExportGraph] = {}
            if _has_static_ranges(node_precision):
                graphs = copy_to_device(models[node_name], CPU).export_graphs()
            for graph_name, file_name in entry["files"].items():
                file = new_folder / file_name
                graph = graphs.get(graph_name)
                _quantize_file_(file, node_precision, graph=graph, max_products=max_products)
                manifest["files"][file_name] = _describe_file(file)
            entry["precision"] = node_precision
            entry["cpu_flags"] = list(PRECISIONS.get(node_precision).cpu_flags)
        write_record(new_folder / "manifest.json", manifest)
    return folder


class _BundleWriter:
    """Writes the nodes of one bundle in order, and keeps what its manifest needs."""

    def __init__(
        self,
        spec: Spec,
        contents: BundleContents,
        *,
        folder: Path,
        prove: bool,
        fp32_folder: Path | None,
    ):
        self.spec = spec
        self.contents = contents
        self.folder = folder
        self.prove = prove
        self.fp32_folder = fp32_folder
        self.node_entries: dict[str, JsonMapping] = {}
        """What the manifest says of each node that is written so far, in their order."""
        self.proofs: list[Proof] = []
        """The proofs of these nodes, failed ones included."""

    def write_node(self, node_name: str) -> None:
        """Write the files of a node and its entry for the manifest. Its sources must be written."""
        node = self.spec.nodes[node_name]
        kind = get_kind(node.kind)
        entry: JsonMapping = {"kind": node.kind, "inputs": dict(node.inputs)}
        self.node_entries[node_name] = entry
        if kind.is_model:
            self._write_model(node_name)
            return
        entry["config"] = {name: node.get_option(name, "") for name in kind.options}
        if kind.embeds_list:
            entry["config"] |= self._write_lookup_list(node_name, node)

    def build_manifest(self) -> JsonMapping:
        """Return the manifest of everything that lies in the folder now."""
        file_entries: JsonMapping = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                file_entries[self._name_file(path)] = _describe_file(path)
        return {
            "format": BUNDLE_FORMAT,
            "name": self.spec.name,
            "threads": self.spec.measure.threads,
            "batch": self.spec.measure.batch,
            "parallel": self.spec.measure.parallel,
            "provider": self.spec.measure.provider,
            "graph": {
                "inputs": dict(self.spec.inputs),
                "outputs": dict(self.spec.outputs),
                "nodes": self.node_entries,
            },
            "files": file_entries,
            "sources": list_hub_sources(self.spec),
            "proofs": to_plain(self.proofs),
            "versions": list_package_versions(),
            "cpu": describe_cpu(),
        }

    def _write_model(self, node_name: str) -> None:
        """Write the graphs, the tokenizer and the entry of a model, in its precision."""
        model = self.contents.models[node_name]
        files = export_node(model, self.folder / node_name)
        config = dict(model.config)
        if model.tokenizer_json is not None:
            tokenizer = self.folder / node_name / "tokenizer.json"
            tokenizer.write_text(model.tokenizer_json, encoding="utf-8")
            config["tokenizer"] = self._name_file(tokenizer)
        entry = self.node_entries[node_name]
        entry["files"] = {graph_name: self._name_file(file) for graph_name, file in files.items()}
        entry["config"] = config
        if self.prove:
            self.proofs += prove_export(node_name, model, files=files)
        precision = self.contents.precisions.get(node_name, UNROUNDED_PRECISION)
        fp32_blocks: list[str] = []
        cpu_flags: list[str] = []
        if precision != UNROUNDED_PRECISION:
            fp32_blocks = sorted(self.contents.fp32_blocks.get(node_name, ()))
            cpu_flags = list(PRECISIONS.get(precision).cpu_flags)
            self._quantize_node(node_name, precision, files=files)
        # `spared` and `structure` are the names of format 2 for fp32 blocks and kept units.
        entry["precision"] = precision
        entry["spared"] = fp32_blocks
        entry["cpu_flags"] = cpu_flags
        entry["params"] = count_params(model)
        kept_units = self.contents.kept_units.get(node_name, {})
        entry["structure"] = dict(kept_units)

    def _quantize_node(self, node_name: str, precision: str, *, files: Mapping[str, Path]) -> None:
        """Replace the fp32 files of a node by files in a precision, and record the drift."""
        model = self.contents.models[node_name]
        feeds: dict[str, list[Feed]] = {}
        if _has_static_ranges(precision):
            feeds = self._collect_feeds(node_name)
        fp32_blocks = self.contents.fp32_blocks.get(node_name, ())
        fp32_layers = model.list_linear_layers(fp32_blocks)
        quantized_files = _quantize_graphs(
            precision,
            files,
            feeds=feeds,
            fp32_weights=[layer.weight.detach().numpy() for layer in fp32_layers],
        )
        if self.prove:
            self.proofs += measure_drift(
                node_name,
                precision,
                files=dict(files),
                quantized=quantized_files,
                model=model,
            )
        # Only of generators is there a proof that needs the fp32 files later.
        keeps_fp32_files = get_kind(self.spec.nodes[node_name].kind).writes_text
        for graph_name, quantized_file in quantized_files.items():
            file = files[graph_name]
            if self.fp32_folder and keeps_fp32_files:
                node_folder = self.fp32_folder / node_name
                node_folder.mkdir(parents=True, exist_ok=True)
                file.replace(node_folder / file.name)
            quantized_file.replace(file)

    def _collect_feeds(self, node_name: str) -> dict[str, list[Feed]]:
        """Return what reaches each graph of a node for the calibration inputs, by graph.

        The inputs pass through all nodes that are written so far, in their final precisions, and
        through the fp32 files of this node.
        """
        if not self.contents.calibration_requests:
            raise ValueError(f"{node_name}: static quantization needs calibration inputs")
        graph = {"inputs": dict(self.spec.inputs), "outputs": {}, "nodes": self.node_entries}
        pipeline = Pipeline(self.folder, {"graph": graph}, threads=0)
        sessions = pipeline.sessions[node_name]
        for session in sessions.values():
            # With a list there, a session records what it is fed.
            session.feeds = []
        for request in self.contents.calibration_requests:
            pipeline.run(**request)
        feeds: dict[str, list[Feed]] = {}
        for graph_name, session in sessions.items():
            calls = session.feeds or []
            # Calls from all over the inputs, not only from the first ones.
            stride = max(1, len(calls) // MAX_CALIBRATION_CALLS)
            feeds[graph_name] = calls[::stride]
        return feeds

    def _write_lookup_list(self, node_name: str, node: Node) -> JsonMapping:
        """Write the texts of a lookup and their embeddings; returns the names of the files.

        The texts are embedded by the encoder behind the query, as it will be deployed.
        """
        texts = list(self.contents.lookup_texts[node_name])
        [query_port] = get_kind(node.kind).embedding_ports
        encoder_name, embedding_port = parse_reference(node.inputs[query_port])
        entry = self.node_entries[encoder_name]
        sessions: dict[str, TimedSession] = {}
        for graph_name, file_name in entry["files"].items():
            sessions[graph_name] = TimedSession(self.folder / file_name, 0)
        make_encoder = resolve_entry(get_kind(entry["kind"]).deployed)
        encoder = make_encoder(sessions, entry["config"], self.folder)
        embeddings: list[np.ndarray] = []
        for start in range(0, len(texts), MAX_EMBEDDED_TEXTS):
            outputs = encoder(texts[start : start + MAX_EMBEDDED_TEXTS])
            embeddings.append(outputs[embedding_port])
        node_folder = self.folder / node_name
        node_folder.mkdir()
        (node_folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        np.save(node_folder / "bank.npy", np.concatenate(embeddings), allow_pickle=False)
        return {
            "texts": self._name_file(node_folder / "texts.json"),
            "bank": self._name_file(node_folder / "bank.npy"),
        }

    def _name_file(self, file: Path) -> str:
        """Return the name of a file in the manifest."""
        return file.relative_to(self.folder).as_posix()


def _describe_file(file: Path) -> JsonMapping:
    """Return the manifest's entry of a file: its hash and its size in bytes."""
    return {"sha256": hash_file(file), "bytes": file.stat().st_size}


def _quantize_graphs(
    precision: str,
    files: Mapping[str, Path],
    *,
    feeds: Mapping[str, Sequence[Feed]],
    fp32_weights: Sequence[np.ndarray],
) -> dict[str, Path]:
    """Write every graph of a node in a precision; returns the new files by graph.

    Products with one of `fp32_weights` stay in fp32. Raises `ModelError` if some were not found.
    """
    quantized_files: dict[str, Path] = {}
    fp32_count = 0
    for graph_name, file in files.items():
        quantized_files[graph_name], graph_fp32_count = quantize_model(
            precision,
            file,
            target=file.with_suffix(".small.onnx"),
            feeds=feeds.get(graph_name, ()),
            fp32_weights=fp32_weights,
        )
        fp32_count += graph_fp32_count
    # A layer that is not found would be quantized in silence.
    if fp32_count < len(fp32_weights):
        node_name = min(files.values()).parent.name
        raise ModelError(
            f"{node_name}: {len(fp32_weights)} layers are to stay in fp32, but the exported graphs "
            f"have {fp32_count} of them"
        )
    return quantized_files


def _quantize_file_(
    file: Path, precision: str, *, graph: ExportGraph | None, max_products: int | None
) -> None:
    """Replace an fp32 file; with a graph given, static ranges are taken from its example."""
    feeds: list[Feed] = []
    if graph is not None:
        input_names = {port.name for port in open_session(file, 0).get_inputs()}
        feeds.append(make_feed(graph, graph.example, input_names=input_names))
    quantized_file, _ = quantize_model(
        precision,
        file,
        target=file.with_suffix(".small.onnx"),
        feeds=feeds,
        max_products=max_products,
    )
    quantized_file.replace(file)


def _has_static_ranges(precision: str) -> bool:
    """Return whether a precision takes the ranges of activations from calibration inputs."""
    return bool(PRECISIONS.get(precision).needs_calibration)
