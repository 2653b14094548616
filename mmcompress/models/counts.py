"""Parameters and multiply-accumulates (MACs) of a node, as one request uses it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmcompress.graph.blocks import Block
from mmcompress.models.base import BlockShape, ExampleRequest, Model
from mmcompress.models.device import get_device

FP32_BYTES = 4
"""Bytes of a parameter."""


def count_params(model: nn.Module) -> int:
    """Count the parameters of a model, tied ones once."""
    distinct_parameters = {id(parameter): parameter for parameter in model.parameters()}
    return sum(parameter.numel() for parameter in distinct_parameters.values())


def count_block_params(model: Model) -> dict[str, int]:
    """Count the parameters in the layers of every block, by name of the block.

    Blocks of positions have none: 0.
    """
    counts: dict[str, int] = {}
    for block in model.blocks:
        counts[block.name] = 0
        for path in _list_weighted_layers(block):
            for parameter in model.get_submodule(path).parameters():
                counts[block.name] += parameter.numel()
    return counts


def _list_weighted_layers(block: Block) -> list[str]:
    """Return the paths of all layers whose weights belong to a block."""
    if block.group == "tokens":
        return []
    writer_paths = [writer.path for writer in block.writers]
    return [block.reader, *block.per_channel, *block.extra_readers, *writer_paths]


@torch.no_grad()
def count_params_and_macs(model: Model, steps: float, *, beams: int) -> tuple[int, int]:
    """Count the parameters of a model, and its MACs per request.

    Hooks count linear and convolution layers; the products of attention follow from its shape.

    Args:
        model: The model of a node.
        steps: Decode steps of a request.
        beams: Texts that a request holds at once.

    Returns:
        (parameters, MACs per request).
    """
    total_macs = 0.0
    graphs = model.export_graphs()
    for graph_name, request in model.make_example_requests(steps, beams).items():
        total_macs += _count_layer_macs(graphs[graph_name].module, request)
    shapes = model.list_block_shapes(steps, beams)
    for block in model.blocks:
        if block.group == "heads":
            total_macs += _count_attention_macs(block, shapes[block.name])
    return count_params(model), round(total_macs)


def _count_layer_macs(module: nn.Module, request: ExampleRequest) -> float:
    """Count the MACs per request of all linear and convolution layers in a module."""
    macs_per_call = 0.0

    def add_macs(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs_per_call
        if isinstance(layer, nn.Linear):
            macs_per_call += output.numel() * layer.in_features
        elif isinstance(layer, nn.Conv1d | nn.Conv2d):
            # weight [out, in / groups, *kernel]: one output element takes one row of it
            macs_per_call += output.numel() * layer.weight[0].numel()

    inputs, calls = request
    device = get_device(module)
    handles = [layer.register_forward_hook(add_macs) for layer in module.modules()]
    module(*(x.to(device) for x in inputs))
    for handle in handles:
        handle.remove()
    return macs_per_call * calls


def _count_attention_macs(block: Block, shape: BlockShape) -> float:
    """Count the MACs per request of queries times keys and of weights times values."""
    products_per_call = shape.positions * shape.keys * shape.batch
    return 2 * block.units * block.width * products_per_call * shape.calls


def count_params_per_unit(model: Model, block: Block) -> float:
    """Count the parameters that go with one unit of a block.

    Args:
        model: The model that has the block.
        block: A block; positions carry no parameters.

    Returns:
        Rows of its writers, columns of its readers, and what modules between them have for each
        channel.
    """
    if block.group == "tokens":
        return 0.0
    total = 0.0
    for writer in block.writers:
        parameters = dict(model.get_submodule(writer.path).named_parameters(recurse=False))
        row_params = parameters["weight"][0].numel() + ("bias" in parameters)
        total += writer.parts * writer.width * row_params
    for path in block.per_channel:
        module = model.get_submodule(path)
        channel_params = sum(parameter[0].numel() for parameter in module.parameters())
        total += block.width * channel_params
    for path in (block.reader, *block.extra_readers):
        column = model.get_submodule(path).get_parameter("weight")[:, 0]
        total += block.width * column.numel()
    return total
