"""Encoders of text whose layers cross-attend to the tokens of a picture, as in BLIP's matching.

The base class `FusionEncoderModel` serves models of your own as well: a subclass sets `blocks`,
calls `finish_setup` and implements `forward`.

Shapes: B batch, T tokens of a text, N tokens of a picture, W their width, D width of the text's
    vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.models.base import (
    BlockShape,
    ExampleRequest,
    ExportGraph,
    LoadContext,
    Model,
    mark_tokens,
)
from mmcompress.models.hub import (
    find_family,
    load_config,
    load_library_model,
)
from mmcompress.models.layouts import find_blocks, normalize_
from mmcompress.models.tokenizer_files import LoadedTokenizer, load_tokenizer

EXAMPLE_CONTEXT_TOKENS = 5
"""Tokens of the picture that a graph is traced with. The axis is dynamic."""

MATCH_CLASS = 1
"""BLIP's matching head has two outputs: 0, the text is of another picture; 1, of this one."""


class FusionEncoderModel(Model):
    """Base of fusion encoders: ids [B, T], context [B, N, W] -> embedding, tokens, scores.

    The embedding [B, D] has length 1, the tokens are [B, T, D], the scores [B] are the log-odds
    that a text describes its picture. One picture [1, N, W] may serve all texts. Padding is
    ignored, so texts may be shorter than the context length.
    """

    kind = "fusion_encoder"
    has_own_encoder = True
    context_tokens = 64
    """Tokens N of the picture; the pipeline that feeds this model sets it."""

    def finish_setup(
        self,
        context_length: int,
        width: int,
        *,
        context_width: int,
        vocabulary: int,
        pad: int,
        eos: int,
        text_settings: Mapping[str, object] | None = None,
    ) -> None:
        """Fix the sizes of the inputs.

        Args:
            context_length: The longest text, in tokens.
            width: Features D of the residual stream, of the tokens and of the embedding.
            context_width: Features W of the picture's tokens.
            vocabulary: How many token ids there are.
            pad: The id that fills a text up.
            eos: The id that ends a text.
            text_settings: What else `runtime.text.TextReader` reads, such as `clean`.
        """
        self.width = width
        self.context_length = context_length
        self.vocabulary = vocabulary
        self.config = {
            "tokenizer": "tokenizer.json",
            "context_length": context_length,
            "pad": pad,
            "eos": eos,
            "any_length": True,
            **(text_settings or {}),
        }
        self.dims = {"context": context_width, "tokens": width, "embedding": width}

    @property
    def token_count(self) -> int:
        """Tokens that the model gives at most, for a node that reads them."""
        return self.context_length

    def export_graphs(self) -> dict[str, ExportGraph]:
        """Return one graph, which reads any number of texts with one picture or one each."""
        ids = torch.full((2, self.context_length), self.config["eos"], dtype=torch.long)
        context = torch.zeros(2, EXAMPLE_CONTEXT_TOKENS, self.dims["context"])
        graph = ExportGraph(
            module=self,
            example=(ids, context),
            inputs=("ids", "context"),
            outputs=("embedding", "tokens", "scores"),
            dynamic_axes={
                "ids": {0: "batch", 1: "length"},
                "context": {0: "images", 1: "tokens"},
                "embedding": {0: "batch"},
                "tokens": {0: "batch", 1: "length"},
                "scores": {0: "batch"},
            },
        )
        return {"model": graph}

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        """Return the sizes of every block: all tokens of the texts, and those of one picture."""
        length = self._count_text_tokens(steps)
        shapes: dict[str, BlockShape] = {}
        for block in self.blocks:
            reads_picture = block.kind == "cross_attention"
            shapes[block.name] = BlockShape(
                width=self.width,
                positions=length,
                keys=self.context_tokens if reads_picture else length,
                batch=beams,
            )
        return shapes

    def make_example_requests(self, steps: float, beams: int) -> dict[str, ExampleRequest]:
        """Return one call: as many texts as there are beams, and one picture."""
        ids = torch.full((beams, self._count_text_tokens(steps)), self.config["eos"])
        context = torch.randn(1, self.context_tokens, self.dims["context"])
        return {"model": ExampleRequest((ids, context), 1.0)}

    def _count_text_tokens(self, steps: float) -> int:
        """Return the tokens of a text that a generator writes in so many steps."""
        return min(self.context_length, round(steps) + 1)


def run_blip_matching(
    library_model: nn.Module, ids_BT: Tensor, *, mask: Tensor, context: Tensor
) -> Tensor:
    """Run BLIP's text encoder on texts and the tokens of their pictures.

    Returns:
        Tokens [B, T, D].
    """
    outputs = library_model.text_encoder(
        input_ids=ids_BT, attention_mask=mask, encoder_hidden_states=context
    )
    return outputs.last_hidden_state


@dataclass(frozen=True, kw_only=True)
class FusionFamily:
    """Say where transformers keeps the parts of one family of fusion encoders."""

    class_name: str
    """Class of transformers that loads the weights."""
    unread_parts: tuple[str, ...]
    """Parts of that class that the node does not run; they are removed."""
    stack: str
    """Path of the module that holds the layers."""
    head: str
    """Path of the linear layer from the first token to two classes; the second one is a match."""
    run: Callable[..., Tensor]
    """Called with (library model, ids [B, T], mask=, context=); returns tokens [B, T, D]."""


FUSION_FAMILIES = {
    "blip": FusionFamily(
        class_name="BlipForImageTextRetrieval",
        unread_parts=("vision_model", "vision_proj", "text_proj"),
        stack="text_encoder.encoder",
        head="itm_head",
        run=run_blip_matching,
    ),
}
"""Fusion encoders by `model_type` of the library's configuration; to add one, copy a row."""


class FusionEncoder(FusionEncoderModel):
    """A fusion encoder of transformers.

    Args:
        library_model: The library's model; changed in place.
        family: Where the library keeps its parts.
        tokenizer: The tokenizer, and how texts are padded and cut.
        context_length: Tokens of the longest text.
    """

    def __init__(
        self,
        library_model: nn.Module,
        family: FusionFamily,
        *,
        tokenizer: LoadedTokenizer,
        context_length: int,
    ):
        super().__init__()
        for part in family.unread_parts:
            delattr(library_model, part)
        self.library_model = library_model
        self.family = family
        self.tokenizer_json = tokenizer.json
        normalize_(library_model.get_submodule(family.stack))
        self.blocks = find_blocks(self, f"library_model.{family.stack}")
        config = library_model.config.text_config
        first_cross_attention = next(b for b in self.blocks if b.kind == "cross_attention")
        keys = self.get_linear(first_cross_attention.writers[1].path)
        eos = int(config.sep_token_id) if tokenizer.eos is None else tokenizer.eos
        # The layers ignore padding, so any id but that of the end may fill a text up.
        pad = next(
            one for one in (tokenizer.pad, config.pad_token_id, 0, 1) if one not in (None, eos)
        )
        self.finish_setup(
            context_length,
            int(config.hidden_size),
            context_width=keys.in_features,
            vocabulary=int(config.vocab_size),
            pad=int(pad),
            eos=eos,
            text_settings=tokenizer.list_settings(),
        )

    def forward(self, ids: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask_BT = mark_tokens(ids, self.config["pad"]).long()
        tokens_BTD = self.family.run(self.library_model, ids, mask=mask_BT, context=context)
        first_BD = tokens_BTD[:, 0]
        classes_B2 = self.library_model.get_submodule(self.family.head)(first_BD)
        # softmax over two classes: the difference of their logits is the log-odds of a match
        scores_B = classes_B2[:, MATCH_CLASS] - classes_B2[:, 1 - MATCH_CLASS]
        return F.normalize(first_BD, dim=-1), tokens_BTD, scores_B


def load_fusion_encoder(context: LoadContext) -> Model:
    """Load the fusion encoder of a transformers folder or hub id.

    Raises:
        ModelError: The model can't be loaded or its family is not supported.
    """
    config = load_config(context)
    family = find_family(config.model_type, table=FUSION_FAMILIES, context=context)
    tokenizer = load_tokenizer(context)
    limits = (tokenizer.max_length, context.max_tokens)
    length = int(config.text_config.max_position_embeddings)
    length = min([length, *(limit for limit in limits if limit)])
    return FusionEncoder(
        load_library_model(context, family.class_name, config=config),
        family,
        tokenizer=tokenizer,
        context_length=length,
    )
