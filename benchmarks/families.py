"""Write the contract over every family as a table: family x unit kind x proof.

    python benchmarks/families.py

A cell holds the largest difference that a proof found. Writes reports/families.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mmcompress.export import family_contract
from mmcompress.models.base import Model
from mmcompress.results.records import Proof
from mmcompress.runtime.machine import describe_cpu, list_package_versions

ROOT = Path(__file__).resolve().parents[1]
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
"""Columns of the table between the family and the counts."""
COLUMN_BY_PROOF = {
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
"""Column by name of a proof; names may go on after a colon."""
EXACT_PROOFS = ("parameters fall as computed", "MACs")
"""Starts of the names of proofs that counts fall as computed."""
PACKAGES = ("torch", "transformers", "open_clip_torch", "onnxruntime")
"""Packages whose versions stand below the table."""
ABSENT = "–"
"""Cell of a proof that a family has not."""
LEGEND = """\
Small random models of every family. `library`: largest difference between the whole model and its
library's own, untouched, for the same inputs (bound 1e-05). Columns of unit kinds: largest
difference between masking units in the dense model and cutting them out (bound 1e-05). It is
relative where values exceed one. `mixture`: a random mixture of all of them. `torch = ONNX` and
`fused = plain`: every exported graph at batch 1, 2 and 5, dense and cut (bound 1e-04).
`generation`: cached beam search on ONNX Runtime against the library's own `generate`, token for
token, dense and cut. `counts`: parameters and multiply-accumulates fall exactly as computed from
the blocks. `one step`: loss of a pruned student after one step of distillation / loss before it.
–: the family has no such unit."""
"""What the report says above its table."""


@dataclass(frozen=True, kw_only=True)
class FamilyRow:
    """Hold the row of one family."""

    cells: list[str]
    """The cells in the order of the columns."""
    notes: list[str]
    """A sentence on every proof that failed."""


def load_families() -> dict[str, Callable[[], Model]]:
    """Load the table of small models from `tests/families.py`."""
    # In front of this folder, which has a file of the same name.
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
    return importlib.import_module("families").FAMILIES


def find_column(proof_name: str) -> str | None:
    """Find the column that shows a proof; None for proofs that are not shown."""
    if proof_name.startswith("masked") and " dropped" in proof_name:
        return "sub-layers"
    for name, column in COLUMN_BY_PROOF.items():
        if proof_name == name or proof_name.startswith(f"{name}: "):
            return column
    return None


def collect_differences(proofs: list[Proof]) -> dict[str, float]:
    """Collect the largest difference of every column."""
    differences: dict[str, float] = {}
    for proof in proofs:
        column = find_column(proof.name)
        if column is not None:
            differences[column] = max(differences.get(column, 0.0), proof.difference)
    return differences


def format_cell(column: str, differences: dict[str, float]) -> str:
    """Format the cell of a column."""
    if column not in differences:
        return ABSENT
    if column == "generation" and differences[column] == 0:
        return "all equal"
    return f"{differences[column]:.0e}"


def prove_family(family: str, make: Callable[[], Model]) -> FamilyRow:
    """Prove the contract of one family and make its row."""
    torch.manual_seed(0)
    model = make().eval()
    # `tests/families.py` adds this function to its models.
    library_says = cast(Callable[..., tuple[Tensor, ...]], model.library_says)
    proofs = family_contract.prove_library_match(family, model, run_library=library_says)
    with tempfile.TemporaryDirectory() as scratch:
        proofs += family_contract.prove_contract(model, Path(scratch))
    differences = collect_differences(proofs)
    notes: list[str] = []
    counts_are_exact = True
    learning_ratio = 0.0
    for proof in proofs:
        if not proof.passed:
            notes.append(
                f"{family}: {proof.name} FAILED ({proof.difference:.1e} > {proof.bound:.0e})"
            )
        if proof.name.startswith(EXACT_PROOFS):
            counts_are_exact = counts_are_exact and proof.passed
        if proof.name.startswith("one step"):
            learning_ratio = proof.difference
    cells = [family]
    cells += [format_cell(column, differences) for column in COLUMNS]
    cells += ["exact" if counts_are_exact else "NO", f"{learning_ratio:.4f}"]
    return FamilyRow(cells=cells, notes=notes)


def parse_arguments() -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "reports" / "families.md", help="the report"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    head = ["family", *COLUMNS, "counts", "one step"]
    table = [head, ["---"] * len(head)]
    notes: list[str] = []
    for family, make in load_families().items():
        row = prove_family(family, make)
        table.append(row.cells)
        notes += row.notes
        print(" | ".join(row.cells), flush=True)
    versions = list_package_versions()
    version_texts = [
        f"{package} {versions[package]}" for package in PACKAGES if package in versions
    ]
    lines = ["# Model families and the proofs they pass", "", LEGEND, ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    lines.append("")
    lines += [f"- {note}" for note in notes]
    lines.append("")
    lines.append(
        f"Made by `python benchmarks/families.py` on {describe_cpu()['name']}, "
        f"{', '.join(version_texts)}."
    )
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
