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
MINUTES = 20


def write_blip(folder: Path) -> None:
    """BLIP base as its library writes it, random weights."""
    from train_demo_models import build_tokenizer
    from transformers import BlipConfig, BlipForConditionalGeneration

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
    BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config={"image_size": 384})
    ).save_pretrained(folder)
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
        total += next(
            (
                int(line.split()[1]) * 1024
                for line in rollup.splitlines()
                if line.startswith("Pss:")
            ),
            0,
        )
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
        "nodes.vision.source=open_clip:ViT-B-32@random",
        "nodes.text.source=open_clip:ViT-B-32@random",
        f"nodes.eyes.source=transformers:{weights.resolve()}",
        f"nodes.captioner.source=transformers:{weights.resolve()}",
        f"data.calibration={a.pairs}",
        f"data.validation_pairs={a.pairs}",
        "distill.steps=0",
    ]
    command = [
        sys.executable,
        "-m",
        "mmcompress.cli",
        "run",
        str(ROOT / "pipelines" / "clip_blip_base.yaml"),
    ]
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
    minutes, gib = (time.time() - start) / 60, peak / 2**30
    print(f"exit {code}; {minutes:.1f} min; peak memory {gib:.2f} GiB after {at:.0f} s")
    if code not in (0, 3):
        return code
    summary = json.loads((a.out / "run" / "summary.json").read_text())
    text = told(summary, json.loads((a.out / "run" / "fitted.json").read_text()), minutes, gib)
    (ROOT / "reports" / "real-size.md").write_text(text)
    print(text)
    return code or int(minutes > MINUTES or gib > bound(summary))


def bound(summary: dict) -> float:
    """GiB a run may take: three times the dense weights, and two."""
    return 3 * 4 * summary["baseline"]["params"] / 2**30 + 2


def told(s: dict, fitted: dict, minutes: float, gib: float) -> str:
    """The record of a run."""
    before, after = s["baseline"], s["compressed"]
    rows = [
        f"| {n} | {before['nodes'][n]['latency_ms_p50']:.0f} ms | {x['latency_ms_p50']:.0f} ms | "
        f"{before['nodes'][n]['params'] / 1e6:.0f} M | {x['params'] / 1e6:.0f} M | {x['precision']} |"
        for n, x in after["nodes"].items()
    ]
    tries = [f"{x['predicted_ms']:.0f} / {x['measured_ms']:.0f} ms" for x in fitted["attempts"]]
    passed = sum(p["passed"] for p in s["proofs"])
    spent = ", ".join(f"{k} {v:.0f}" for k, v in s["timings"].items() if k != "total")
    return (
        "\n".join(
            [
                f"# Real size: {s['pipeline']} at {s['target']['asked']}",
                "",
                "CLIP ViT-B/32 beside BLIP base, true architecture, random weights; nothing is distilled.",
                "",
                f"- **{s['speedup']:.2f}x** measured: p50 {before['latency_ms']['p50']:.0f} -> "
                f"{after['latency_ms']['p50']:.0f} ms, target {s['target']['latency_ms']:.0f} ms "
                f"{'met' if s['target']['met'] else 'not met'}; "
                f"{s['settings']['measure']['threads']} threads of {s['cpu']['name']}, {s['cpu']['cores']} cores.",
                f"- {minutes:.1f} minutes (bound {MINUTES}); seconds: {spent}.",
                f"- Peak memory {gib:.2f} GiB, all processes; bound (3x dense weights + 2 GiB) {bound(s):.2f} GiB.",
                f"- Structures measured before training, predicted / measured: {'; '.join(tries)}.",
                f"- {s['search']['trials']} trials; {passed} of {len(s['proofs'])} proofs passed.",
                "",
                "| node | p50 before | after | parameters before | after | precision |",
                "|---|---:|---:|---:|---:|---|",
                *rows,
                "",
                "Made by `python benchmarks/real_size.py`, which fails where a bound is broken.",
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
