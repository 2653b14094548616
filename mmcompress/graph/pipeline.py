"""The pipeline in torch: the graph run on batches of pairs, its own loss, and the quality a trial is judged on.

Generators run with teacher forcing. Under greedy decoding a caption is right exactly when every teacher-forced
argmax is, so exact match costs one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcompress.data.base import Pairs
from mmcompress.graph.topology import KINDS, order
from mmcompress.models.base import Model
from mmcompress.runtime.images import preprocess
from mmcompress.runtime.nodes import pad_ids
from mmcompress.spec.schema import Spec

Outputs = dict[str, dict[str, Tensor]]
Models = Mapping[str, Model]
SCALE = 30.0
"""Inverse temperature of the contrastive loss and of the affinities."""


@dataclass(frozen=True)
class Batch:
    """Inputs of every model for b pairs: `inputs[node]` pixels [b, 3, s, s] or ids [b, t]."""

    inputs: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, index: slice) -> Batch:
        return Batch({k: v[index] for k, v in self.inputs.items()})

    def chunks(self, size: int) -> list[Batch]:
        return [self[i : i + size] for i in range(0, len(self), size)]


class TorchPipeline:
    """The graph of a spec over given models. Stateless: models are passed to each call, so pruned ones fit too."""

    def __init__(self, spec: Spec, models: Models):
        from tokenizers import Tokenizer

        self.spec, self.size = spec, spec.data.batch
        self.order = [n for n in order(spec) if KINDS[spec.nodes[n].kind].model]
        self.kinds = {n: spec.nodes[n].kind for n in self.order}
        self.config = {n: m.config for n, m in models.items()}
        self.tokenizers = {n: Tokenizer.from_str(m.tokenizer_json) for n, m in models.items() if m.tokenizer_json}
        self.joins = [
            (node.inputs["query"].split(".")[0], node.inputs["keys"].split(".")[0])
            for node in spec.nodes.values()
            if node.kind == "nearest"
        ]

    def pad(self, node: str) -> int:
        config = self.config[node]
        return int(config["pad"] if "pad" in config else config["generation"]["pad"])

    def batch(self, pairs: Pairs) -> Batch:
        """Preprocess and tokenize pairs for every model that reads them."""
        inputs: dict[str, Tensor] = {}
        for node, kind in self.kinds.items():
            config = self.config[node]
            if kind == "image_encoder":
                inputs[node] = torch.from_numpy(np.stack([preprocess(i, config["preprocess"]) for i in pairs.images]))
                continue
            ids = [e.ids for e in self.tokenizers[node].encode_batch(list(pairs.captions))]
            if kind == "text_encoder":
                padded = pad_ids(ids, config["context_length"], config["pad"], config["eos"])
            else:
                g = config["generation"]
                padded = pad_ids(ids, min(max(map(len, ids)), g["max_tokens"]), g["pad"], g["eos"])
            inputs[node] = torch.from_numpy(padded)
        return Batch(inputs)

    def forward(self, models: Models, batch: Batch, known: Outputs | None = None) -> Outputs:
        """Outputs of every model; nodes found in `known` are not run again."""
        out: Outputs = dict(known or {})
        for node in self.order:
            if node in out:
                continue
            kind, x = self.kinds[node], batch.inputs[node]
            if kind == "image_encoder":
                embedding, tokens = models[node](x)
                out[node] = {"embedding": embedding, "tokens": tokens}
            elif kind == "text_encoder":
                out[node] = {"embedding": models[node](x)}
            else:
                (source,) = self.reads(node)
                out[node] = {"logits": models[node](x[:, :-1], out[source]["tokens"])}
        return out

    def reads(self, node: str) -> tuple[str, ...]:
        """The models whose outputs `forward` gives to `node`. A text tower reads the reference text here, not what
        was generated."""
        return (self.spec.nodes[node].inputs["context"].split(".")[0],) if self.kinds[node] == "text_decoder" else ()

    def downstream(self, node: str) -> set[str]:
        """`node` and every model that reads from it."""
        found = {node}
        for n in self.order:
            if found & set(self.reads(n)):
                found.add(n)
        return found

    def losses(self, out: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The pipeline's own loss by part: contrastive at every join, cross-entropy of every generator."""
        parts: dict[str, Tensor] = {}
        for query, keys in self.joins:
            sim = SCALE * out[query]["embedding"] @ out[keys]["embedding"].T
            own = torch.arange(len(sim))
            parts[f"contrast.{query}"] = (F.cross_entropy(sim, own) + F.cross_entropy(sim.T, own)) / 2
        for node, kind in self.kinds.items():
            if kind == "text_decoder":
                target = batch.inputs[node][:, 1:]
                logits = out[node]["logits"]
                parts[f"caption.{node}"] = F.cross_entropy(
                    logits.flatten(0, 1), target.flatten(), ignore_index=self.pad(node)
                )
        return parts

    def quality(self, out: Outputs, batch: Batch) -> dict[str, float]:
        """R@1 both ways among the batch, and the share of captions every token of which is right."""
        found: dict[str, float] = {}
        for query, keys in self.joins:
            sim = out[query]["embedding"] @ out[keys]["embedding"].T
            own = torch.arange(len(sim))
            found["image_to_text_r1"] = (sim.argmax(1) == own).float().mean().item()
            found["text_to_image_r1"] = (sim.argmax(0) == own).float().mean().item()
        for node, kind in self.kinds.items():
            if kind == "text_decoder":
                target = batch.inputs[node][:, 1:]
                right = (out[node]["logits"].argmax(-1) == target) | (target == self.pad(node))
                found["caption_exact_match"] = right.all(1).float().mean().item()
        return found

    @torch.inference_mode()
    def evaluate(self, models: Models, batch: Batch, known: Outputs | None = None) -> tuple[float, dict[str, float]]:
        """(loss, quality) over a whole batch, run in pieces, scored together."""
        return self.judge(self.run(models, batch, known), batch)

    @torch.inference_mode()
    def judge(self, out: Outputs, batch: Batch) -> tuple[float, dict[str, float]]:
        """(loss, quality) of given outputs."""
        return float(sum(self.losses(out, batch).values())), self.quality(out, batch)

    @torch.inference_mode()
    def run(self, models: Models, batch: Batch, known: Outputs | None = None) -> Outputs:
        """`forward` in pieces of the spec's `data.batch`."""
        pieces, size = [], self.size
        for i in range(0, len(batch), size):
            part = {n: {k: v[i : i + size] for k, v in o.items()} for n, o in (known or {}).items()}
            pieces.append(self.forward(models, batch[slice(i, i + size)], part))
        return {n: {k: torch.cat([p[n][k] for p in pieces]) for k in o} for n, o in pieces[0].items()}
