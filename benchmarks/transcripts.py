"""The deployed dense recognizer against the library's own: the same tokens for every clip, the same word error rate.

    LJSPEECH_DIR=... python benchmarks/transcripts.py runs/speech_search-1.5x-s0

The library's side is all its own: feature extractor, encoder, greedy `generate` of `WhisperForConditionalGeneration`.
Where the two part, it says at which token, by how little the library preferred its own there, and whether the clip had
by then begun to repeat itself (where the guard, off here, would have ended it). Exit 1 if they part anywhere else.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from mmcompress.data.open_dataset import open_dataset
from mmcompress.metrics.answers import Answers
from mmcompress.metrics.wer import score_word_errors
from mmcompress.models.sources import locate_source
from mmcompress.runtime.beam_search import count_repeated_tail
from mmcompress.runtime.graph import load_bundle
from mmcompress.spec.schema import Spec
from mmcompress.stats import estimate_quality
from mmcompress.storage import read_record


def parting(mine: list[int], theirs: list[int]) -> int:
    """The first place at which they differ."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))


def guarded(ids: list[int]) -> int:
    """The tokens after which the guard would have ended it."""
    return next((i for i in range(len(ids)) if count_repeated_tail(ids[:i])), len(ids) + 1)


def main() -> int:
    from tokenizers import Tokenizer
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", type=Path, help="a finished run of pipelines/speech_search.yaml")
    a = p.parse_args()
    spec = read_record(Spec, a.run / "spec.json")
    generator, node = next((n, x) for n, x in spec.nodes.items() if x.kind == "text_decoder")
    encoder = node.inputs["context"].split(".")[0]
    location = locate_source(node.source)
    folder_or_name = location.folder or location.name
    library = WhisperForConditionalGeneration.from_pretrained(folder_or_name).eval()
    features = WhisperFeatureExtractor(feature_size=library.config.num_mel_bins)
    bundle = load_bundle(a.run / "baseline")
    writer = bundle.nodes[generator]
    tokenizer: Tokenizer = writer.tokenizer
    writer.generation = replace(writer.generation, guard=False)  # the library has none
    end = int(writer.generation.eos)
    most = node.max_tokens - len(
        writer.generation.prompt
    )  # here the prompt counts; to the library's `max_length` not
    words = lambda ids: [i for i in ids if i < end]
    data, same, texts, said, total, wrong = open_dataset(spec.data), 0, ([], []), [], 0, 0
    for split in data.splits:
        pairs = data.load(split)
        for name, sound, text in zip(pairs.names, pairs.inputs, pairs.texts, strict=True):
            x = features(sound, sampling_rate=16000, return_tensors="pt").input_features
            with torch.inference_mode():
                whole = library.generate(x, max_new_tokens=most, num_beams=1, do_sample=False)[
                    0
                ].tolist()
            theirs, context = words(whole), bundle.nodes[encoder](sound)["tokens"]
            mine = words(writer.generate(context)[0][1])
            total, same = total + 1, same + (mine == theirs)
            if mine != theirs:
                at, loop = parting(mine, theirs), guarded(theirs)
                before = whole[: whole.index(theirs[0]) + at]
                with torch.inference_mode():
                    logits = library(x, decoder_input_ids=torch.tensor([before])).logits[0, -1]
                first, second = logits.log_softmax(0).topk(2).values.tolist()
                wrong += at < loop
                print(
                    f"{split} {name}: {len(mine)} and {len(theirs)} tokens, apart at {at + 1}; the library's first "
                    f"choice leads by {first - second:.1e}; the guard would have ended it after {loop}"
                )
            if split == "test":
                said.append(text)
                for kept, ids in zip(texts, (mine, theirs), strict=True):
                    kept.append(tokenizer.decode(ids))
    print(f"{same} of {total} clips: the library's tokens exactly")
    for who, kept in zip(("deployed", "library"), texts, strict=True):
        q = estimate_quality(
            score_word_errors(Answers(texts=tuple(kept), references=tuple(said)))["wer"]
        )
        print(f"{who}: WER {q.value:.2%} ({q.low:.2%} - {q.high:.2%}) on {q.n} test clips")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
