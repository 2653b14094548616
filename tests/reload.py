"""Run by test_families in a new process: rebuild every family's cut model, compare its answers.

The models are rebuilt from the counts of their units and from their weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from families import FAMILIES
from safetensors.torch import load_file

from mmcompress.export import family_contract as contract
from mmcompress.export.weights import load_weights
from mmcompress.prune.surgery import resize_model_


def measure_difference(name: str, folder: Path, *, kept_units: dict[str, int]) -> float:
    """The largest difference between the answers of a rebuilt model and those in the folder."""
    file_name = name.replace("/", "-")
    model = resize_model_(FAMILIES[name](), kept_units)
    model = load_weights(model, folder / f"{file_name}.safetensors").eval()
    expected = load_file(folder / f"{file_name}.answers")
    with torch.no_grad():
        outputs = contract.compute_outputs(model, contract.make_random_inputs(model, 2))
    differences = [float((expected[str(i)] - y).abs().max()) for i, y in enumerate(outputs)]
    return max(differences)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    worst = {}
    for name, kept_units in json.loads((folder / "kept.json").read_text()).items():
        worst[name] = measure_difference(name, folder, kept_units=kept_units)
    print(json.dumps(worst))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
