"""Stage: prune with proof, refit, distill, export, quantize."""

from __future__ import annotations

import shutil
from typing import Any

from mmcompress.records import Proof
from mmcompress.workflow.choose import Fitted, pruned
from mmcompress.workflow.dense import generation_proofs
from mmcompress.workflow.state import Run


def compress(run: Run, ev: Any, fitted: Fitted) -> tuple[dict[str, Any], list[Proof]]:
    """Prune with proof, refit, distill, write the bundle. Weights are kept: a resumed run does not train again."""
    from mmcompress.distill.trainer import distill_
    from mmcompress.export.bundle import load_weights, save_weights, write_bundle
    from mmcompress.export.proofs import require, surgery
    from mmcompress.prune.allocation import choose_units

    weights, c = run.folder / "weights", fitted.candidate
    with run.timed("prune"):
        units = {n: choose_units(c.kept[n], m.blocks, ev.scores[n]) for n, m in run.models.items()}
        batch = run.pipeline.batch(run.data.load("train", min(16, run.spec.data.batch), seed=3))
        proofs = surgery(run.pipeline, run.models, units, batch)
        proofs += surgery(run.pipeline, run.models, _random_units(run), batch)
        require(proofs)
        run.say("prune", "masked == sliced proved; refitting", None)
        models = pruned(run, ev, c, run.spec.prune.refit and not (weights / "done").exists())
    with run.timed("distill"):
        if (weights / "done").exists():
            for n, m in models.items():
                load_weights(m, weights / f"{n}.safetensors")
        else:
            distill_(
                run.pipeline,
                models,
                run.models,
                run.data,
                run.spec.distill,
                run.spec.seed,
                lambda what, share: run.say("distill", what, share),
                run.folder / "distill.json",
            )
            save_weights(models, weights)
            (weights / "done").touch()
    with run.timed("export"):
        run.say("export", "ONNX, int8, proofs", None)
        found = write_bundle(run.spec, models, c.precision, c.kept, run.folder / "bundle")
        if all(p == "fp32" for p in c.precision.values()):
            found += generation_proofs(run, models, run.folder / "bundle")
        else:
            found += _fp32_generation(run, models)
        proofs += require(found)
    return models, proofs


def _fp32_generation(run: Run, models: dict[str, Any]) -> list[Proof]:
    """Generation of the compressed structure at fp32: int8 rounding aside, the loop must be exact."""
    from mmcompress.export.onnx import export_node

    folder = run.folder / "scratch"
    for node, kind in run.pipeline.kinds.items():
        if kind == "text_decoder":
            export_node(models[node], folder / node)
            (folder / node / "tokenizer.json").write_text(models[node].tokenizer_json)
    found = generation_proofs(run, models, folder)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _random_units(run: Run) -> dict[str, dict[str, Any]]:
    """A random mixture of cuts, dropped sub-layers among them: surgery must be right for any structure."""
    import torch

    g = torch.Generator().manual_seed(run.spec.seed + 17)
    out: dict[str, dict[str, Any]] = {}
    for n, m in run.models.items():
        out[n] = {}
        for b in m.blocks:
            share = float(torch.rand(1, generator=g))
            keep = b.least if share < 0.15 else max(b.step, int(share * b.units) // b.step * b.step)
            out[n][b.name] = torch.sort(torch.randperm(b.units, generator=g)[:keep]).values
    return out
