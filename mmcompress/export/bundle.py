"""Writes a bundle: ONNX files, tokenizers and `manifest.json`, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcompress.export.onnx import export_node
from mmcompress.export.proofs import export as export_proofs
from mmcompress.export.proofs import int8_drift
from mmcompress.graph.topology import order
from mmcompress.measure.machine import cpu, versions
from mmcompress.models.base import Model
from mmcompress.quantize.dynamic import quantize
from mmcompress.records import Kept, Proof, plain, write
from mmcompress.runtime.bundle import FORMAT, sha256
from mmcompress.spec.schema import Spec


def write_bundle(
    spec: Spec,
    models: Mapping[str, Model],
    precision: Mapping[str, str],
    kept: Mapping[str, Kept],
    folder: Path,
    prove: bool = True,
    extra: dict[str, Any] | None = None,
) -> list[Proof]:
    """Export, quantize where asked, prove, and write the manifest last. Returns the proofs, failed ones included."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    proofs: list[Proof] = []
    nodes: dict[str, Any] = {}
    for name in order(spec):
        node = spec.nodes[name]
        nodes[name] = {"kind": node.kind, "inputs": dict(node.inputs)}
        if name not in models:
            nodes[name]["config"] = {"prior": node.prior}
            continue
        model = models[name]
        files = export_node(model, new / name)
        if prove:
            proofs += export_proofs(name, model, files)
        if precision.get(name) == "int8":
            small = {g: quantize(f, f.with_suffix(".int8.onnx")) for g, f in files.items()}
            if prove:
                proofs += int8_drift(name, files, small, model)
            for g, f in small.items():
                f.replace(files[g])
        config = dict(model.config)
        if model.tokenizer_json is not None:
            (new / name / "tokenizer.json").write_text(model.tokenizer_json)
            config["tokenizer"] = f"{name}/tokenizer.json"
        nodes[name] |= {
            "files": {g: f.relative_to(new).as_posix() for g, f in files.items()},
            "config": config,
            "precision": precision.get(name, "fp32"),
            "params": sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()),
            "structure": dict(kept.get(name, {})),
        }
    listed = sorted(p for p in new.rglob("*") if p.is_file())
    manifest = {
        "format": FORMAT,
        "name": spec.name,
        "threads": spec.measure.threads,
        "graph": {"inputs": dict(spec.inputs), "outputs": dict(spec.outputs), "nodes": nodes},
        "files": {p.relative_to(new).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size} for p in listed},
        "proofs": plain(proofs),
        "versions": versions(),
        "cpu": cpu(),
        **(extra or {}),
    }
    write(new / "manifest.json", manifest)
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)
    return proofs


def save_weights(models: Mapping[str, Model], folder: Path) -> None:
    """Weights of pruned models as safetensors, so that they can be trained further or exported again."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        unique: dict[int, str] = {}
        state = {}
        for key, value in model.state_dict().items():
            if unique.setdefault(value.data_ptr(), key) == key or value.numel() == 0:
                state[key] = value.contiguous()
        save_file(state, folder / f"{name}.safetensors")


def load_weights(model: Model, path: Path) -> Model:
    """Read weights written by `save_weights` into a model of the same structure."""
    from safetensors.torch import load_file

    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    tied = {n for n, p in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    left = [m for m in missing if m not in tied]
    if left or unexpected:
        raise ValueError(f"{path}: does not fit the structure: {(left + list(unexpected))[:3]}")
    return model


__all__ = ["load_weights", "save_weights", "write_bundle"]
