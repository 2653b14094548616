"""A pipeline of one model is a pipeline: a text encoder alone, with its lines of text."""

from __future__ import annotations

SPEC = """\
name: sentence
inputs: {text: text}
nodes:
  sentence: {kind: text_encoder, source: ./clip, inputs: {text: text}}
outputs: {embedding: sentence.embedding}
data: {kind: text_lines, options: {path: ./lines.txt}, calibration: 16, validation_pairs: 12}
metrics: [embedding]
target: 1.2x
distill: {steps: 2, minutes: 1, batch: 4}
compute: {precision: fp32}
search: {trials: 2, level_switches: 0, executor: inline, workers: 1, max_artifacts: 1}
measure: {threads: 1, warmup: 1, requests: 8, memory: false}
"""


def write_one_node(folder, tiny):
    """Write the spec of a text encoder alone, and its data; returns the spec."""
    lines = [
        f"a {color} {thing}" for color in ("red", "green", "old") for thing in "abcdefghijklmnop"
    ]
    (folder / "lines.txt").write_text("\n".join(lines))
    spec = folder / "spec.yaml"
    spec.write_text(SPEC.replace("./clip", f"{tiny}/clip"))
    return spec
