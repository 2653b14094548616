"""Parameters and multiply-accumulates of a node, as one request uses it."""

from __future__ import annotations

import torch
from torch import nn

from mmcompress.models.base import Model


def count_params(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def count_block_params(model: Model) -> dict[str, int]:
    """Parameters of the linear layers of every block."""
    found = {}
    for b in model.blocks:
        paths = (
            ()
            if b.group == "tokens"
            else (b.reader, *b.per_channel, *b.extra_readers, *(w.path for w in b.writers))
        )
        found[b.name] = sum(
            p.numel() for path in paths for p in model.get_submodule(path).parameters()
        )
    return found


@torch.no_grad()
def count_params_and_macs(model: Model, steps: float, *, beams: int) -> tuple[int, int]:
    """(parameters, MACs per request): linear and convolution layers by hooks, attention products by shape."""
    total = 0.0
    graphs = model.export_graphs()
    for name, (inputs, calls) in model.make_example_requests(steps, beams).items():
        module = graphs[name].module
        macs = 0.0

        def hook(m: nn.Module, args: tuple, out: torch.Tensor) -> None:
            nonlocal macs
            if isinstance(m, nn.Linear):
                macs += out.numel() * m.in_features
            elif isinstance(m, nn.Conv1d | nn.Conv2d):
                macs += out.numel() * m.weight[0].numel()

        handles = [m.register_forward_hook(hook) for m in module.modules()]
        module(*inputs)
        for h in handles:
            h.remove()
        total += macs * calls
    shapes = model.list_block_shapes(steps, beams)
    for b in model.blocks:
        if b.group == "heads":
            s = shapes[b.name]
            total += 2 * b.units * b.width * s.positions * s.keys * s.batch * s.calls
    return count_params(model), round(total)
