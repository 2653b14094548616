"""Blocks as the libraries lay them out, found by the shape of a module and never by its model.

A `BlockLayout` says which linear layers write the units of a block, and which one reads them. It
also says what stands in for the block when no unit is left. A new layout is a new row of
`BLOCK_LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mmcompress.errors import ModelError
from mmcompress.graph.blocks import Block, Writer
from mmcompress.models.attention import SelfAttention

FFN_GRANULARITY = 16
"""FFN channels are cut in multiples of this: products of unrounded sizes are slow."""

CONV_GRANULARITY = 8
"""Channels of convolutions are cut in multiples of this, for the same reason."""

BLOCK_ORDER = ("attention", "cross_attention", "ffn", "gated_ffn")
"""The order in which the blocks of one layer run."""

CROSS_ATTENTION_NAMES = ("encoder_attn", "crossattention", "EncDecAttention", "cross_attn")
"""Names of modules that attend to the output of another node."""

HEAD_WIDTH_ATTRIBUTES = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""Attributes that hold the width of a head."""

HEAD_COUNT_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads")
"""Attributes that hold how many heads there are. A cut sets them anew."""

SIZE_ATTRIBUTES = ("embed_dim", "all_head_size", "inner_dim", "split_size")
"""Attributes that repeat the width of all heads together. A cut sets them anew."""

WHOLE_MODULE = (("", "pair"),)
"""`drop` of an attention whose module returns (output, weights) and is replaced whole."""


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """How the linear layers of one kind of block are laid out in a library.

    All paths are relative to the module that holds the whole block.
    """

    seen_in: str
    """The models that have it, for a person."""
    kind: str
    """`attention`, `ffn` or `gated_ffn`. Attention to another node is told by the module's name."""
    writers: tuple[tuple[str, int], ...]
    """(path, parts): linear layers that write the features of the block, each of them `parts` times
    over. In attention the first counts for queries, the second for keys. Where keys are fewer, a
    group of query heads shares the head of a key."""
    reader: str
    """The path of the linear layer that reads the features."""
    drop: tuple[tuple[str, str], ...]
    """(path, mode of `models.replacements.REPLACEMENTS`): what is replaced when no unit is left.
    Empty if the block can't be removed whole."""
    inner: str = ""
    """The path of the module that repeats sizes of the block as attributes."""
    per_head: str = ""
    """The path of a module with one row per head; it may be missing. Empty if there is none."""


BLOCK_LAYOUTS = (
    BlockLayout(
        seen_in="CLIP, Whisper, BART",
        kind="attention",
        writers=(("q_proj", 1), ("k_proj", 1), ("v_proj", 1)),
        reader="out_proj",
        drop=WHOLE_MODULE,
    ),
    BlockLayout(
        seen_in="ViT, DINOv2, Llama",
        kind="attention",
        writers=(("q_proj", 1), ("k_proj", 1), ("v_proj", 1)),
        reader="o_proj",
        drop=WHOLE_MODULE,
    ),
    BlockLayout(
        seen_in="packed and fused attention, which is replaced by one of our own",
        kind="attention",
        writers=(("qkv", 3),),
        reader="out_proj",
        drop=WHOLE_MODULE,
    ),
    BlockLayout(
        seen_in="GPT-2, attention to another node",
        kind="attention",
        writers=(("q_attn", 1), ("c_attn", 2)),
        reader="c_proj",
        drop=WHOLE_MODULE,
    ),
    BlockLayout(
        seen_in="GPT-2, attention to itself",
        kind="attention",
        writers=(("c_attn", 3),),
        reader="c_proj",
        drop=WHOLE_MODULE,
    ),
    BlockLayout(
        seen_in="T5",
        kind="attention",
        writers=(("q", 1), ("k", 1), ("v", 1)),
        reader="o",
        drop=(("", "biased"),),
        per_head="relative_attention_bias",
    ),
    BlockLayout(
        seen_in="BERT and its line",
        kind="attention",
        writers=(("self.query", 1), ("self.key", 1), ("self.value", 1)),
        reader="output.dense",
        drop=(("self", "skip pair"), ("output.dense", "plain")),
        inner="self",
    ),
    BlockLayout(
        seen_in="CLIP, ViT, Whisper",
        kind="ffn",
        writers=(("fc1", 1),),
        reader="fc2",
        drop=(("fc1", "skip"), ("fc2", "plain")),
    ),
    BlockLayout(
        seen_in="open_clip, GPT-2",
        kind="ffn",
        writers=(("c_fc", 1),),
        reader="c_proj",
        drop=(("c_fc", "skip"), ("c_proj", "plain")),
    ),
    BlockLayout(
        seen_in="T5",
        kind="ffn",
        writers=(("wi", 1),),
        reader="wo",
        drop=(("wi", "skip"), ("wo", "plain")),
    ),
    BlockLayout(
        seen_in="projectors, which can't be removed whole: no residual stream is around them",
        kind="ffn",
        writers=(("linear_1", 1),),
        reader="linear_2",
        drop=(),
    ),
    BlockLayout(
        seen_in="BERT and its line",
        kind="ffn",
        writers=(("intermediate.dense", 1),),
        reader="output.dense",
        drop=(("intermediate.dense", "skip"), ("output.dense", "plain")),
    ),
    BlockLayout(
        seen_in="Llama",
        kind="gated_ffn",
        writers=(("gate_proj", 1), ("up_proj", 1)),
        reader="down_proj",
        drop=(("gate_proj", "skip"), ("up_proj", "skip"), ("down_proj", "plain")),
    ),
    BlockLayout(
        seen_in="T5, version 1.1",
        kind="gated_ffn",
        writers=(("wi_0", 1), ("wi_1", 1)),
        reader="wo",
        drop=(("wi_0", "skip"), ("wi_1", "skip"), ("wo", "plain")),
    ),
)
"""Known layouts of attention and feed-forward blocks. The first that fits a module is taken."""


@dataclass(frozen=True, kw_only=True)
class ConvLayout:
    """How a pair of convolutions is laid out, whose channels between them can be cut.

    All paths are relative to the module that holds the pair.
    """

    seen_in: str
    """The models that have it, for a person."""
    writer: str
    """The path of the first convolution: its output channels are the units."""
    per_channel: tuple[str, ...]
    """Paths of modules between the two that treat each channel apart; they may be missing."""
    reader: str
    """The path of the second convolution."""
    squeeze: str = ""
    """The path of a convolution that reads all channels to weigh them; it may be missing."""
    excite: str = ""
    """The path of the convolution behind `squeeze` that gives one weight per channel."""


CONV_LAYOUTS = (
    ConvLayout(
        seen_in="EfficientNet",
        writer="conv_pw",
        per_channel=("bn1", "conv_dw", "bn2"),
        reader="conv_pwl",
        squeeze="se.conv_reduce",
        excite="se.conv_expand",
    ),
    ConvLayout(
        seen_in="ResNet, basic and bottleneck blocks",
        writer="conv1",
        per_channel=("bn1",),
        reader="conv2",
    ),
    ConvLayout(
        seen_in="ResNet, the second pair of a bottleneck block",
        writer="conv2",
        per_channel=("bn2",),
        reader="conv3",
    ),
)
"""Every known layout of a pair of convolutions. A module may hold several of them."""


def describe_layouts() -> str:
    """Describe the known layouts by the names of their layers, each once."""
    described: list[str] = []
    for layout in BLOCK_LAYOUTS:
        writers = ", ".join(path for path, _ in layout.writers)
        described.append(f"{writers} > {layout.reader}")
    return "; ".join(dict.fromkeys(described))


def normalize_(model: nn.Module) -> nn.Module:
    """Replace, in place, the layers that can't lose units as they are.

    Those are packed attention, attention that reshapes to a fixed width, and transposed linear
    layers. What the model computes stays the same.

    Returns:
        The model itself.
    """
    for path, module in list(model.named_modules()):
        cuttable_module = _make_cuttable(module)
        if cuttable_module is not None:
            model.set_submodule(path, cuttable_module)
    return model


def _make_cuttable(module: nn.Module) -> nn.Module | None:
    """Return a module of the same weights that can lose units; None if it needs no replacement."""
    if isinstance(module, nn.MultiheadAttention):
        return SelfAttention.from_torch(module)
    # BLIP's attention fixes its width in reshapes
    if _has_linear_layers(module, ("qkv", "projection")) and hasattr(module, "num_heads"):
        return SelfAttention(
            _get_linear(module, "qkv"),
            _get_linear(module, "projection"),
            num_heads=_read_first_attribute(module, HEAD_COUNT_ATTRIBUTES) or 0,
        )
    # GPT-2's linear layer computes x @ weight, so its weight is transposed
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        weight = module.get_parameter("weight").detach()
        in_features, out_features = weight.shape
        linear = nn.Linear(in_features, out_features)
        linear.weight = nn.Parameter(weight.T.contiguous())
        linear.bias = nn.Parameter(module.get_parameter("bias").detach().clone())
        return linear
    return None


def _get_linear(module: nn.Module, path: str) -> nn.Linear:
    """Return the linear layer at a path, which must be one."""
    layer = module.get_submodule(path)
    assert isinstance(layer, nn.Linear), path
    return layer


def _find_submodule(module: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at a path, None if there is none.

    It looks at registered modules only: `get_submodule` takes any attribute, and a `TokenSelector`
    has those of the module that it wraps.
    """
    current: nn.Module | None = module
    for name in path.split("."):
        if current is None:
            return None
        current = current._modules.get(name)
    return current


def _has_linear_layers(module: nn.Module, paths: Iterable[str]) -> bool:
    """Tell whether a linear layer stands at every one of the paths."""
    return all(isinstance(_find_submodule(module, path), nn.Linear) for path in paths)


def _has_plain_conv(module: nn.Module, path: str) -> bool:
    """Tell whether a convolution over all channels at once stands at a path."""
    conv = _find_submodule(module, path)
    return isinstance(conv, nn.Conv2d) and conv.groups == 1


def _join_paths(outer: str, inner: str) -> str:
    """Return the path of a submodule in a module at a path; both may be empty."""
    return f"{outer}.{inner}" if outer and inner else outer or inner


def find_blocks(
    model: nn.Module, root: str = "", *, prefix: str = "", context: str = "context"
) -> tuple[Block, ...]:
    """Find every attention and feed-forward block under a module.

    Args:
        model: The model; paths of the blocks are relative to it.
        root: The path of the module to search; empty searches the whole model.
        prefix: What names of blocks begin with, to tell two towers of one model apart.
        context: The stream that attention to another node reads.

    Returns:
        The blocks in the order of execution, named `<layer>.<kind>`, such as `3.attention`.

    Raises:
        ModelError: Nothing is found, or two blocks would have the same name.
    """
    blocks: list[Block] = []
    searched_module = model.get_submodule(root)
    for path, module in searched_module.named_modules():
        layout = _match_layout(module)
        if layout is None:
            continue
        kind = layout.kind
        if kind == "attention" and not set(CROSS_ATTENTION_NAMES).isdisjoint(path.split(".")):
            kind = "cross_attention"
        layer_number = re.search(r"\d+", path)
        name_of_kind = "ffn" if kind == "gated_ffn" else kind
        name = f"{prefix}{layer_number.group() if layer_number else 0}.{name_of_kind}"
        full_path = _join_paths(root, path)
        if any(block.name == name for block in blocks):
            raise ModelError(
                f"{full_path}: a second block is named '{name}'; give its tower a prefix of its own"
            )
        streams = ("stream", context) if kind == "cross_attention" else ("stream",)
        blocks.append(
            _make_block(module, layout, name=name, kind=kind, path=full_path, reads=streams)
        )
    if not blocks:
        raise ModelError(
            f"{type(searched_module).__name__}: no attention or feed-forward block of a known"
            f" layout is in it. A block is known by the names of its layers: {describe_layouts()} "
            "(docs: reference/layouts). Pairs of convolutions are found by find_convolutions"
        )

    def rank_by_execution(block: Block) -> tuple[int, int]:
        layer, _, _ = block.name.removeprefix(prefix).partition(".")
        return int(layer), BLOCK_ORDER.index(block.kind)

    return tuple(sorted(blocks, key=rank_by_execution))


def _match_layout(module: nn.Module) -> BlockLayout | None:
    """Return the first layout whose linear layers a module has."""
    for layout in BLOCK_LAYOUTS:
        writer_paths = [path for path, _ in layout.writers]
        if _has_linear_layers(module, (*writer_paths, layout.reader)):
            return layout
    return None


def _make_block(
    module: nn.Module,
    layout: BlockLayout,
    *,
    name: str,
    kind: str,
    path: str,
    reads: tuple[str, ...],
) -> Block:
    """Describe the block that a module at a path holds, all paths from the model on."""
    feature_counts: list[int] = []
    for writer_path, parts in layout.writers:
        feature_counts.append(_get_linear(module, writer_path).out_features // parts)
    if layout.kind == "attention":
        units = _count_key_heads(module, layout, feature_counts=feature_counts)
        granularity = 1
    else:
        units = feature_counts[0]
        granularity = FFN_GRANULARITY
    writers: list[Writer] = []
    for (writer_path, parts), features in zip(layout.writers, feature_counts, strict=True):
        full_path = _join_paths(path, writer_path)
        writers.append(Writer(path=full_path, parts=parts, width=features // units))
    if layout.per_head and hasattr(module, layout.per_head):
        writers.append(Writer(path=_join_paths(path, layout.per_head), parts=1, width=1))
    return Block(
        name=name,
        kind=kind,
        reader=_join_paths(path, layout.reader),
        writers=tuple(writers),
        units=units,
        width=feature_counts[0] // units,
        granularity=granularity,
        module=_join_paths(path, layout.inner),
        reads=reads,
        drop=tuple((_join_paths(path, inner), mode) for inner, mode in layout.drop),
    )


def _count_key_heads(module: nn.Module, layout: BlockLayout, *, feature_counts: list[int]) -> int:
    """Return how many heads of keys an attention has: the units that it can lose."""
    inner = module.get_submodule(layout.inner)
    head_width = _read_first_attribute(inner, HEAD_WIDTH_ATTRIBUTES)
    if not head_width:
        query_heads = _read_first_attribute(inner, HEAD_COUNT_ATTRIBUTES)
        if not query_heads:
            raise ModelError(
                f"{type(inner).__name__}: says neither how wide nor how many its heads are"
                f" ({', '.join((*HEAD_WIDTH_ATTRIBUTES, *HEAD_COUNT_ATTRIBUTES))})"
            )
        head_width = feature_counts[0] // query_heads
    return min(feature_counts) // head_width


def _read_first_attribute(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the value of the first attribute that a module has, None if it has none of them."""
    for name in names:
        if hasattr(module, name):
            return int(getattr(module, name))
    return None


def find_convolutions(model: nn.Module, root: str) -> tuple[Block, ...]:
    """Find every pair of convolutions under a module whose channels between them can be cut.

    Args:
        model: The model; paths of the blocks are relative to it.
        root: The path of the module to search.

    Returns:
        The blocks in the order of execution, named `<number>.conv`.

    Raises:
        ModelError: Nothing is found.
    """
    blocks: list[Block] = []
    for path, module in model.get_submodule(root).named_modules():
        full_path = _join_paths(root, path)
        for layout in CONV_LAYOUTS:
            if _has_plain_conv(module, layout.writer) and _has_plain_conv(module, layout.reader):
                name = f"{len(blocks)}.conv"
                blocks.append(_make_conv_block(module, layout, name=name, path=full_path))
    if not blocks:
        raise ModelError(
            f"{type(model).__name__}: no pair of convolutions of a known layout is in it"
        )
    return tuple(blocks)


def _make_conv_block(module: nn.Module, layout: ConvLayout, *, name: str, path: str) -> Block:
    """Describe the pair of convolutions that a module at a path holds."""
    writers = [Writer(path=f"{path}.{layout.writer}", parts=1, width=1)]
    extra_readers: tuple[str, ...] = ()
    if layout.squeeze and _has_plain_conv(module, layout.squeeze):
        writers.append(Writer(path=f"{path}.{layout.excite}", parts=1, width=1))
        extra_readers = (f"{path}.{layout.squeeze}",)
    children = dict(module.named_children())
    per_channel = [f"{path}.{child}" for child in layout.per_channel if child in children]
    return Block(
        name=name,
        kind="conv",
        reader=f"{path}.{layout.reader}",
        writers=tuple(writers),
        units=len(module.get_submodule(layout.writer).get_parameter("weight")),
        width=1,
        granularity=CONV_GRANULARITY,
        module=path,
        reads=("stream",),
        drop=(),
        per_channel=tuple(per_channel),
        extra_readers=extra_readers,
    )


def refresh_sizes_(module: nn.Module, units: int, *, width: int) -> None:
    """Set the sizes that a module repeats as attributes to those that a cut has left.

    Args:
        module: The module at `Block.module`.
        units: Units that are left.
        width: Features of a unit.
    """
    head_width = _read_first_attribute(module, HEAD_WIDTH_ATTRIBUTES)
    if head_width is None:
        head_width = width
    for attribute in HEAD_COUNT_ATTRIBUTES:
        if hasattr(module, attribute):
            setattr(module, attribute, units * width // head_width)
    for attribute in SIZE_ATTRIBUTES:
        if hasattr(module, attribute):
            setattr(module, attribute, units * width)
