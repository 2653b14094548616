"""Block kinds as the libraries lay them out, found by the shape of a module, never by the name of a model.

A `Form` says which linear layers write a block's units, which one reads them and what stands in for the block when no
unit is left. Adding a layout is adding a row to `FORMS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from mmcompress.errors import ModelError
from mmcompress.graph.blocks import Block, Writer
from mmcompress.models.attention import SelfAttention

FFN_GRANULARITY = 16
"""FFN channels are cut in multiples of this: unrounded sizes are slow."""


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """One layout of one block kind; paths are relative to the module that holds the whole block.

    `writers`: (path, how many times over it holds the block's features). The first one counts for queries, the second
    for keys: where keys are fewer, their heads are shared by a group of query heads. `inner`: where the sizes are kept.
    """

    kind: str
    writers: tuple[tuple[str, int], ...]
    reader: str
    drop: tuple[tuple[str, str], ...]
    inner: str = ""
    per_head: str = ""
    """A module with one row a head, where there is one."""


WHOLE_MODULE = (("", "pair"),)


BLOCK_LAYOUTS = (
    BlockLayout(
        kind="attention",
        writers=(("q_proj", 1), ("k_proj", 1), ("v_proj", 1)),
        reader="out_proj",
        drop=WHOLE_MODULE,
    ),  # CLIP, Whisper, BART
    BlockLayout(
        kind="attention",
        writers=(("q_proj", 1), ("k_proj", 1), ("v_proj", 1)),
        reader="o_proj",
        drop=WHOLE_MODULE,
    ),  # ViT, DINOv2, Llama
    BlockLayout(
        kind="attention", writers=(("qkv", 3),), reader="out_proj", drop=WHOLE_MODULE
    ),  # ours, in place of packed and fused ones
    BlockLayout(
        kind="attention", writers=(("q_attn", 1), ("c_attn", 2)), reader="c_proj", drop=WHOLE_MODULE
    ),  # GPT-2, cross
    BlockLayout(
        kind="attention", writers=(("c_attn", 3),), reader="c_proj", drop=WHOLE_MODULE
    ),  # GPT-2
    BlockLayout(
        kind="attention",
        writers=(("q", 1), ("k", 1), ("v", 1)),
        reader="o",
        drop=(("", "biased"),),
        inner="",
        per_head="relative_attention_bias",
    ),  # T5
    BlockLayout(
        kind="attention",
        writers=(("self.query", 1), ("self.key", 1), ("self.value", 1)),
        reader="output.dense",
        drop=(("self", "skip pair"), ("output.dense", "plain")),
        inner="self",
    ),  # BERT and its line
    BlockLayout(
        kind="ffn", writers=(("fc1", 1),), reader="fc2", drop=(("fc1", "skip"), ("fc2", "plain"))
    ),
    BlockLayout(
        kind="ffn",
        writers=(("c_fc", 1),),
        reader="c_proj",
        drop=(("c_fc", "skip"), ("c_proj", "plain")),
    ),
    BlockLayout(
        kind="ffn", writers=(("wi", 1),), reader="wo", drop=(("wi", "skip"), ("wo", "plain"))
    ),
    BlockLayout(
        kind="ffn", writers=(("linear_1", 1),), reader="linear_2", drop=()
    ),  # a projector, with no residual stream around it
    BlockLayout(
        kind="ffn",
        writers=(("intermediate.dense", 1),),
        reader="output.dense",
        drop=(("intermediate.dense", "skip"), ("output.dense", "plain")),
    ),
    BlockLayout(
        kind="gated_ffn",
        writers=(("gate_proj", 1), ("up_proj", 1)),
        reader="down_proj",
        drop=(("gate_proj", "skip"), ("up_proj", "skip"), ("down_proj", "plain")),
    ),
    BlockLayout(
        kind="gated_ffn",
        writers=(("wi_0", 1), ("wi_1", 1)),
        reader="wo",
        drop=(("wi_0", "skip"), ("wi_1", "skip"), ("wo", "plain")),
    ),
)


@dataclass(frozen=True, kw_only=True)
class ConvLayout:
    """One layout of a pair of convolutions whose inner channels can be cut.

    `through` treats each channel alone, `squeeze` and `excite` (optional) weigh the channels by what all of them hold.
    """

    writer: str
    per_channel: tuple[str, ...]
    reader: str
    squeeze: str = ""
    excite: str = ""


CONV_LAYOUTS = (
    ConvLayout(
        writer="conv_pw",
        per_channel=("bn1", "conv_dw", "bn2"),
        reader="conv_pwl",
        squeeze="se.conv_reduce",
        excite="se.conv_expand",
    ),  # EfficientNet
    ConvLayout(
        writer="conv1", per_channel=("bn1",), reader="conv2"
    ),  # ResNet, basic and bottleneck
    ConvLayout(writer="conv2", per_channel=("bn2",), reader="conv3"),
)


CONV_GRANULARITY = 8


BLOCK_ORDER = ("attention", "cross_attention", "ffn", "gated_ffn")
"""Of the blocks within a layer."""


CROSS_ATTENTION_NAMES = ("encoder_attn", "crossattention", "EncDecAttention", "cross_attn")
"""Names of the modules that attend to another node's output."""


HEAD_WIDTH_ATTRIBUTES = ("head_dim", "attention_head_size", "key_value_proj_dim")


HEAD_COUNT_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads")


SIZE_ATTRIBUTES = ("embed_dim", "all_head_size", "inner_dim", "split_size")
"""Attributes that repeat a size of the block and are set anew after a cut."""


def normalize_(model: nn.Module) -> nn.Module:
    """Replace, in place, layers that can't lose units as they are: packed or reshaped attention, transposed linears."""
    for path, module in list(model.named_modules()):
        new: nn.Module | None = None
        if isinstance(module, nn.MultiheadAttention):
            new = SelfAttention.from_torch(module)
        elif _linears(module, ("qkv", "projection")) and hasattr(
            module, "num_heads"
        ):  # BLIP: width fixed in reshapes
            qkv, projection = module.get_submodule("qkv"), module.get_submodule("projection")
            new = SelfAttention(qkv, projection, num_heads=int(module.num_heads))
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2: x @ w
            rows, columns = module.weight.shape
            new = nn.Linear(rows, columns)
            new.weight = nn.Parameter(module.weight.detach().T.contiguous())
            new.bias = nn.Parameter(module.bias.detach().clone())
        if new is not None:
            model.set_submodule(path, new)
    return model


def _linears(module: nn.Module, paths: tuple[str, ...]) -> bool:
    for path in paths:
        at: nn.Module | None = module
        for name in path.split("."):
            at = getattr(at, "_modules", {}).get(name)
        if not isinstance(at, nn.Linear):
            return False
    return True


def find_blocks(
    model: nn.Module, root: str = "", *, prefix: str = "", context: str = "context"
) -> tuple[Block, ...]:
    """Every prunable block under `root`, in the order of execution; names as `3.attention`.

    `context` is the port a cross-attention reads from. Raises `ModelError` when nothing is found.
    """
    found: list[Block] = []
    start = model.get_submodule(root) if root else model
    for path, module in start.named_modules():
        form = next(
            (f for f in BLOCK_LAYOUTS if _linears(module, (*(w for w, _ in f.writers), f.reader))),
            None,
        )
        if form is None:
            continue
        at = ".".join(p for p in (root, path) if p)
        crossing = form.kind == "attention" and not set(CROSS_ATTENTION_NAMES).isdisjoint(
            path.split(".")
        )
        kind = "cross_attention" if crossing else form.kind
        layer = re.search(r"\d+", path)
        name = f"{prefix}{layer.group() if layer else 0}.{'ffn' if kind == 'gated_ffn' else kind}"
        if any(b.name == name for b in found):
            raise ModelError(
                f"{at}: a second block is named '{name}'; give its tower a prefix of its own"
            )
        found.append(_block(module, form, name=name, kind=kind, at=at, context=context))
    if not found:
        raise ModelError(
            f"{type(start).__name__}: no attention or feed-forward block of a known layout is in it"
        )
    place = lambda b: (
        int(b.name.removeprefix(prefix).partition(".")[0]),
        BLOCK_ORDER.index(b.kind),
    )
    return tuple(sorted(found, key=place))


def find_convolutions(model: nn.Module, root: str) -> tuple[Block, ...]:
    """Every pair of convolutions under `root` whose inner channels can be cut, numbered in order of execution.

    Raises `ModelError` when nothing is found.
    """
    found: list[Block] = []
    for path, module in model.get_submodule(root).named_modules():
        at = ".".join(p for p in (root, path) if p)
        for form in CONV_LAYOUTS:
            if not (_plain_conv(module, form.writer) and _plain_conv(module, form.reader)):
                continue
            squeezed = bool(form.squeeze) and _plain_conv(module, form.squeeze)
            paths = (form.writer, *((form.excite,) if squeezed else ()))
            units = int(module.get_submodule(form.writer).out_channels)
            found.append(
                Block(
                    name=f"{len(found)}.conv",
                    kind="conv",
                    reader=f"{at}.{form.reader}",
                    writers=tuple(Writer(path=f"{at}.{p}", parts=1, width=1) for p in paths),
                    units=units,
                    width=1,
                    granularity=CONV_GRANULARITY,
                    module=at,
                    reads=("stream",),
                    drop=(),
                    per_channel=tuple(
                        f"{at}.{p}" for p in form.per_channel if p in dict(module.named_children())
                    ),
                    extra_readers=(f"{at}.{form.squeeze}",) if squeezed else (),
                )
            )
    if not found:
        raise ModelError(
            f"{type(model).__name__}: no pair of convolutions of a known layout is in it"
        )
    return tuple(found)


def _plain_conv(module: nn.Module, path: str) -> bool:
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return False
    return isinstance(found, nn.Conv2d) and found.groups == 1


def _block(
    module: nn.Module, form: BlockLayout, *, name: str, kind: str, at: str, context: str
) -> Block:
    join = lambda path: ".".join(p for p in (at, path) if p)
    size = lambda p: int(module.get_submodule(p).out_features)
    rows = [size(p) // parts for p, parts in form.writers]
    drop = tuple((join(p), mode) for p, mode in form.drop)
    reads = ("stream", context) if kind == "cross_attention" else ("stream",)
    if form.kind != "attention":
        writers = tuple(Writer(path=join(p), parts=parts, width=1) for p, parts in form.writers)
        return Block(
            name=name,
            kind=kind,
            reader=join(form.reader),
            writers=writers,
            units=rows[0],
            width=1,
            granularity=FFN_GRANULARITY,
            module=join(form.inner),
            reads=reads,
            drop=drop,
        )
    inner = module.get_submodule(form.inner) if form.inner else module
    width = next((int(getattr(inner, a)) for a in HEAD_WIDTH_ATTRIBUTES if hasattr(inner, a)), 0)
    width = width or rows[0] // next(
        int(getattr(inner, a)) for a in HEAD_COUNT_ATTRIBUTES if hasattr(inner, a)
    )
    units = min(rows) // width
    writers = tuple(
        Writer(path=join(p), parts=parts, width=r // units)
        for (p, parts), r in zip(form.writers, rows, strict=True)
    )
    if form.per_head and hasattr(module, form.per_head):
        writers += (Writer(path=join(form.per_head), parts=1, width=1),)
    return Block(
        name=name,
        kind=kind,
        reader=join(form.reader),
        writers=writers,
        units=units,
        width=rows[0] // units,
        granularity=1,
        module=join(form.inner),
        reads=reads,
        drop=drop,
    )


def refresh_sizes_(module: nn.Module, units: int, *, width: int) -> None:
    """Set the sizes a block's module repeats as attributes to those that are left."""
    head = next(
        (int(getattr(module, a)) for a in HEAD_WIDTH_ATTRIBUTES if hasattr(module, a)), width
    )
    for attribute in HEAD_COUNT_ATTRIBUTES:
        if hasattr(module, attribute):
            setattr(module, attribute, units * width // head)
    for attribute in SIZE_ATTRIBUTES:
        if hasattr(module, attribute):
            setattr(module, attribute, units * width)
