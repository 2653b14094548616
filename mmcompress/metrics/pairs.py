"""Quality of a deployed pipeline over image-caption pairs, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmcompress.data.base import Pairs
from mmcompress.records import Quality
from mmcompress.registry import METRICS
from mmcompress.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Answers:
    """What a pipeline said: captions, image embeddings [n, d], embeddings of the reference captions [n, d]."""

    captions: tuple[str, ...]
    references: tuple[str, ...]
    images: np.ndarray
    texts: np.ndarray


def proportion(right: np.ndarray) -> Quality:
    """A share of n with Wilson's 95 % interval."""
    n, p, z = len(right), float(np.mean(right)), 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Quality(p, max(0.0, middle - half), min(1.0, middle + half), n)


def retrieval(answers: Answers) -> dict[str, Quality]:
    """R@1 both ways; a caption that occurs twice counts as right for each of its images."""
    sim = answers.images @ answers.texts.T
    refs = np.array(answers.references)
    return {
        "image_to_text_r1": proportion(refs[sim.argmax(1)] == refs),
        "text_to_image_r1": proportion(refs[sim.argmax(0)] == refs),
    }


def normal(text: str) -> str:
    return " ".join(text.lower().split())


def caption(answers: Answers) -> dict[str, Quality]:
    """Exact match of the caption the pipeline chose, case and spacing aside."""
    pairs = zip(answers.captions, answers.references, strict=True)
    return {"caption_exact_match": proportion(np.array([normal(a) == normal(b) for a, b in pairs]))}


def ask(pipeline: Pipeline, pairs: Pairs, progress: Callable[[float], None] = lambda share: None) -> Answers:
    """Every image through the whole pipeline, one request each; the references through its text encoder."""
    join, wires = next((n, w) for n, w in pipeline.wiring.items() if {"query", "keys"} <= set(w))
    query, keys = (wires[p].split(".")[0] for p in ("query", "keys"))
    captions, images = [], []
    for i, image in enumerate(pairs.images):
        values = pipeline.run(**{next(iter(pipeline.inputs)): image})
        captions.append(values[join]["best"])
        images.append(values[query]["embedding"][0])
        if i % 50 == 0:
            progress(i / len(pairs))
    texts = [pipeline.nodes[keys](list(pairs.captions[i : i + 100]))["embedding"] for i in range(0, len(pairs), 100)]
    return Answers(tuple(captions), pairs.captions, np.stack(images), np.concatenate(texts))


def judge(answers: Answers, metrics: Sequence[str]) -> dict[str, Quality]:
    """All metrics of a spec, by name of their figures."""
    found: dict[str, Quality] = {}
    for name in metrics:
        found |= METRICS.get(name)(answers)
    return found


def retained(baseline: dict[str, Quality], compressed: dict[str, Quality]) -> float:
    """The smallest ratio compressed / baseline over the metrics."""
    return min((compressed[k].value / b.value for k, b in baseline.items() if b.value > 0), default=0.0)
