"""Train the reference weights of `pipelines/clip_captioner.yaml` on `emoji_scenes`; resumable.

    python tools/train_demo_models.py --out OUT --minutes 50

Writes `clip/` (open_clip's folder format: both towers) and `captioner/` (a transformers folder), float16 safetensors,
and `card.json` with the figures of the model card. Three auxiliary heads, thrown away at the end, make an hour on two
cores enough: one names the emoji under each image patch, one tells where the patch is, one names the set of emoji in
an embedding. The first quarter of the time trains the vision tower alone, on crowded scenes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from mmcompress.data.emoji_scenes import EMOJI_NAMES, RELATIONS, EmojiScenes, Scene
from mmcompress.models.sources import EMBEDDED_FOLDER

WIDTH, EMBED, CONTEXT, PATCH = 256, 256, 20, 10
BOS, PAD, EOS = 0, 1, 2


def build_tokenizer() -> object:
    """A word-level tokenizer over every word a caption can hold, `<s> ... </s>` around it."""
    words = sorted({w for n in (*EMOJI_NAMES, *RELATIONS) for w in n.split()} | {"a", "an", ","})
    vocab = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tok.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tok.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    return tok


def model_config(vocab: int, image_size: int) -> dict:
    return {
        "model_cfg": {
            "embed_dim": EMBED,
            "vision_cfg": {
                "image_size": image_size,
                "patch_size": PATCH,
                "width": WIDTH,
                "layers": 4,
                "head_width": 32,
                "output_tokens": True,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": vocab,
                "width": WIDTH,
                "heads": 8,
                "layers": 3,
                "pad_id": PAD,
                "eos_id": EOS,
                "pool_type": "eos",
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "resize_mode": "squash",
        },
    }


class Trainee(nn.Module):
    """Both towers, the captioner and the auxiliary heads."""

    def __init__(self, vocab: int, image_size: int):
        super().__init__()
        from open_clip.model import CLIP
        from transformers import MBartConfig, MBartForCausalLM

        self.clip = CLIP(**model_config(vocab, image_size)["model_cfg"])
        self.captioner = MBartForCausalLM(
            MBartConfig(
                vocab_size=vocab,
                d_model=WIDTH,
                decoder_layers=3,
                decoder_attention_heads=8,
                decoder_ffn_dim=4 * WIDTH,
                encoder_layers=0,
                max_position_embeddings=CONTEXT,
                dropout=0.0,
                is_decoder=True,
                is_encoder_decoder=False,
                scale_embedding=False,
                bos_token_id=BOS,
                pad_token_id=PAD,
                eos_token_id=EOS,
                forced_eos_token_id=None,
            )
        )
        self.patch_head = nn.Linear(WIDTH, len(EMOJI_NAMES) + 1)
        self.set_head = nn.Linear(EMBED, len(EMOJI_NAMES))
        self.place_head = nn.Linear(WIDTH, 2)
        grid = torch.linspace(-1, 1, image_size // PATCH)
        self.register_buffer("places", torch.cartesian_prod(grid, grid), persistent=False)

    def patch_losses(self, tokens: Tensor, under: Tensor) -> dict[str, Tensor]:
        """Each patch token [b, n, w] names the emoji under it, under [b, n], and where it is."""
        return {
            "patch": F.cross_entropy(self.patch_head(tokens).flatten(0, 1), under.flatten()),
            "place": (self.place_head(tokens) - self.places).square().mean(),
        }

    def losses(
        self, image: Tensor, ids: Tensor, under: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """image [b, 3, s, s], ids [b, t], under [b, patches] emoji per patch, present [b, emoji] in {0, 1}."""
        embedding, tokens = self.clip.visual(image)
        padded = F.pad(ids, (0, CONTEXT - ids.shape[1]), value=PAD)
        text = self.clip.encode_text(padded)
        logits = self.captioner(input_ids=ids[:, :-1], encoder_hidden_states=tokens).logits
        scale = self.clip.logit_scale.exp().clamp(max=100)
        sim = scale * F.normalize(embedding, dim=-1) @ F.normalize(text, dim=-1).T
        own = torch.arange(len(sim))
        named = torch.stack(
            [
                F.binary_cross_entropy_with_logits(self.set_head(e), present)
                for e in (embedding, text)
            ]
        ).sum()
        return {
            "caption": F.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD
            ),
            **self.patch_losses(tokens, under),
            "contrast": (F.cross_entropy(sim, own) + F.cross_entropy(sim.T, own)) / 2,
            "set": 10 * named,
        }


def orthogonal(update: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to `update` by Newton-Schulz (the Muon optimizer, Jordan et al. 2024)."""
    x = update / (update.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


class Optimizer:
    """Muon for the matrices inside the blocks, AdamW for the rest; all state is tensors, so safetensors can hold it."""

    def __init__(self, model: nn.Module):
        inner = ("resblocks", "layers")
        named = list(model.named_parameters())
        self.matrices = {n: p for n, p in named if p.ndim == 2 and any(k in n for k in inner)}
        self.rest = {n: p for n, p in named if n not in self.matrices}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        decay = [p for p in self.rest.values() if p.ndim > 1]
        plain = [p for p in self.rest.values() if p.ndim <= 1]
        self.adam = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
        )

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update; `rate` in 0..1 scales both learning rates."""
        for name, p in self.matrices.items():
            if p.grad is None:
                continue
            m = self.momentum[name].mul_(0.95).add_(p.grad)
            g = p.grad.add(m, alpha=0.95)
            parts = g.chunk(3) if "in_proj" in name else (g,)
            g = torch.cat([orthogonal(x) * max(1.0, x.shape[0] / x.shape[1]) ** 0.5 for x in parts])
            p.mul_(1 - 0.01 * rate * 0.02).add_(g, alpha=-0.02 * rate)
        for group in self.adam.param_groups:
            group["lr"] = 1.5e-3 * rate
        self.adam.step()


def targets(scenes: list[Scene], size: int) -> tuple[Tensor, Tensor]:
    """The emoji under each patch (the last class: none) and the set of emoji of each scene."""
    grid = size // PATCH
    centres = (np.arange(grid) + 0.5) * PATCH
    under = np.full((len(scenes), grid, grid), len(EMOJI_NAMES))
    present = np.zeros((len(scenes), len(EMOJI_NAMES)), np.float32)
    for i, scene in enumerate(scenes):
        present[i, list(scene.emoji)] = 1
        for e, (cx, cy, side) in zip(scene.emoji, scene.boxes, strict=True):
            inside = (np.abs(centres[:, None] - cy) < side / 2) & (
                np.abs(centres[None] - cx) < side / 2
            )
            under[i][inside] = e
    return torch.from_numpy(under.reshape(len(scenes), -1)), torch.from_numpy(present)


def images(data: EmojiScenes, scenes: list[Scene]) -> Tensor:
    return (
        torch.from_numpy(np.stack([data.render_scene(s) for s in scenes]))
        .permute(0, 3, 1, 2)
        .float()
        / 127.5
        - 1
    )


def words(tok: Tokenizer, scenes: list[Scene]) -> Tensor:
    ids = [tok.encode(s.caption).ids for s in scenes]
    longest = max(map(len, ids))
    return torch.tensor([i + [PAD] * (longest - len(i)) for i in ids])


@torch.no_grad()
def evaluate(
    model: Trainee, data: EmojiScenes, tok: Tokenizer, split: str, count: int
) -> dict[str, float]:
    """Retrieval R@1 both ways among `count` scenes of distinct captions; exact match of greedy captions.

    Under greedy decoding a caption is right exactly when every teacher-forced argmax is, so no decoding is needed.
    """
    model.eval()
    scenes, seen = [], set()
    for s in data.generate_scenes(split):
        if s.caption not in seen:
            seen.add(s.caption)
            scenes.append(s)
        if len(scenes) == count:
            break
    found, texts, right = [], [], []
    for i in range(0, count, 100):
        ids = words(tok, scenes[i : i + 100])
        e, tokens = model.clip.visual(images(data, scenes[i : i + 100]))
        found.append(F.normalize(e, dim=-1))
        texts.append(
            F.normalize(
                model.clip.encode_text(F.pad(ids, (0, CONTEXT - ids.shape[1]), value=PAD)), dim=-1
            )
        )
        guess = model.captioner(input_ids=ids[:, :-1], encoder_hidden_states=tokens).logits.argmax(
            -1
        )
        right.append(((guess == ids[:, 1:]) | (ids[:, 1:] == PAD)).all(1))
    sim, own = torch.cat(found) @ torch.cat(texts).T, torch.arange(count)
    model.train()
    return {
        "image_to_text_r1": (sim.argmax(1) == own).float().mean().item(),
        "text_to_image_r1": (sim.argmax(0) == own).float().mean().item(),
        "caption_exact_match": torch.cat(right).float().mean().item(),
        "n": count,
    }


def save(model: Trainee, tok: Tokenizer, image_size: int, out: Path) -> None:
    """The two folders, as open_clip and transformers themselves load them."""
    half = lambda m: {k: v.half().contiguous().clone() for k, v in m.state_dict().items()}
    for name in ("clip", "captioner"):
        (out / name).mkdir(parents=True, exist_ok=True)
        tok.save(str(out / name / "tokenizer.json"))
    save_file(half(model.clip), out / "clip" / "open_clip_model.safetensors")
    config = model_config(tok.get_vocab_size(), image_size)
    (out / "clip" / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = half(model.captioner)
    state.pop("lm_head.weight")  # tied to the embedding
    save_file(state, out / "captioner" / "model.safetensors", {"format": "pt"})
    model.captioner.config.save_pretrained(out / "captioner")
    model.captioner.generation_config.save_pretrained(out / "captioner")


def checkpoint(path: Path, model: Trainee, optimizer: Optimizer, step: int, seconds: float) -> None:
    tensors = {
        f"model.{k}": v for k, v in model.state_dict().items() if k != "captioner.lm_head.weight"
    }
    tensors |= {f"muon.{k}": v for k, v in optimizer.momentum.items()}
    for i, s in optimizer.adam.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": torch.as_tensor(v) for k, v in s.items()}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    path.with_suffix(".json").write_text(json.dumps({"step": step, "seconds": seconds}))


def restore(path: Path, model: Trainee, optimizer: Optimizer) -> tuple[int, float]:
    tensors = load_file(path)
    part = lambda p: {k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)}
    model.load_state_dict(part("model."), strict=False)
    optimizer.momentum = part("muon.")
    state: dict[int, dict] = {}
    for k, v in part("adam.").items():
        i, name = k.split(".")
        state.setdefault(int(i), {})[name] = v
    optimizer.adam.load_state_dict(optimizer.adam.state_dict() | {"state": state})
    at = json.loads(path.with_suffix(".json").read_text())
    return at["step"], at["seconds"]


def train(out: Path, minutes: float, size: int, threads: int, seed: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    data, tok = EmojiScenes(), build_tokenizer()
    model = Trainee(tok.get_vocab_size(), data.image_size).train()
    optimizer = Optimizer(model)
    state = out / "checkpoint.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    step, used = restore(state, model, optimizer) if state.exists() else (0, 0.0)
    stream, crowds = data.generate_scenes("train", seed + step), data.generate_crowds(seed + step)
    began = time.time() - used
    alone = minutes * 60 * 0.25
    while (elapsed := time.time() - began) < minutes * 60:
        if elapsed < alone:
            scenes = [next(crowds) for _ in range(size)]
            image = images(data, scenes)
            losses = model.patch_losses(
                model.clip.visual(image)[1], targets(scenes, data.image_size)[0]
            )
        else:
            scenes = [next(stream) for _ in range(size)]
            losses = model.losses(
                images(data, scenes), words(tok, scenes), *targets(scenes, data.image_size)
            )
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        left = 1 - elapsed / (minutes * 60)
        optimizer.step(min((step + 1) / 40, 1.0, left / 0.5 + 0.005))
        model.zero_grad()
        step += 1
        if step % 20 == 0:
            shown = " ".join(f"{k} {v.item():.3f}" for k, v in losses.items())
            print(f"step {step} {elapsed:.0f}s {shown}", flush=True)
        if step % 200 == 0:
            if elapsed > alone:
                print("val", evaluate(model, data, tok, "val", 200), flush=True)
            checkpoint(state, model, optimizer, step, time.time() - began)
            save(model, tok, data.image_size, out)
    save(model, tok, data.image_size, out)
    model.half().float()  # judge what was written
    card = {"steps": step, "batch": size, "minutes": minutes, "seed": seed}
    card |= {s: evaluate(model, data, tok, s, 1000) for s in ("val", "test", "test_style")}
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=EMBEDDED_FOLDER / "clip_captioner")
    p.add_argument("--minutes", type=float, default=50)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    train(a.out, a.minutes, a.batch, a.threads, a.seed)
