"""The contract, kept by every family."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES

from mmcompress.export import contract


@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    proofs = contract.prove(model, tmp_path)
    assert not [p for p in proofs if not p.passed]
    names = {p.name for p in proofs}
    assert {f"masked == sliced: {k}" for k in (*contract.kinds(model), "mixture")} <= names
    if model.kind == "text_decoder":
        assert {"cached generation == library: dense", "cached generation == library: mixture"} <= names
