"""Do the whole job at real size: CLIP ViT-B/32 beside BLIP base, random weights, no hub needed.

    python benchmarks/real_size.py --out runs/real-size --target 2x
    python benchmarks/real_size.py --out runs/real-size --check    only `validate --deep`, timed

Latency does not depend on the weights. So profile, search, surgery, export and measurement are
those of the pretrained pipeline; its quality figures mean nothing. Prints the wall time and the
peak memory of the run with its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from process_memory import MemorySampler
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

from mmcompress.data.emoji_scenes import EmojiScenes
from mmcompress.results.records import NodeResult, Summary
from mmcompress.storage import read_record
from mmcompress.workspace.folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
MAX_MINUTES = 20
"""Bound of the wall time."""
MAX_CHECK_MINUTES = 5
"""Bound of the wall time of `validate --deep`."""
MEMORY_FACTOR = 3
"""Bound of the memory: multiple of the dense weights, ..."""
MEMORY_OFFSET_GIB = 2
"""... and GiB on top, for the libraries of all processes."""
BYTES_PER_PARAMETER = 4
"""Of float32 weights."""
GIB = 2**30
"""Bytes."""
EXIT_TARGET_MISSED = 3
"""Exit code of a run that wrote its artifact but missed the target."""


def write_blip(folder: Path) -> None:
    """Write BLIP base as its library does, with random weights."""
    # The tokenizer of the demo: words don't matter here.
    sys.path.append(str(ROOT / "tools"))
    from train_demo_models import build_tokenizer

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
    config = BlipConfig(text_config=text, vision_config={"image_size": 384})
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder)
    build_tokenizer().save(str(folder / "tokenizer.json"))


def write_images(folder: Path, count: int) -> None:
    """Write a `folder` dataset of drawn scenes.

    Args:
        folder: where images and captions go.
        count: images for training and for validation; the test split has half as many.
    """
    data = EmojiScenes(image_size=320)
    lines: list[str] = []
    for split, size in (("train", count), ("val", count), ("test", count // 2)):
        pairs = data.load(split, size)
        for i, (image, caption) in enumerate(zip(pairs.inputs, pairs.texts, strict=True)):
            file_name = f"{split}{i}.png"
            Image.fromarray(image).save(folder / file_name)
            row = {"image": file_name, "caption": caption, "split": split}
            lines.append(json.dumps(row) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines))


def make_command(arguments: argparse.Namespace, weights: Path) -> list[str]:
    """Make the command line of the run, or of its check."""
    settings = {
        "nodes.vision.source": "open_clip:ViT-B-32@random",
        "nodes.text.source": "open_clip:ViT-B-32@random",
        "nodes.eyes.source": f"transformers:{weights.resolve()}",
        "nodes.captioner.source": f"transformers:{weights.resolve()}",
        "data.calibration": arguments.pairs,
        "data.validation_pairs": arguments.pairs,
        "distill.steps": 0,
    }
    spec = str(ROOT / "pipelines" / "clip_blip_base.yaml")
    command = [sys.executable, "-m", "mmcompress.cli"]
    if arguments.check:
        command += ["validate", "--deep", spec]
    else:
        command += ["run", spec, "--resume"]
        command += ["--target", arguments.target, "--out", str(arguments.out / "run")]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return command


def compute_memory_bound(summary: Summary) -> float:
    """Compute the GiB that a run may take."""
    dense_gib = BYTES_PER_PARAMETER * summary.baseline.params / GIB
    return MEMORY_FACTOR * dense_gib + MEMORY_OFFSET_GIB


def format_node(name: str, before: NodeResult, *, after: NodeResult) -> str:
    """Format the row of one node."""
    return (
        f"| {name} | {before.latency_ms_p50:.0f} ms | {after.latency_ms_p50:.0f} ms | "
        f"{before.params / 1e6:.0f} M | {after.params / 1e6:.0f} M | {after.precision} |"
    )


def format_report(summary: Summary, *, minutes: float, peak_gib: float) -> str:
    """Format the record of a run."""
    before = summary.baseline
    after = summary.compressed
    target = summary.target
    rows = [format_node(name, before.nodes[name], after=node) for name, node in after.nodes.items()]
    attempts = [
        f"{attempt.predicted_ms:.0f} / {attempt.measured_ms:.0f} ms" for attempt in summary.attempts
    ]
    passed = sum(proof.passed for proof in summary.proofs)
    stages = [
        f"{stage} {seconds:.0f}" for stage, seconds in summary.timings.items() if stage != "total"
    ]
    lines = [
        f"# Real size: {summary.pipeline} at {target.text}",
        "",
        "CLIP ViT-B/32 beside BLIP base, true architecture, random weights; nothing is distilled.",
        "",
        f"- **{summary.speedup:.2f}x** measured: p50 {before.latency_ms.p50:.0f} -> "
        f"{after.latency_ms.p50:.0f} ms, target {target.latency_ms:.0f} ms "
        f"{'met' if target.met else 'not met'}; {summary.settings['measure']['threads']} threads "
        f"of {summary.cpu['name']}, {summary.cpu['cores']} cores.",
        f"- {minutes:.1f} minutes (bound {MAX_MINUTES}); seconds: {', '.join(stages)}.",
        f"- Peak memory {peak_gib:.2f} GiB, all processes; bound ({MEMORY_FACTOR}x dense weights + "
        f"{MEMORY_OFFSET_GIB} GiB) {compute_memory_bound(summary):.2f} GiB.",
        f"- Structures measured before training, predicted / measured: {'; '.join(attempts)}.",
        f"- {summary.search.trials} trials; {passed} of {len(summary.proofs)} proofs passed.",
        "",
        "| node | p50 before | after | parameters before | after | precision |",
        "|---|---:|---:|---:|---:|---|",
        *rows,
        "",
        "Made by `python benchmarks/real_size.py`, which fails where a bound is broken.",
    ]
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/real-size"), help="folder for weights, images, run"
    )
    parser.add_argument("--target", default="2x", help="target of the run")
    parser.add_argument("--pairs", type=int, default=16, help="images for training and validation")
    parser.add_argument("--check", action="store_true", help="only check that a run can be done")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    weights = arguments.out / "blip-base"
    images = arguments.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        write_blip(weights)
    write_images(images, arguments.pairs)
    command = make_command(arguments, weights)
    start = time.time()
    environment = {**os.environ, "CAPTIONS_DIR": str(images.resolve())}
    process = subprocess.Popen(command, env=environment)
    sampler = MemorySampler(process.pid)
    code = process.wait()
    sampler.stop()
    minutes = (time.time() - start) / 60
    peak_gib = sampler.peak_bytes / GIB
    print(
        f"exit {code}; {minutes:.1f} min; peak memory {peak_gib:.2f} GiB "
        f"after {sampler.peak_seconds:.0f} s"
    )
    if arguments.check:
        return code or int(minutes > MAX_CHECK_MINUTES)
    if code not in (0, EXIT_TARGET_MISSED):
        return code
    run = RunFolder(path=arguments.out / "run")
    summary = read_record(Summary, run.summary)
    text = format_report(summary, minutes=minutes, peak_gib=peak_gib)
    (ROOT / "reports" / "real-size.md").write_text(text)
    print(text)
    is_over_bound = minutes > MAX_MINUTES or peak_gib > compute_memory_bound(summary)
    return code or int(is_over_bound)


if __name__ == "__main__":
    sys.exit(main())
