"""Train the reference weights of `pipelines/clip_captioner.yaml` on `emoji_scenes`; resumable.

    python tools/train_demo_models.py --out OUT --minutes 50

Writes `clip/` (open_clip's folder format, both towers) and `captioner/` (a transformers folder),
float16 safetensors, and `card.json` with the figures of the model card.

Three auxiliary heads make an hour on two cores enough. One names the emoji under each image patch,
one says where the patch is, one names the set of emoji in an embedding. They are thrown away at the
end. The first quarter of the time trains the vision tower alone, on crowded scenes.

Shapes in this file:
    B  batch
    S  side of the image in pixels
    N  patches
    W  width
    D  width of the embedding
    T  tokens of a caption
    V  vocabulary
    E  emoji
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from mmcompress.data.emoji_scenes import EMOJI_NAMES, RELATIONS, EmojiScenes, Scene
from mmcompress.models.sources import EMBEDDED_FOLDER

WIDTH = 256
"""Width of the layers of all three models."""
EMBEDDING_WIDTH = 256
"""Width of the embedding that image and text share."""
CONTEXT_LENGTH = 20
"""Tokens of the longest caption, start and end included."""
PATCH_SIDE = 10
"""Side of an image patch in pixels."""
BOS_ID = 0
"""Token that starts a caption."""
PAD_ID = 1
"""Token that fills up a shorter caption."""
EOS_ID = 2
"""Token that ends a caption."""
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
"""Tokens that are no words, at their ids."""

VISION_ONLY_SHARE = 0.25
"""Share of the time that trains the vision tower alone."""
SET_LOSS_WEIGHT = 10
"""Weight of naming the set of emoji: its binary cross-entropy is small beside the other losses."""
MAX_LOGIT_SCALE = 100
"""Largest factor on similarities, as in CLIP (Radford et al. 2021)."""
MAX_GRADIENT_NORM = 5.0
"""Norm that gradients are cut to."""

MATRIX_LEARNING_RATE = 0.02
"""Learning rate of Muon, for the matrices inside the blocks."""
MATRIX_MOMENTUM = 0.95
"""Share of Muon's momentum that is left after a step."""
MATRIX_WEIGHT_DECAY = 0.01
"""Weight decay of the matrices inside the blocks."""
OTHER_LEARNING_RATE = 1.5e-3
"""Learning rate of AdamW, for everything else."""
NEWTON_SCHULZ_FACTORS = (3.4445, -4.7750, 2.0315)
"""Factors a, b, c of a x + (b A + c A A) x with A = x x^T, as Jordan et al. 2024 tuned them."""
WARMUP_STEPS = 40
"""Steps over which the learning rates rise."""
COOLDOWN_SHARE = 0.5
"""Share of the time, at its end, over which the learning rates fall."""
LAST_RATE_SCALE = 0.005
"""Factor on both learning rates at the end."""

PRINT_EVERY_STEPS = 20
"""Steps between two lines of losses."""
SAVE_EVERY_STEPS = 200
"""Steps between two checkpoints."""
VALIDATION_SCENES = 200
"""Scenes of a validation while training."""
CARD_SCENES = 1000
"""Scenes behind each figure of the model card."""
EVALUATION_BATCH = 100
"""Scenes evaluated at once."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Hold the options of the command line."""

    out: Path
    """Folder for the weights and the checkpoint."""
    minutes: float
    """Minutes of training, those of an earlier session included."""
    batch: int
    """Scenes of a step."""
    threads: int
    """Threads of torch."""
    seed: int
    """Seed of the weights and of the scenes."""


def build_tokenizer() -> Tokenizer:
    """Build a word-level tokenizer over all words of captions; it adds `<s>` and `</s>`."""
    all_words = {"a", "an", ","}
    for phrase in (*EMOJI_NAMES, *RELATIONS):
        all_words.update(phrase.split())
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *sorted(all_words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS_ID), ("</s>", EOS_ID)]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def make_clip_config(vocabulary_size: int, image_side: int) -> dict[str, dict]:
    """Make the content of `open_clip_config.json`."""
    vision = {
        "image_size": image_side,
        "patch_size": PATCH_SIDE,
        "width": WIDTH,
        "layers": 4,
        "head_width": 32,
        "output_tokens": True,
    }
    text = {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": vocabulary_size,
        "width": WIDTH,
        "heads": 8,
        "layers": 3,
        "pad_id": PAD_ID,
        "eos_id": EOS_ID,
        "pool_type": "eos",
    }
    return {
        "model_cfg": {"embed_dim": EMBEDDING_WIDTH, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "resize_mode": "squash",
        },
    }


class Trainee(nn.Module):
    """Hold both towers, the captioner and the auxiliary heads.

    Args:
        vocabulary_size: V.
        image_side: S, in pixels.
    """

    def __init__(self, vocabulary_size: int, image_side: int):
        super().__init__()
        # Tests take the tokenizer alone, and these imports take seconds.
        from open_clip.model import CLIP
        from transformers import MBartConfig, MBartForCausalLM

        self.clip = CLIP(**make_clip_config(vocabulary_size, image_side)["model_cfg"])
        captioner_config = MBartConfig(
            vocab_size=vocabulary_size,
            d_model=WIDTH,
            decoder_layers=3,
            decoder_attention_heads=8,
            decoder_ffn_dim=4 * WIDTH,
            encoder_layers=0,
            max_position_embeddings=CONTEXT_LENGTH,
            dropout=0.0,
            is_decoder=True,
            is_encoder_decoder=False,
            scale_embedding=False,
            bos_token_id=BOS_ID,
            pad_token_id=PAD_ID,
            eos_token_id=EOS_ID,
            forced_eos_token_id=None,
        )
        self.captioner = MBartForCausalLM(captioner_config)
        # One class more than there are emoji: no emoji under the patch.
        self.patch_head = nn.Linear(WIDTH, len(EMOJI_NAMES) + 1)
        self.set_head = nn.Linear(EMBEDDING_WIDTH, len(EMOJI_NAMES))
        self.place_head = nn.Linear(WIDTH, 2)
        grid = torch.linspace(-1, 1, image_side // PATCH_SIDE)
        places_N2 = torch.cartesian_prod(grid, grid)
        self.register_buffer("places", places_N2, persistent=False)

    def compute_patch_losses(self, tokens_BNW: Tensor, emoji_BN: Tensor) -> dict[str, Tensor]:
        """Compute how well each patch token names the emoji under it, and its place.

        Args:
            tokens_BNW: [B, N, W], patch tokens of the vision tower.
            emoji_BN: [B, N], the emoji under each patch; E where there is none.
        """
        logits = self.patch_head(tokens_BNW).flatten(0, 1)
        place_errors = self.place_head(tokens_BNW) - self.places
        return {
            "patch": F.cross_entropy(logits, emoji_BN.flatten()),
            "place": place_errors.square().mean(),
        }

    def compute_losses(
        self, image: Tensor, ids_BT: Tensor, *, emoji_BN: Tensor, present_BE: Tensor
    ) -> dict[str, Tensor]:
        """Compute all losses of a batch.

        Args:
            image: [B, 3, S, S], pixels in -1..1.
            ids_BT: [B, T], captions.
            emoji_BN: [B, N], the emoji under each patch; E where there is none.
            present_BE: [B, E], 1 where an emoji is in the scene, else 0.
        """
        embedding_BD, tokens_BNW = self.clip.visual(image)
        text_BD = self.clip.encode_text(pad_captions(ids_BT))
        logits_BTV = self.captioner(
            input_ids=ids_BT[:, :-1], encoder_hidden_states=tokens_BNW
        ).logits
        caption_loss = F.cross_entropy(
            logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), ignore_index=PAD_ID
        )
        # CLIP's contrast: each image must be nearest to its own caption, and the other way round.
        scale = self.clip.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        similarity_BB = scale * F.normalize(embedding_BD, dim=-1) @ F.normalize(text_BD, dim=-1).T
        own_pair_B = torch.arange(len(similarity_BB))
        image_loss = F.cross_entropy(similarity_BB, own_pair_B)
        text_loss = F.cross_entropy(similarity_BB.T, own_pair_B)
        set_losses = [
            F.binary_cross_entropy_with_logits(self.set_head(vector_BD), present_BE)
            for vector_BD in (embedding_BD, text_BD)
        ]
        return {
            "caption": caption_loss,
            **self.compute_patch_losses(tokens_BNW, emoji_BN),
            "contrast": (image_loss + text_loss) / 2,
            "set": SET_LOSS_WEIGHT * torch.stack(set_losses).sum(),
        }


def pad_captions(ids_BT: Tensor) -> Tensor:
    """Pad captions [B, T] to the context length of the text tower."""
    return F.pad(ids_BT, (0, CONTEXT_LENGTH - ids_BT.shape[1]), value=PAD_ID)


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Compute nearly the nearest semi-orthogonal matrix by the iteration of Newton and Schulz.

    It is the step of the Muon optimizer (Jordan et al. 2024).

    Args:
        update: a matrix.
        steps: iterations.
    """
    a, b, c = NEWTON_SCHULZ_FACTORS
    x = update / (update.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class Optimizer:
    """Update matrices inside the blocks by Muon and everything else by AdamW.

    All state is tensors, so that safetensors can hold it.
    """

    def __init__(self, model: nn.Module):
        self.matrices: dict[str, nn.Parameter] = {}
        other_parameters: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_inside_block = "resblocks" in name or "layers" in name
            if parameter.ndim == 2 and is_inside_block:
                self.matrices[name] = parameter
            else:
                other_parameters.append(parameter)
        self.momentum = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        # Biases and norms are not decayed.
        decayed = [parameter for parameter in other_parameters if parameter.ndim > 1]
        kept = [parameter for parameter in other_parameters if parameter.ndim <= 1]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
        )

    @torch.no_grad()
    def step(self, rate_scale: float) -> None:
        """Update all weights once.

        Args:
            rate_scale: factor on both learning rates, 0 to 1.
        """
        for name, matrix in self.matrices.items():
            # The first part of the training does not reach the text models.
            if matrix.grad is None:
                continue
            momentum = self.momentum[name].mul_(MATRIX_MOMENTUM).add_(matrix.grad)
            gradient = matrix.grad.add(momentum, alpha=MATRIX_MOMENTUM)
            # A packed projection holds three matrices.
            parts = gradient.chunk(3) if "in_proj" in name else (gradient,)
            update = torch.cat([_scale_update(part) for part in parts])
            matrix.mul_(1 - MATRIX_WEIGHT_DECAY * rate_scale * MATRIX_LEARNING_RATE)
            matrix.add_(update, alpha=-MATRIX_LEARNING_RATE * rate_scale)
        for group in self.adam.param_groups:
            group["lr"] = OTHER_LEARNING_RATE * rate_scale
        self.adam.step()


def _scale_update(gradient: Tensor) -> Tensor:
    """Make Muon's update of one matrix; a tall matrix gets a larger one."""
    return orthogonalize(gradient) * max(1.0, gradient.shape[0] / gradient.shape[1]) ** 0.5


def make_targets(scenes: Sequence[Scene], image_side: int) -> tuple[Tensor, Tensor]:
    """Make the targets of the auxiliary heads.

    Args:
        scenes: B scenes.
        image_side: S, in pixels.

    Returns:
        The emoji under each patch [B, N], E where there is none; and the set of emoji of each
        scene [B, E], 1 or 0.
    """
    grid = image_side // PATCH_SIDE
    centres = (np.arange(grid) + 0.5) * PATCH_SIDE
    emoji_by_patch = np.full((len(scenes), grid, grid), len(EMOJI_NAMES))
    present_BE = np.zeros((len(scenes), len(EMOJI_NAMES)), np.float32)
    for i, scene in enumerate(scenes):
        present_BE[i, list(scene.emoji)] = 1
        for emoji, box in zip(scene.emoji, scene.boxes, strict=True):
            centre_x, centre_y, side = box
            in_row = np.abs(centres[:, None] - centre_y) < side / 2
            in_column = np.abs(centres[None] - centre_x) < side / 2
            emoji_by_patch[i][in_row & in_column] = emoji
    emoji_BN = emoji_by_patch.reshape(len(scenes), -1)
    return torch.from_numpy(emoji_BN), torch.from_numpy(present_BE)


def draw_images(data: EmojiScenes, scenes: Sequence[Scene]) -> Tensor:
    """Draw scenes as images [B, 3, S, S] in -1..1."""
    pixels = torch.from_numpy(np.stack([data.render_scene(scene) for scene in scenes]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def tokenize_captions(tokenizer: Tokenizer, scenes: Sequence[Scene]) -> Tensor:
    """Tokenize captions to [B, T], padded to the longest of them."""
    rows = [tokenizer.encode(scene.caption).ids for scene in scenes]
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows])


def select_distinct_scenes(data: EmojiScenes, split: str, *, count: int) -> list[Scene]:
    """Take the first scenes of a split, each caption once."""
    captions: set[str] = set()
    scenes: list[Scene] = []
    for scene in data.generate_scenes(split):
        if scene.caption not in captions:
            captions.add(scene.caption)
            scenes.append(scene)
        if len(scenes) == count:
            break
    return scenes


@torch.no_grad()
def evaluate(
    model: Trainee, data: EmojiScenes, *, tokenizer: Tokenizer, split: str, count: int
) -> dict[str, float]:
    """Measure retrieval both ways among scenes of distinct captions, and exact match of captions.

    Greedy decoding writes a caption exactly if every teacher-forced argmax is right, so nothing is
    decoded here.

    Args:
        model: what is measured.
        data: where the scenes come from.
        tokenizer: of the captions.
        split: of the data.
        count: number of scenes.

    Returns:
        R@1 of image to text and of text to image, exact match of greedy captions, the count.
    """
    model.eval()
    scenes = select_distinct_scenes(data, split, count=count)
    image_embeddings: list[Tensor] = []
    text_embeddings: list[Tensor] = []
    exact_matches: list[Tensor] = []
    for start in range(0, count, EVALUATION_BATCH):
        batch = scenes[start : start + EVALUATION_BATCH]
        ids_BT = tokenize_captions(tokenizer, batch)
        embedding_BD, tokens_BNW = model.clip.visual(draw_images(data, batch))
        text_BD = model.clip.encode_text(pad_captions(ids_BT))
        image_embeddings.append(F.normalize(embedding_BD, dim=-1))
        text_embeddings.append(F.normalize(text_BD, dim=-1))
        outputs = model.captioner(input_ids=ids_BT[:, :-1], encoder_hidden_states=tokens_BNW)
        expected_BT = ids_BT[:, 1:]
        is_right_BT = outputs.logits.argmax(-1) == expected_BT
        exact_matches.append((is_right_BT | (expected_BT == PAD_ID)).all(1))
    similarity = torch.cat(image_embeddings) @ torch.cat(text_embeddings).T
    own_pair = torch.arange(count)
    model.train()
    return {
        "image_to_text_r1": (similarity.argmax(1) == own_pair).float().mean().item(),
        "text_to_image_r1": (similarity.argmax(0) == own_pair).float().mean().item(),
        "caption_exact_match": torch.cat(exact_matches).float().mean().item(),
        "n": count,
    }


def _copy_as_half(module: nn.Module) -> dict[str, Tensor]:
    """Copy the weights of a module as float16."""
    return {
        name: tensor.half().contiguous().clone() for name, tensor in module.state_dict().items()
    }


def save_models(model: Trainee, tokenizer: Tokenizer, *, image_side: int, out: Path) -> None:
    """Write `clip/` and `captioner/` as open_clip and transformers themselves load them."""
    for name in ("clip", "captioner"):
        (out / name).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out / name / "tokenizer.json"))
    save_file(_copy_as_half(model.clip), out / "clip" / "open_clip_model.safetensors")
    config = make_clip_config(tokenizer.get_vocab_size(), image_side)
    (out / "clip" / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    captioner_weights = _copy_as_half(model.captioner)
    # The head is tied to the embedding.
    captioner_weights.pop("lm_head.weight")
    save_file(captioner_weights, out / "captioner" / "model.safetensors", {"format": "pt"})
    model.captioner.config.save_pretrained(out / "captioner")
    model.captioner.generation_config.save_pretrained(out / "captioner")


def save_checkpoint(
    path: Path, model: Trainee, *, optimizer: Optimizer, step: int, seconds: float
) -> None:
    """Write weights and state of the optimizer, whole or not at all.

    Args:
        path: a `.safetensors` file; step and seconds go to the `.json` file beside it.
        model: its weights.
        optimizer: its state.
        step: steps so far.
        seconds: of training so far.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        # The head of the captioner is tied to the embedding.
        if name != "captioner.lm_head.weight":
            tensors[f"model.{name}"] = tensor
    for name, tensor in optimizer.momentum.items():
        tensors[f"muon.{name}"] = tensor
    for i, state in optimizer.adam.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"adam.{i}.{name}"] = torch.as_tensor(value)
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    path.with_suffix(".json").write_text(json.dumps({"step": step, "seconds": seconds}))


def _select_by_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the tensors whose names start with a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def restore_checkpoint(path: Path, model: Trainee, *, optimizer: Optimizer) -> tuple[int, float]:
    """Read a checkpoint into a model and its optimizer; returns steps and seconds so far."""
    tensors = load_file(path)
    # The tied head is missing in the file.
    model.load_state_dict(_select_by_prefix(tensors, "model."), strict=False)
    optimizer.momentum = _select_by_prefix(tensors, "muon.")
    adam_state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _select_by_prefix(tensors, "adam.").items():
        index, name = key.split(".")
        adam_state.setdefault(int(index), {})[name] = tensor
    optimizer.adam.load_state_dict(optimizer.adam.state_dict() | {"state": adam_state})
    progress = json.loads(path.with_suffix(".json").read_text())
    return progress["step"], progress["seconds"]


def scale_learning_rate(step: int, share_left: float) -> float:
    """Compute the factor on both learning rates: it rises, stays at 1, and falls at the end.

    Args:
        step: steps so far.
        share_left: share of the time that is left, 0 to 1.
    """
    return min((step + 1) / WARMUP_STEPS, 1.0, share_left / COOLDOWN_SHARE + LAST_RATE_SCALE)


def train(options: TrainingOptions) -> None:
    """Train until the time is over; go on from the checkpoint in the folder if there is one."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    data = EmojiScenes()
    tokenizer = build_tokenizer()
    model = Trainee(tokenizer.get_vocab_size(), data.image_size).train()
    optimizer = Optimizer(model)
    checkpoint = options.out / "checkpoint.safetensors"
    options.out.mkdir(parents=True, exist_ok=True)
    step = 0
    earlier_seconds = 0.0
    if checkpoint.exists():
        step, earlier_seconds = restore_checkpoint(checkpoint, model, optimizer=optimizer)
    scene_stream = data.generate_scenes("train", options.seed + step)
    crowd_stream = data.generate_crowds(options.seed + step)
    start = time.time() - earlier_seconds
    total_seconds = options.minutes * 60
    vision_only_seconds = total_seconds * VISION_ONLY_SHARE
    while (elapsed := time.time() - start) < total_seconds:
        if elapsed < vision_only_seconds:
            scenes = [next(crowd_stream) for _ in range(options.batch)]
            emoji_BN, present_BE = make_targets(scenes, data.image_size)
            _, tokens_BNW = model.clip.visual(draw_images(data, scenes))
            losses = model.compute_patch_losses(tokens_BNW, emoji_BN)
        else:
            scenes = [next(scene_stream) for _ in range(options.batch)]
            emoji_BN, present_BE = make_targets(scenes, data.image_size)
            losses = model.compute_losses(
                draw_images(data, scenes),
                tokenize_captions(tokenizer, scenes),
                emoji_BN=emoji_BN,
                present_BE=present_BE,
            )
        total_loss = torch.zeros(())
        for loss in losses.values():
            total_loss = total_loss + loss
        total_loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step(scale_learning_rate(step, 1 - elapsed / total_seconds))
        model.zero_grad()
        step += 1
        if step % PRINT_EVERY_STEPS == 0:
            figures = " ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            print(f"step {step} {elapsed:.0f}s {figures}", flush=True)
        if step % SAVE_EVERY_STEPS == 0:
            if elapsed > vision_only_seconds:
                quality = evaluate(
                    model, data, tokenizer=tokenizer, split="val", count=VALIDATION_SCENES
                )
                print("val", quality, flush=True)
            save_checkpoint(
                checkpoint, model, optimizer=optimizer, step=step, seconds=time.time() - start
            )
            save_models(model, tokenizer, image_side=data.image_size, out=options.out)
    save_models(model, tokenizer, image_side=data.image_size, out=options.out)
    # The figures of the card are those of the weights as they were written, in float16.
    model.half().float()
    card: dict[str, object] = {
        "steps": step,
        "batch": options.batch,
        "minutes": options.minutes,
        "seed": options.seed,
    }
    for split in ("val", "test", "test_style"):
        card[split] = evaluate(model, data, tokenizer=tokenizer, split=split, count=CARD_SCENES)
    (options.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


def parse_options() -> TrainingOptions:
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=EMBEDDED_FOLDER / "clip_captioner",
        help="folder for weights and checkpoint",
    )
    parser.add_argument("--minutes", type=float, default=50, help="minutes of training in all")
    parser.add_argument("--batch", type=int, default=64, help="scenes of a step")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and scenes")
    arguments = parser.parse_args()
    return TrainingOptions(
        out=arguments.out,
        minutes=arguments.minutes,
        batch=arguments.batch,
        threads=arguments.threads,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    train(parse_options())
