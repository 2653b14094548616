"""The contract over every family, as a table: family x unit kind x proof, with the largest difference seen.

python benchmarks/families.py            # writes reports/families.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families import FAMILIES  # noqa: E402

from mmcompress.export import family_contract as contract  # noqa: E402
from mmcompress.runtime.machine import (
    describe_cpu,
    list_package_versions,  # noqa: E402
)

COLUMNS = (
    "library",
    "heads",
    "cross",
    "channels",
    "tokens",
    "sub-layers",
    "mixture",
    "torch = ONNX",
    "fused = plain",
    "generation",
)
PARTS = {
    "dense == library": "library",
    "masked == sliced: attention": "heads",
    "masked == sliced: cross_attention": "cross",
    "masked == sliced: ffn": "channels",
    "masked == sliced: gated_ffn": "channels",
    "masked == sliced: conv": "channels",
    "masked == sliced: tokens": "tokens",
    "masked == sliced: mixture": "mixture",
    "torch == onnx": "torch = ONNX",
    "fused == unfused": "fused = plain",
    "cached generation == library": "generation",
}


def column(name: str) -> str | None:
    if name.startswith("masked") and " dropped" in name:
        return "sub-layers"
    return next((c for p, c in PARTS.items() if name == p or name.startswith(f"{p}: ")), None)


def row(family: str) -> tuple[list[str], list[str]]:
    """The cells of one family, and what is said below the table."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with tempfile.TemporaryDirectory() as scratch:
        proofs = contract.prove_library_match(
            family, model, run_library=model.library_says
        ) + contract.prove_contract(model, Path(scratch))
    worst: dict[str, float] = {}
    for p in proofs:
        if (c := column(p.name)) is not None:
            worst[c] = max(worst.get(c, 0.0), p.difference)
    notes = [
        f"{family}: {p.name} FAILED ({p.difference:.1e} > {p.bound:.0e})"
        for p in proofs
        if not p.passed
    ]
    show = lambda c: (
        "–"
        if c not in worst
        else "all equal"
        if c == "generation" and not worst[c]
        else f"{worst[c]:.0e}"
    )
    learned = next(p for p in proofs if p.name.startswith("one step"))
    exact = all(p.passed for p in proofs if "as computed" in p.name or p.name.startswith("MACs"))
    return [
        family,
        *map(show, COLUMNS),
        "exact" if exact else "NO",
        f"{learned.difference:.4f}",
    ], notes


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=ROOT / "reports" / "families.md")
    a = p.parse_args()
    head = ["family", *COLUMNS, "counts", "one step"]
    lines, notes = [head, ["---"] * len(head)], []
    for family in FAMILIES:
        cells, more = row(family)
        lines.append(cells)
        notes += more
        print(" | ".join(cells), flush=True)
    v = list_package_versions()
    text = [
        "# Model families and the proofs they pass",
        "",
        "Small random models of every family. `library`: largest difference between the whole model and its library's",
        "own, untouched, for the same inputs (bound 1e-05). Columns of unit kinds: largest difference between masking",
        "units in the dense model and cutting them out, relative where values exceed one (bound 1e-05); `mixture`: a",
        "random mixture of all of them. `torch = ONNX` and `fused = plain`: every exported graph at batch 1, 2 and 5,",
        "dense and cut (bound 1e-04). `generation`: cached beam search on ONNX Runtime against the library's own",
        "`generate`, token for token, dense and cut. `counts`: parameters and multiply-accumulates fall exactly as",
        "computed from the blocks. `one step`: loss of a pruned student after one step of distillation over before.",
        "–: the family has no such unit.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in lines),
        "",
        *(f"- {n}" for n in notes),
        "",
        f"Made by `python benchmarks/families.py` on {describe_cpu()['name']}, "
        + ", ".join(
            f"{k} {v[k]}"
            for k in ("torch", "transformers", "open_clip_torch", "onnxruntime")
            if k in v
        )
        + ".",
    ]
    a.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
