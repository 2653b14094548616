"""Writes a bundle: ONNX files, tokenizers and `manifest.json`, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mmcompress.errors import ModelError
from mmcompress.export.onnx import export_node
from mmcompress.export.proofs import measure_drift, prove_export
from mmcompress.graph.references import topological_order
from mmcompress.graph.structure import KeptUnits
from mmcompress.kinds.text_encoder.deployed import TextEncoder
from mmcompress.models.base import ExportGraph, Model
from mmcompress.models.counts import count_params
from mmcompress.quantize.base import quantize_model
from mmcompress.registry import PRECISIONS
from mmcompress.results.records import Proof
from mmcompress.runtime.bundle import BUNDLE_FORMAT, hash_file, read_manifest
from mmcompress.runtime.graph import Pipeline
from mmcompress.runtime.machine import describe_cpu, list_package_versions
from mmcompress.runtime.sessions import TimedSession, open_session
from mmcompress.spec.schema import Spec
from mmcompress.storage import to_plain, write_record

MAX_CALIBRATION_CALLS = 48
"""Calls of a graph at most that static ranges are taken from."""


def write_bundle(
    spec: Spec,
    models: Mapping[str, Model],
    *,
    precision: Mapping[str, str],
    kept: Mapping[str, KeptUnits],
    folder: Path,
    prove: bool = True,
    listed: Mapping[str, Sequence[str]] = MappingProxyType({}),
    calibration: Sequence[Any] = (),
    spared: Mapping[str, Collection[str]] = MappingProxyType({}),
    aside: Path | None = None,
) -> list[Proof]:
    """Export, quantize where asked, prove, and write the manifest last. Returns the proofs, failed ones included.

    `listed`: the texts of every lookup; they are embedded by the text encoder as it will be deployed. `calibration`:
    inputs of the pipeline for static quantization; they pass through the compressed nodes before. `spared`: blocks by
    node that stay in fp32. `aside`: a folder for the fp32 files of generators that are rounded.
    """
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    proofs: list[Proof] = []
    nodes: dict[str, Any] = {}
    for name in topological_order(spec):
        node = spec.nodes[name]
        nodes[name] = {"kind": node.kind, "inputs": dict(node.inputs)}
        if node.kind == "lookup":
            nodes[name]["config"] = _write_list(
                new, name, encoder=nodes[node.inputs["query"].split(".")[0]], texts=listed[name]
            )
            continue
        if name not in models:
            nodes[name]["config"] = {"prior": node.prior}
            continue
        model = models[name]
        files = export_node(model, new / name)
        if prove:
            proofs += prove_export(name, model, files=files)
        chosen = precision.get(name, "fp32")
        if chosen != "fp32":
            static = PRECISIONS.get(chosen).activations == "static"
            feeds = (
                _feeds(
                    new,
                    spec,
                    nodes=nodes,
                    name=name,
                    files=files,
                    model=model,
                    calibration=calibration,
                )
                if static
                else {}
            )
            small = _quantized(
                chosen, files, feeds=feeds, weights=_weights_of(model, spared.get(name, ()))
            )
            if prove:
                proofs += measure_drift(name, chosen, files=files, quantized=small, model=model)
            for g, f in small.items():
                if aside and node.kind == "text_decoder":
                    (aside / name).mkdir(parents=True, exist_ok=True)
                    files[g].replace(aside / name / files[g].name)
                f.replace(files[g])
        config = dict(model.config)
        if model.tokenizer_json is not None:
            (new / name / "tokenizer.json").write_text(model.tokenizer_json)
            config["tokenizer"] = f"{name}/tokenizer.json"
        nodes[name] |= {
            "files": {g: f.relative_to(new).as_posix() for g, f in files.items()},
            "config": config,
            "precision": chosen,
            "spared": sorted(spared.get(name, ())) if chosen != "fp32" else [],
            "cpu_flags": list(PRECISIONS.get(chosen).flags) if chosen != "fp32" else [],
            "params": count_params(model),
            "structure": dict(kept.get(name, {})),
        }
    files_in = sorted(p for p in new.rglob("*") if p.is_file())
    manifest = {
        "format": BUNDLE_FORMAT,
        "name": spec.name,
        "threads": spec.measure.threads,
        "parallel": spec.measure.parallel,
        "graph": {"inputs": dict(spec.inputs), "outputs": dict(spec.outputs), "nodes": nodes},
        "files": {
            p.relative_to(new).as_posix(): {"sha256": hash_file(p), "bytes": p.stat().st_size}
            for p in files_in
        },
        "proofs": to_plain(proofs),
        "versions": list_package_versions(),
        "cpu": describe_cpu(),
    }
    write_record(new / "manifest.json", manifest)
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)
    return proofs


def quantize_bundle(
    source: Path, models: Mapping[str, Model], *, precision: Mapping[str, str], folder: Path
) -> Path:
    """A copy of an fp32 bundle with nodes in other precisions, unproved: only its speed and size count.

    A static range is taken from inputs of the right shape.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    manifest = read_manifest(folder)
    for name, node in manifest["graph"]["nodes"].items():
        if (chosen := precision.get(name, "fp32")) == "fp32":
            continue
        static = PRECISIONS.get(chosen).activations == "static"
        graphs = models[name].export_graphs() if static else {}
        for g, file in node["files"].items():
            path = folder / file
            feeds = [_example(graphs[g], path)] if static else ()
            small, _ = quantize_model(
                chosen, path, target=path.with_suffix(".small.onnx"), feeds=feeds
            )
            small.replace(path)
            manifest["files"][file] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
        node |= {"precision": chosen, "cpu_flags": list(PRECISIONS.get(chosen).flags)}
    write_record(folder / "manifest.json", manifest)
    return folder


def _example(graph: ExportGraph, path: Path) -> dict[str, np.ndarray]:
    used = {i.name for i in open_session(path, 0).get_inputs()}
    return {k: v.numpy() for k, v in zip(graph.inputs, graph.example, strict=True) if k in used}


def _quantized(
    precision: str,
    files: Mapping[str, Path],
    *,
    feeds: Mapping[str, Any],
    weights: list[np.ndarray],
) -> dict[str, Path]:
    """Every graph of a node rounded, but for products with some weights. Raises `ModelError` if none has them."""
    small, found = {}, 0
    for g, f in files.items():
        small[g], count = quantize_model(
            precision,
            f,
            target=f.with_suffix(".small.onnx"),
            feeds=feeds.get(g, ()),
            spared=weights,
        )
        found += count
    if found < len(weights):
        raise ModelError(
            f"{min(files.values()).parent.name}: {len(weights)} layers are to stay in fp32, {found} found"
        )
    return small


def _weights_of(model: Model, blocks: Collection[str]) -> list[np.ndarray]:
    """Weights of the linear layers of some blocks, each once; of those that are gone, none."""
    return [m.weight.detach().numpy() for m in model.list_linear_layers(blocks)]


def _feeds(
    folder: Path,
    spec: Spec,
    *,
    nodes: Mapping[str, Any],
    name: str,
    files: Mapping[str, Path],
    model: Model,
    calibration: Sequence[Any],
) -> dict[str, list[dict[str, np.ndarray]]]:
    """What reaches each graph of a node when calibration inputs pass through the nodes already written, and it."""
    if not calibration:
        raise ValueError(f"{name}: static quantization needs calibration inputs")
    config = dict(model.config)
    if model.tokenizer_json is not None:
        (folder / name / "tokenizer.json").write_text(model.tokenizer_json)
        config["tokenizer"] = f"{name}/tokenizer.json"
    here = {
        "files": {g: f.relative_to(folder).as_posix() for g, f in files.items()},
        "config": config,
    }
    part = {**{n: nodes[n] for n in nodes if n != name}, name: {**nodes[name], **here}}
    graph = {"inputs": dict(spec.inputs), "outputs": {}, "nodes": part}
    pipeline = Pipeline(folder, {"graph": graph}, threads=0)
    for one in pipeline.sessions[name].values():
        one.feeds = []
    for given in calibration:
        pipeline.run(**{next(iter(spec.inputs)): given})
    found = {g: s.feeds or [] for g, s in pipeline.sessions[name].items()}
    return {g: rows[:: max(1, len(rows) // MAX_CALIBRATION_CALLS)] for g, rows in found.items()}


def _write_list(
    folder: Path, name: str, *, encoder: Mapping[str, Any], texts: Sequence[str]
) -> dict[str, str]:
    """Texts and embeddings of a lookup, by the exported text encoder; returns the names of the files."""
    sessions = {g: TimedSession(folder / f, 0) for g, f in encoder["files"].items()}
    embed = TextEncoder(sessions, encoder["config"], folder)
    bank = [embed(list(texts[i : i + 64]))["embedding"] for i in range(0, len(texts), 64)]
    found = {"texts": f"{name}/texts.json", "bank": f"{name}/bank.npy"}
    (folder / name).mkdir()
    (folder / found["texts"]).write_text(json.dumps(list(texts)))
    np.save(folder / found["bank"], np.concatenate(bank), allow_pickle=False)
    return found
