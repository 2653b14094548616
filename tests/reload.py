"""Run by test_families in a new process: rebuild every family's cut model from counts and weights, compare answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from families import FAMILIES
from safetensors.torch import load_file

from mmcompress.export import family_contract as contract
from mmcompress.export.weights import load_weights
from mmcompress.prune.surgery import resize_


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    worst = {}
    for name, kept in json.loads((folder / "kept.json").read_text()).items():
        model = load_weights(
            resize_(FAMILIES[name](), kept), folder / f"{name.replace('/', '-')}.safetensors"
        ).eval()
        want = load_file(folder / f"{name.replace('/', '-')}.answers")
        with torch.no_grad():
            got = contract.tuple_outputs(model, contract.random_inputs(model, 2))
        worst[name] = max(float((want[str(i)] - x).abs().max()) for i, x in enumerate(got))
    print(json.dumps(worst))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
