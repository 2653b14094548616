"""The whole job at real size: CLIP ViT-B/32 beside BLIP base, true architecture, random weights, no hub needed.

    python benchmarks/real_size.py --out runs/real-size --target 2x

Latency does not depend on the weights, so profile, search, surgery, export and measurement are those of the pretrained
pipeline; its quality figures mean nothing. Prints the wall time and the peak memory of the run with its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_blip(folder: Path) -> None:
    """BLIP base as its library writes it, random weights."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    from mmcompress.models.embedded.train_clip_captioner import build_tokenizer

    text = {
        "vocab_size": 30524,
        "hidden_size": 768,
        "encoder_hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "bos_token_id": 30522,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sep_token_id": 102,
    }
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config={"image_size": 384})).save_pretrained(
        folder
    )
    build_tokenizer().save(str(folder / "tokenizer.json"))  # type: ignore[attr-defined]


def write_images(folder: Path, count: int) -> None:
    """A `folder` dataset of drawn scenes."""
    from PIL import Image

    from mmcompress.data.emoji_scenes import EmojiScenes

    data, rows = EmojiScenes(image_size=320), []
    for split, size in (("train", count), ("val", count), ("test", count // 2)):
        pairs = data.load(split, size)
        for i, (image, caption) in enumerate(zip(pairs.inputs, pairs.texts, strict=True)):
            Image.fromarray(image).save(folder / f"{split}{i}.png")
            rows.append({"image": f"{split}{i}.png", "caption": caption, "split": split})
    (folder / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def resident(root: int) -> int:
    """Proportional set size in bytes of a process and all its descendants (Linux)."""
    children: dict[int, list[int]] = {}
    for p in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = p.read_text()
        except OSError:
            continue
        children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(p.parent.name))
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=Path("runs/real-size"))
    p.add_argument("--target", default="2x")
    p.add_argument("--pairs", type=int, default=16)
    a = p.parse_args()
    weights, images = a.out / "blip-base", a.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        write_blip(weights)
    write_images(images, a.pairs)
    settings = [
        "nodes.vision.source=open_clip:ViT-B-32",
        "nodes.text.source=open_clip:ViT-B-32",
        f"nodes.eyes.source=transformers:{weights.resolve()}",
        f"nodes.captioner.source=transformers:{weights.resolve()}",
        f"data.calibration={a.pairs}",
        f"data.choosing={a.pairs}",
        "distill.steps=0",
    ]
    command = [sys.executable, "-m", "mmcompress.cli", "run", str(ROOT / "pipelines" / "clip_blip_base.yaml")]
    command += ["--target", a.target, "--out", str(a.out / "run"), "--resume"]
    for s in settings:
        command += ["--set", s]
    start, peak, at, done = time.time(), 0, 0.0, threading.Event()
    process = subprocess.Popen(command, env={**os.environ, "CAPTIONS_DIR": str(images.resolve())})

    def watch() -> None:
        nonlocal peak, at
        while not done.wait(0.5):
            if (now := resident(process.pid)) > peak:
                peak, at = now, time.time() - start

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    summary = json.loads((a.out / "run" / "summary.json").read_text()) if code in (0, 3) else None
    dense = 4 * summary["baseline"]["params"] / 2**30 if summary else float("nan")
    print(
        f"exit {code}; {(time.time() - start) / 60:.1f} min; peak memory {peak / 2**30:.2f} GiB after {at:.0f} s",
        end="; ",
    )
    print(f"dense weights {dense:.2f} GiB, bound 3x + 2 GiB = {3 * dense + 2:.2f} GiB")
    return code


if __name__ == "__main__":
    sys.exit(main())
