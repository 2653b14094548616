"""Run the speech pipeline on several random halves of the clips, and say how each run ended.

    LJSPEECH_DIR=... python benchmarks/speech_halves.py --out runs/halves

Each seed deals the clips to the splits anew. A run that was interrupted goes on; one that is
finished is not run again. `halves.json` in the folder holds the exit code of every half. For every
target it says whether it is met, what is retained, and which proofs failed. A run should end with
exit code 0 or 3 and every proof passed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary

SPEC = "pipelines/speech_search.yaml"
"""The pipeline."""

GOOD_EXIT_CODES = (0, 3)
"""Done, or the target is missed and the best result is written."""


def run_half(seed: int, folder: Path, *, target: str, effort: str) -> int:
    """Run the pipeline on one deal of the clips, or go on with it; return the exit code."""
    command = [sys.executable, "-m", "mmcompress.cli", "run", SPEC, "--target", target]
    command += ["--effort", effort]
    command += ["--set", f"data.options.split_seed={seed}", "--out", str(folder), "--resume"]
    return subprocess.run(command, check=False).returncode


def describe_results(folder: RunFolder) -> dict[str, Any]:
    """Return what came out for every target of a run."""
    names = folder.list_finished_subfolders()
    folders = [folder.get_subfolder(name) for name in names] or [folder]
    results: dict[str, Any] = {}
    for target_folder in folders:
        if not target_folder.summary.exists():
            continue
        summary = load_summary(target_folder.path)
        results[summary.target.text] = {
            "met": summary.target.met,
            "speedup": summary.speedup,
            "quality_retained": summary.quality_retained,
            "failed_proofs": [proof.name for proof in summary.proofs if not proof.passed],
        }
    return results


def main() -> None:
    """Run every half in turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/speech-halves"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", default="1.5x,2x,2.5x,3x")
    parser.add_argument("--effort", default="normal", choices=["quick", "normal", "best"])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    halves: dict[str, Any] = {}
    for seed in arguments.seeds:
        folder = arguments.out / f"half-{seed}"
        exit_code = run_half(seed, folder, target=arguments.target, effort=arguments.effort)
        results = describe_results(RunFolder(path=folder))
        halves[str(seed)] = {"exit_code": exit_code, "targets": results}
        (arguments.out / "halves.json").write_text(json.dumps(halves, indent=2), encoding="utf-8")
    bad = [seed for seed, half in halves.items() if half["exit_code"] not in GOOD_EXIT_CODES]
    if bad:
        sys.exit(f"these halves ended with an error: {', '.join(bad)}")


if __name__ == "__main__":
    main()
