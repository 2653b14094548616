"""Checks that an artifact computes what it should; run on every artifact and kept in its record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmcompress.errors import ProofFailed
from mmcompress.kinds.base import Batch, Models, Outputs
from mmcompress.kinds.text_decoder.deployed import TextDecoder
from mmcompress.models.base import ExportGraph, Model
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.masks import mask_units
from mmcompress.prune.surgery import copy_without_units
from mmcompress.results.records import Proof
from mmcompress.runtime.sessions import TimedSession, open_session

SURGERY_BOUND, EXPORT_BOUND = 1e-5, 1e-4


def require_proofs(proofs: list[Proof]) -> list[Proof]:
    """The proofs, or `ProofFailed` naming the first that does not hold."""
    for p in proofs:
        if not p.passed:
            raise ProofFailed(
                f"{p.node}: {p.name}: difference {p.difference:.2e}, bound {p.bound:.0e} {p.detail}"
            )
    return proofs


def _proof(name: str, node: str, *, difference: float, bound: float, detail: str = "") -> Proof:
    return Proof(
        name=name,
        node=node,
        difference=float(difference),
        bound=bound,
        passed=bool(difference <= bound),
        detail=detail,
    )


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, relative to the scale of `a` where that exceeds one."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp(min=1.0))


@torch.inference_mode()
def prove_surgery(
    pipeline: TorchPipeline,
    dense: Models,
    *,
    units: dict[str, dict[str, Tensor]],
    batch: Batch,
    known: Outputs | None = None,
) -> list[Proof]:
    """Dense models with units masked == the same models with those units removed, node by node.

    `known`: outputs of the dense models for the batch, where they are known.
    """
    known = known or pipeline.forward_in_pieces(dense, batch)
    proofs = []
    for node, model in dense.items():
        masks = {}
        for name, kept in units.get(node, {}).items():
            masks[name] = torch.zeros(model.get_block(name).units)
            masks[name][kept] = 1
        others = {n: o for n, o in known.items() if n != node}
        with mask_units(model, masks):
            want = pipeline.forward(dense, batch, others)[node]
        got = pipeline.forward(
            {node: copy_without_units(model, units.get(node, {}))}, batch, others
        )[node]
        worst = max(relative_difference(want[k], got[k]) for k in want)
        proofs.append(_proof("masked == sliced", node, difference=worst, bound=SURGERY_BOUND))
    return proofs


def _feeds(model: Model, graph: ExportGraph, *, batch: int, seed: int) -> tuple[Tensor, ...]:
    """Random inputs like the traced ones, at another batch size (and, for ids, other ids and another length).

    A decode step gets a longer past with each, and one image for all of a batch.
    """
    g = torch.Generator().manual_seed(seed)
    axes = [graph.dynamic_axes.get(key, {}) for key in graph.inputs]
    shared, later = any(a.get(0) == "batch" for a in axes), batch - 1
    out = []
    for named, x in zip(axes, graph.example, strict=True):
        sizes = list(x.shape)
        for i, name in named.items():
            if x.ndim > 1 and i == 0:
                sizes[0] = 1 if shared and name == "images" else batch
            elif name == "length":
                sizes[i] = max(2, x.shape[1] // batch)
            elif name in ("past", "total"):
                sizes[i] += later
        shape = tuple(sizes)
        if x.is_floating_point():
            out.append(torch.randn(shape, generator=g))
        elif x.ndim > 1:
            ids = torch.randint(3, max(model.vocabulary, 4), shape, generator=g)
            if "eos" in model.config:
                ids[:, -1] = model.config["eos"]
            out.append(ids)
        else:
            out.append(x + later)
    return tuple(out)


@torch.inference_mode()
def prove_export(node: str, model: Model, *, files: dict[str, Path]) -> list[Proof]:
    """torch == ONNX at batch 1, 2 and 5, and optimized == unoptimized graph, for every graph of a node."""
    proofs = []
    for name, graph in model.export_graphs().items():
        fused, plain = open_session(files[name], 0), open_session(files[name], 0, optimize=False)
        used = {i.name for i in fused.get_inputs()}
        worst = {"torch == onnx": 0.0, "fused == unfused": 0.0}
        for batch in (1, 2, 5):
            example = _feeds(model, graph, batch=batch, seed=batch)
            want = graph.module(*example)
            want = want if isinstance(want, tuple) else (want,)
            feed = {k: v.numpy() for k, v in zip(graph.inputs, example, strict=True) if k in used}
            got = fused.run(list(graph.outputs), feed)
            raw = plain.run(list(graph.outputs), feed)
            for w, a, b in zip(want, got, raw, strict=True):
                worst["torch == onnx"] = max(
                    worst["torch == onnx"], relative_difference(w, torch.from_numpy(a))
                )
                worst["fused == unfused"] = max(
                    worst["fused == unfused"],
                    relative_difference(torch.from_numpy(b), torch.from_numpy(a)),
                )
        proofs += [
            _proof(k, node, difference=v, bound=EXPORT_BOUND, detail=f"({name}, batch 1, 2, 5)")
            for k, v in worst.items()
        ]
    return proofs


@torch.inference_mode()
def prove_generation(
    node: str, model: Model, *, files: dict[str, Path], folder: Path, contexts: Tensor
) -> list[Proof]:
    """Deployed beam search on ONNX Runtime == the library's own `generate`, token for token.

    `contexts` [n, t, w]. Only for a structure the library can still run with its cache (its first attention kept).
    """

    deployed = TextDecoder({k: TimedSession(f, 0) for k, f in files.items()}, model.config, folder)
    g = replace(deployed.generation, guard=False)  # the library has none
    deployed.generation = g
    wrong = 0
    for context in contexts:
        mine = [ids for _, ids in deployed.generate(context[None].numpy())]
        theirs = model.library_generate(context[None])
        rows = [_trimmed(r, g.eos) for r in theirs]
        wrong += mine != rows
    return [
        _proof(
            "cached generation == library",
            node,
            difference=wrong / len(contexts),
            bound=0.01,
            detail=f"({len(contexts)} inputs)",
        )
    ]


def _trimmed(ids: list[int], eos: int) -> list[int]:
    """A row up to its end token; without one it was cut off at the longest length."""
    return ids[: ids.index(eos, 1) + 1] if eos in ids[1:] else ids


def measure_drift(
    node: str, precision: str, *, files: dict[str, Path], quantized: dict[str, Path], model: Model
) -> list[Proof]:
    """fp32 against quantized: one minus the mean cosine of each graph's first output. A record, with a wide bound."""
    proofs = []
    for name, graph in model.export_graphs().items():
        a, b = open_session(files[name], 0), open_session(quantized[name], 0)
        used = {i.name for i in a.get_inputs()}
        example = _feeds(model, graph, batch=5, seed=9)
        feed = {k: v.numpy() for k, v in zip(graph.inputs, example, strict=True) if k in used}
        x, y = (s.run([graph.outputs[0]], feed)[0].reshape(5, -1) for s in (a, b))
        cosine = (x * y).sum(1) / np.maximum(
            np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-12
        )
        proofs.append(
            _proof(
                f"{precision} drift (1 - cosine)",
                node,
                difference=1 - float(cosine.mean()),
                bound=0.2,
                detail=f"({name})",
            )
        )
    return proofs
