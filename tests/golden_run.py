"""The golden run: two tiny pipelines the whole way on a simulated machine, held against what is frozen in `golden/`.

    python tests/golden_run.py            runs both and tells the first difference; exit code 1 if there is one
    python tests/golden_run.py image      runs one of them: image or speech
    python tests/golden_run.py --freeze   writes what they gave

Same code, same processor, same figures: searches, structures, proofs, the graph of the manifest and every weight.
A change of names or of rooms leaves all of it equal. What moves a figure on purpose freezes it anew, alone, and
`golden/README.md` says which figure moved and why. On another processor sums round otherwise: there the run is held
against a second one of the same code.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden"
WEIGHT_TOLERANCE = 1e-6
"""Largest absolute difference of a weight."""
FIGURE_TOLERANCE = 1e-6
"""Largest relative difference of a figure: of losses, predictions and measurements."""
OTHER_MACHINE = 1e-3
"""Both tolerances on another processor, where sums round otherwise."""
PROOF_FLOOR = 1e-4
"""Differences that proofs found are rounding: below this they may be others."""


def spec_folders(folder: Path) -> dict[str, Path]:
    """Write the tiny pipelines; returns their folders by name."""
    from conftest import SPEC, write_tiny
    from test_speech import write_talk

    image, speech = folder / "image", folder / "speech"
    write_tiny(image, layers=2)
    (image / "spec.yaml").write_text(SPEC)
    speech.mkdir()
    write_talk(speech)
    return {"image": image, "speech": speech}


CHANGES = {
    "image": {"target": "1.6x", "search.trials": 6, "search.level_switches": 4},
    "speech": {"target": "1.4x", "search.trials": 4, "search.level_switches": 3},
}
COMMON = {
    "measure.threads": 1,
    "search.executor": "inline",
    "compute.precision": "fp32",
    "distill.find_learning_rate": False,
    "distill.minutes": 100_000,
    "distill.steps": 6,
}


def run_pipeline(
    name: str, folder: Path, out: Path
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run one tiny pipeline on the simulated machine; returns (its record, its weights)."""
    import torch
    from safetensors.numpy import load_file
    from simulated import SimulatedBenchmarker, StoppedClock

    from mmcompress.run import run_targets as workflow
    from mmcompress.run.stages import RunStages

    torch.set_num_threads(1)
    changes = COMMON | CHANGES[name]
    summary = workflow.run(
        folder / "spec.yaml",
        out,
        overrides=changes,
        bench=SimulatedBenchmarker(),
        clock=StoppedClock(),
        stages=RunStages(report=lambda summary, folder: folder),
    )
    weights = {}
    for file in sorted((out / "weights").glob("*.safetensors")):
        weights |= {f"{file.stem}/{key}": tensor for key, tensor in load_file(file).items()}
    manifest = json.loads((out / "bundle" / "manifest.json").read_text())
    return record_of(summary, manifest), weights


def record_of(summary: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run, under names of this file's own: those of the product may change."""
    trials = []
    for t in summary.trials:
        trials.append(
            {
                "origin": t.origin,
                "overrides": t.overrides,
                "units": t.candidate.kept_units,
                "precision": t.candidate.precision,
                "latency": t.latency_ms,
                "loss": t.loss,
                "quality": t.quality,
            }
        )
    proofs = [
        {"name": p.name, "node": p.node, "difference": p.difference, "passed": p.passed}
        for p in summary.proofs
    ]
    graph = manifest["graph"]
    nodes = {}
    for name, node in graph["nodes"].items():
        fixed = {
            k: v
            for k, v in node.items()
            if k in ("kind", "inputs", "config", "precision", "params", "structure")
        }
        nodes[name] = {**fixed, "graphs": sorted(node.get("files", {}))}
    return {
        "units": summary.kept_units,
        "trials": trials,
        "proofs": proofs,
        "graph": {"inputs": graph["inputs"], "outputs": graph["outputs"], "nodes": nodes},
        "latency": {
            "target": summary.target.latency_ms,
            "dense": summary.baseline.latency_ms.p50,
            "compressed": summary.compressed.latency_ms.p50,
            "predicted": summary.predicted_latency_ms_p50,
            "met": summary.target.met,
        },
        "quality": {
            side: {
                name: [q.value, q.low, q.high, q.n]
                for name, q in getattr(summary, side).quality.items()
            }
            for side in ("baseline", "compressed")
        },
        "losses": list(summary.validation_losses),
        "splits": list(summary.search.split_losses),
    }


def differences(
    want: Any, have: Any, at: str = "", *, tolerance: float = FIGURE_TOLERANCE
) -> Iterator[str]:
    """Every place where two records differ, in words."""
    if isinstance(want, dict) and isinstance(have, dict):
        for key in want.keys() | have.keys():
            if key not in want or key not in have:
                yield f"{at}.{key}: only in {'the frozen run' if key in want else 'this run'}"
            else:
                yield from differences(want[key], have[key], f"{at}.{key}", tolerance=tolerance)
    elif isinstance(want, list) and isinstance(have, list | tuple):
        if len(want) != len(have):
            yield f"{at}: {len(want)} entries frozen, {len(have)} now"
        for i, (a, b) in enumerate(zip(want, have, strict=False)):
            yield from differences(a, b, f"{at}[{i}]", tolerance=tolerance)
    elif isinstance(want, float) and isinstance(have, int | float) and not isinstance(have, bool):
        floor = PROOF_FLOOR if at.endswith(".difference") else 1e-9
        if abs(want - have) > max(tolerance * abs(want), floor):
            yield f"{at}: {want!r} frozen, {have!r} now"
    elif want != have:
        yield f"{at}: {want!r} frozen, {have!r} now"


def weight_differences(
    want: dict[str, np.ndarray],
    have: dict[str, np.ndarray],
    *,
    tolerance: float = WEIGHT_TOLERANCE,
) -> Iterator[str]:
    for name in want.keys() | have.keys():
        if name not in want or name not in have:
            yield f"weight {name}: only in {'the frozen run' if name in want else 'this run'}"
        elif want[name].shape != have[name].shape:
            yield f"weight {name}: {want[name].shape} frozen, {have[name].shape} now"
        elif want[name].size and (gap := float(np.abs(want[name] - have[name]).max())) > tolerance:
            yield f"weight {name}: {gap:.2e} apart"


def machine() -> dict[str, Any]:
    """What rounding depends on."""
    from mmcompress.runtime.machine import describe_cpu, list_package_versions

    known = list_package_versions()
    packages = {p: known.get(p, "") for p in ("torch", "onnxruntime", "numpy", "optuna")}
    return {"cpu": describe_cpu()["name"], "flags": sorted(describe_cpu()["flags"]), **packages}


def freeze(name: str, record: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{name}.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    save_file(weights, GOLDEN / f"{name}.safetensors")
    (GOLDEN / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")


def frozen_here() -> bool:
    """Whether what is frozen was frozen on such a processor, with such packages."""
    record = GOLDEN / "machine.json"
    return record.exists() and json.loads(record.read_text()) == machine()


def compare(
    name: str,
    record: dict[str, Any],
    weights: dict[str, np.ndarray],
    *,
    tolerances: tuple[float, float] = (FIGURE_TOLERANCE, WEIGHT_TOLERANCE),
) -> list[str]:
    """Everything in which a run differs from the frozen one."""
    from safetensors.numpy import load_file

    figure_tolerance, weight_tolerance = tolerances
    frozen_weights = load_file(GOLDEN / f"{name}.safetensors")
    want = json.loads((GOLDEN / f"{name}.json").read_text())
    have = json.loads(json.dumps(record))
    found = list(differences(want, have, name, tolerance=figure_tolerance))
    return found + list(weight_differences(frozen_weights, weights, tolerance=weight_tolerance))


def main() -> int:
    wrong, asked = 0, [a for a in sys.argv[1:] if not a.startswith("-")]
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in spec_folders(Path(scratch)).items():
            if asked and name not in asked:
                continue
            record, weights = run_pipeline(name, folder, Path(scratch) / f"run-{name}")
            if "--freeze" in sys.argv:
                freeze(name, record, weights)
                print(f"{name}: frozen, {len(record['trials'])} trials, {len(weights)} tensors")
                continue
            found = compare(name, record, weights)
            wrong += bool(found)
            print(f"{name}: {'equal' if not found else f'{len(found)} differences'}")
            print("\n".join(f"  {line}" for line in sorted(found)[:20]))
    return int(wrong > 0)


if __name__ == "__main__":
    import os

    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tools")]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MMCOMPRESS_CACHE"] = cache
        sys.exit(main())
