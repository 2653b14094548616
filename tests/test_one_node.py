"""A pipeline of one model is a pipeline: a text encoder alone, compressed the whole way."""

from __future__ import annotations

import pytest

from mmcompress.data.text_lines import TextLines
from mmcompress.errors import DataError
from mmcompress.run import run_targets as workflow
from mmcompress.runtime.graph import load_bundle

SPEC = """\
name: sentence
inputs: {text: text}
nodes:
  sentence: {kind: text_encoder, source: ./clip, inputs: {text: text}}
outputs: {embedding: sentence.embedding}
data: {kind: text_lines, options: {path: ./lines.txt}, calibration: 16, validation_pairs: 12}
metrics: [embedding]
target: 1.2x
distill: {steps: 2, minutes: 1, batch: 4, precision: fp32}
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


@pytest.mark.end_to_end
@pytest.mark.slow
def test_a_text_encoder_alone_is_compressed(tiny, tmp_path, machine, one_artifact):
    spec = write_one_node(tmp_path, tiny)
    summary = workflow.run(spec, tmp_path / "r", policy=one_artifact, **machine)
    assert summary.target.met and all(proof.passed for proof in summary.proofs)
    assert set(summary.compressed.quality) == {"embedding_r1"}
    assert load_bundle(tmp_path / "r" / "bundle")(text="a red a")["embedding"].shape[-1] == 32


def test_a_line_ends_at_a_line_feed_and_stays_in_its_split(tmp_path):
    file = tmp_path / "lines.txt"
    lines = [f"line {i} with a \u2028 inside" for i in range(40)]
    file.write_bytes("\n".join([*lines, "", lines[0], "windows\r"]).encode())
    data = TextLines(path=str(file))
    splits = {split: set(data.load(split).texts) for split in data.splits}
    assert set().union(*splits.values()) == {*lines, "windows"}
    assert sum(len(texts) for texts in splits.values()) == 41
    with file.open("a") as out:
        out.write("\nanother line")
    more = TextLines(path=str(file), seed=0)
    assert data.assign_split(lines[3]) == more.assign_split(lines[3])


def test_a_file_that_is_not_utf8_is_told(tmp_path):
    (tmp_path / "lines.txt").write_bytes("stra\xdfe\n".encode("latin-1") * 9)
    with pytest.raises(DataError, match=r"is not UTF-8.*save it as UTF-8"):
        TextLines(path=str(tmp_path / "lines.txt")).load("train")
