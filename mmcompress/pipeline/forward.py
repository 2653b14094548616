"""The pipeline in torch: the graph run on batches of pairs, its own loss, and the quality a trial is judged on.

Generators run with teacher forcing. Under greedy decoding a caption is right exactly when every teacher-forced
argmax is, so exact match costs one forward pass.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcompress.data.base import Pairs
from mmcompress.graph.ports import NODE_KINDS
from mmcompress.graph.references import find_unjoined_encoders, topological_order
from mmcompress.kinds.base import Batch, Join, Models, Outputs
from mmcompress.models.base import Model
from mmcompress.runtime.audio import SAMPLE_RATE, compute_log_mel
from mmcompress.runtime.images import preprocess_image
from mmcompress.runtime.text import pad_ids, padded_length
from mmcompress.spec.schema import Spec

SIMILARITY_SCALE = 30.0
"""Inverse temperature of the contrastive loss and of the affinities."""


DROPPED_WORD_SHARE = 0.15
"""Share of words lost in the text that queries a lookup: what a recognizer makes of them."""


MAX_REFERENCE_TOKENS = 32
"""Next tokens of the dense generator that another one is compared on."""


AUDIO_TOKENS_PER_SECOND, AUDIO_TAIL_TOKENS = 50, 50
"""Of an audio encoder; positions that count beyond the end of the sound."""


def drop_words(text: str) -> str:
    """A text some of whose words are lost, the same ones every time."""
    dice, words = random.Random(text), text.split()
    return " ".join([w for w in words if dice.random() > DROPPED_WORD_SHARE] or words[:1])


class TorchPipeline:
    """The graph of a spec over given models. Stateless: models are passed to each call, so pruned ones fit too."""

    def __init__(self, spec: Spec, models: Models):
        from tokenizers import Tokenizer

        self.spec, self.batch_size = spec, spec.data.batch
        self.order = [n for n in topological_order(spec) if NODE_KINDS[spec.nodes[n].kind].model]
        self.kinds = {n: spec.nodes[n].kind for n in self.order}
        self.config = {n: m.config for n, m in models.items()}
        self.tokenizers = {
            n: Tokenizer.from_str(m.tokenizer_json) for n, m in models.items() if m.tokenizer_json
        }
        self.joins: list[Join] = []
        for node in spec.nodes.values():
            if not NODE_KINDS[node.kind].model:
                query = node.inputs["query"].split(".")[0]
                keys = (
                    (node.inputs["keys"].split(".")[0], "embedding")
                    if "keys" in node.inputs
                    else (query, "keys")
                )
                self.joins.append(Join((query, "embedding"), keys, "keys" not in node.inputs))
        self.unjoined_encoders = find_unjoined_encoders(spec)

    def collate(self, pairs: Pairs) -> Batch:
        """Preprocess and tokenize pairs for every model that reads them."""
        inputs: dict[str, Tensor] = {}
        keep: dict[str, Tensor] = {}
        read = {j.query[0] for j in self.joins if j.lookup}
        for node, kind in self.kinds.items():
            config = self.config[node]
            if kind == "image_encoder":
                inputs[node] = torch.from_numpy(
                    np.stack([preprocess_image(i, config["preprocess"]) for i in pairs.inputs])
                )
            elif kind == "audio_encoder":
                inputs[node], keep[node] = _features(pairs.inputs, config["features"])
            elif kind == "text_decoder":
                inputs[node], keep[node] = self._targets(node, pairs.written or pairs.texts)
            else:
                texts = pairs.texts
                if node in read:
                    heard = pairs.written or tuple(drop_words(t) for t in texts)
                    texts = tuple(x for pair in zip(heard, texts, strict=True) for x in pair)
                inputs[node] = self._ids(node, texts)
                if node in read:
                    inputs[node] = inputs[node].unflatten(0, (-1, 2))
                keep[node] = inputs[node] != config["pad"]
        return Batch(inputs, keep, pairs.names)

    def _ids(self, node: str, texts: Sequence[str]) -> Tensor:
        config = self.config[node]
        ids = [e.ids for e in self.tokenizers[node].encode_batch(list(texts))]
        return torch.from_numpy(
            pad_ids(ids, padded_length(ids, config), pad=config["pad"], eos=config["eos"])
        )

    def _targets(self, node: str, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(ids [b, t] with start and end, which positions [b, t - 1] have a next token)."""
        config, tokenizer = self.config[node], self.tokenizers[node]
        g = config["generation"]
        if start := list(g["prompt"]):
            words = tokenizer.encode_batch(
                [config.get("lead", "") + t for t in texts], add_special_tokens=False
            )
            ids = [[*start, *e.ids, g["eos"]] for e in words]
        else:
            ids = [e.ids for e in tokenizer.encode_batch(list(texts))]
        length = min(max(map(len, ids)), g["max_tokens"])
        padded = torch.from_numpy(pad_ids(ids, length, pad=g["pad"], eos=g["eos"]))
        ends = torch.tensor([min(len(r), length) for r in ids])
        return padded, torch.arange(1, length) < ends[:, None]

    def target_positions(self, batch: Batch, node: str) -> Tensor:
        """Positions of a generator whose next token it has to find [b, t - 1]: all but those within the prompt."""
        given = max(len(self.config[node]["generation"]["prompt"]), 1) - 1
        keep = batch.keep[node]
        return keep & (torch.arange(keep.shape[1]) >= given)

    def forward(self, models: Models, batch: Batch, known: Outputs | None = None) -> Outputs:
        """Outputs of every model; nodes found in `known` are not run again."""
        out: Outputs = dict(known or {})
        for node in self.order:
            if node not in out:
                out[node] = self._run_node(models[node], node, batch=batch, out=out)
        return out

    def _run_node(
        self, model: Model, node: str, *, batch: Batch, out: Outputs
    ) -> dict[str, Tensor]:
        kind, x = self.kinds[node], batch.inputs[node]
        if kind == "text_decoder":
            (source,) = self.sources_of(node)
            return {"logits": model(x[:, :-1], out[source]["tokens"])}
        if kind != "text_encoder":
            embedding, tokens = model(x)
            return {"embedding": embedding, "tokens": tokens}
        if x.ndim == 2:
            return {"embedding": model(x)}
        query, keys = model(x.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return {"embedding": query, "keys": keys}

    def sources_of(self, node: str) -> tuple[str, ...]:
        """The models whose outputs `forward` gives to `node`. A text tower reads the reference text here, not what
        was generated."""
        return (
            (self.spec.nodes[node].inputs["context"].split(".")[0],)
            if self.kinds[node] == "text_decoder"
            else ()
        )

    def downstream(self, node: str) -> set[str]:
        """`node` and every model that reads from it."""
        found = {node}
        for n in self.order:
            if found & set(self.sources_of(n)):
                found.add(n)
        return found

    def losses(
        self, out: Outputs, batch: Batch, *, dense: Outputs | None = None
    ) -> dict[str, Tensor]:
        """The pipeline's own loss by part: contrastive at every join, cross-entropy of every generator.

        A list of texts may hold anything, so the tower behind a lookup must stay what it was: given the `dense`
        anchors, the squared distance of its embeddings to those counts too; of an embedding that no join compares, that
        alone does. A generator that is judged by what the dense one writes is then judged by all it might write:
        cross-entropy on few texts falls as often as it rises with a small cut, the divergence from the dense
        distribution can't.
        """
        parts: dict[str, Tensor] = {}
        for join in self.joins:
            q, k = join.pair(out)
            sim, own = SIMILARITY_SCALE * q @ k.T, torch.arange(len(q))
            parts[f"contrast.{join.name}"] = (
                F.cross_entropy(sim, own) + F.cross_entropy(sim.T, own)
            ) / 2
            if join.lookup and dense is not None:
                apart = [_distance(a, b) for a, b in zip((q, k), join.pair(dense), strict=True)]
                parts[f"drift.{join.name}"] = (apart[0] + apart[1]) / 2
        if dense is not None:
            parts |= {
                f"drift.{n}": _distance(out[n]["embedding"], dense[n]["embedding"])
                for n in self.unjoined_encoders
            }
        for node, kind in self.kinds.items():
            if kind == "text_decoder":
                keep = self.target_positions(batch, node)
                logits, target = out[node]["logits"][keep], batch.inputs[node][:, 1:][keep]
                if dense is not None and "likely" in dense.get(node, {}):
                    parts[f"caption.{node}"] = _divergence(
                        logits, dense[node]["likely"][keep], share=dense[node]["share"][keep]
                    )
                else:
                    parts[f"caption.{node}"] = F.cross_entropy(logits, target)
        return parts

    def quality(self, out: Outputs, batch: Batch) -> dict[str, float]:
        """R@1 at every join, both ways, among the batch; the share of tokens, and of whole texts, that are right."""
        found: dict[str, float] = {}
        share = lambda right: right.float().mean().item()
        for join in self.joins:
            q, k = join.pair(out)
            sim, own = q @ k.T, torch.arange(len(q))
            if join.lookup:
                found["lookup_r1"] = share(sim.argmax(1) == own)
                continue
            found["image_to_text_r1"] = share(sim.argmax(1) == own)
            found["text_to_image_r1"] = share(sim.argmax(0) == own)
        for node, kind in self.kinds.items():
            if kind == "text_decoder":
                keep = self.target_positions(batch, node)
                right = out[node]["logits"].argmax(-1) == batch.inputs[node][:, 1:]
                found["token_accuracy"] = share(right[keep])
                found["caption_exact_match"] = share((right | ~keep).all(1))
        return found

    @torch.inference_mode()
    def loss_of_models(
        self,
        models: Models,
        batch: Batch,
        *,
        known: Outputs | None = None,
        dense: Outputs | None = None,
    ) -> float:
        """The loss over a whole batch, run in pieces, scored together."""
        return self.loss_of_outputs(
            self.forward_in_pieces(models, batch, known=known), batch, dense=dense
        )

    @torch.inference_mode()
    def loss_of_outputs(self, out: Outputs, batch: Batch, *, dense: Outputs | None = None) -> float:
        """The loss of given outputs."""
        return float(sum(self.losses(out, batch, dense=dense).values()))

    def reference_outputs(self, models: Models, batch: Batch) -> Outputs:
        """What `losses` measures drift from: outputs of the dense models, as far as it needs them."""
        read = {*self.unjoined_encoders, *(j.query[0] for j in self.joins if j.lookup)}
        whole = self.spec.data.labels == "teacher"
        skipped: Outputs = {} if whole else {n: {} for n in self.order if n not in read}
        return self.select_reference_outputs(self.forward_in_pieces(models, batch, known=skipped))

    def select_reference_outputs(self, dense: Outputs) -> Outputs:
        """The same, of given outputs: embeddings behind lookups and those that no join compares, the likeliest next
        tokens and their probability."""
        read = {*self.unjoined_encoders, *(j.query[0] for j in self.joins if j.lookup)}
        found = {n: dict(dense[n]) for n in read}
        for node, kind in self.kinds.items():
            if kind == "text_decoder" and self.spec.data.labels == "teacher":
                share = dense[node]["logits"].softmax(-1)
                top = share.topk(min(MAX_REFERENCE_TOKENS, share.shape[-1]), -1)
                found[node] = {"likely": top.indices, "share": top.values}
        return found

    @torch.inference_mode()
    def forward_in_pieces(
        self, models: Models, batch: Batch, *, known: Outputs | None = None
    ) -> Outputs:
        """`forward` in pieces of the spec's `data.batch`."""
        pieces, size = [], self.batch_size
        for i in range(0, len(batch), size):
            part = {n: {k: v[i : i + size] for k, v in o.items()} for n, o in (known or {}).items()}
            pieces.append(self.forward(models, batch[slice(i, i + size)], part))
        return {
            n: {k: torch.cat([p[n][k] for p in pieces]) for k in o} for n, o in pieces[0].items()
        }


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of embeddings [b, d]."""
    return (a - b).square().sum(-1).mean()


def _divergence(logits: Tensor, likely: Tensor, *, share: Tensor) -> Tensor:
    """KL of next-token distributions [r, v] from the dense one, given its likeliest tokens [r, k]; the rest is one."""
    mine = logits.log_softmax(-1).gather(-1, likely)
    rest, others = (1 - share.sum(-1)).clamp(min=1e-6), (1 - mine.exp().sum(-1)).clamp(min=1e-6)
    parts = (share * (share.clamp(min=1e-9).log() - mine)).sum(-1) + rest * (
        rest.log() - others.log()
    )
    return parts.mean()


def _features(sounds: Sequence[np.ndarray], config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(log-mel features [b, m, f], which tokens [b, f / 2] hold sound or its end)."""
    features = np.stack([compute_log_mel(s, dict(config)) for s in sounds])
    ends = torch.tensor(
        [len(s) / SAMPLE_RATE * AUDIO_TOKENS_PER_SECOND + AUDIO_TAIL_TOKENS for s in sounds]
    )
    return torch.from_numpy(features), torch.arange(features.shape[-1] // 2) < ends[:, None]
