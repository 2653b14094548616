"""Compare the deployed dense recognizer with the library's own: tokens and word error rate.

    LJSPEECH_DIR=... python benchmarks/transcripts.py runs/speech_search-1.5x-s0

The library's side is all its own: feature extractor, encoder, greedy `generate` of
`WhisperForConditionalGeneration`. For each clip where the two differ, it prints the token at which
they part. It prints by how little the library preferred its own token there, too. It also prints
whether the clip had begun to repeat itself by then: there the guard, which is off here, would have
ended it.

Exit code 1 if they part anywhere else.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from mmcompress.data.open_dataset import open_dataset
from mmcompress.kinds.text_decoder.deployed import TextDecoder
from mmcompress.metrics.answers import Answers
from mmcompress.metrics.wer import score_word_errors
from mmcompress.models.sources import locate_source
from mmcompress.runtime.beam_search import count_repeated_tail
from mmcompress.runtime.graph import Pipeline, load_bundle
from mmcompress.spec.schema import Spec
from mmcompress.stats import estimate_quality
from mmcompress.storage import read_record
from mmcompress.workspace.folder import RunFolder

SAMPLE_RATE = 16000
"""Samples of sound per second."""


@dataclass(frozen=True, kw_only=True)
class Transcripts:
    """Hold what both sides wrote of one clip."""

    deployed_ids: list[int]
    """Words of the deployed recognizer, without special tokens."""
    library_ids: list[int]
    """Words of the library, without special tokens."""
    library_sequence: list[int]
    """Everything that the library wrote, its prompt included."""
    features: Tensor
    """[1, m, f], log-mel features of the library's own extractor."""


class Recognizers:
    """Hold both recognizers: the dense bundle of a run, and the library's model.

    Args:
        run: a finished run of `pipelines/speech_search.yaml`.
        spec: its spec.
    """

    def __init__(self, run: RunFolder, spec: Spec):
        decoder_names = [name for name, node in spec.nodes.items() if node.kind == "text_decoder"]
        decoder_name = decoder_names[0]
        node = spec.nodes[decoder_name]
        self.encoder_name = node.inputs["context"].split(".")[0]
        location = locate_source(node.source)
        source = location.folder or location.name
        self.library = WhisperForConditionalGeneration.from_pretrained(source).eval()
        mel_count = self.library.config.num_mel_bins
        self.extract_features = WhisperFeatureExtractor(feature_size=mel_count)
        self.bundle: Pipeline = load_bundle(run.baseline)
        decoder = self.bundle.nodes[decoder_name]
        assert isinstance(decoder, TextDecoder)
        self.decoder = decoder
        # The library has no guard against repetition.
        self.decoder.generation = replace(self.decoder.generation, guard=False)
        self.tokenizer: Tokenizer = self.decoder.tokenizer
        # In a bundle the prompt counts as a part of the text, in the library it does not.
        self.max_new_tokens = node.get_option("max_tokens", 0) - len(self.decoder.generation.prompt)

    def transcribe(self, sound: np.ndarray) -> Transcripts:
        """Transcribe a clip by both.

        Args:
            sound: [samples], 16 kHz.
        """
        features = self.extract_features(
            sound, sampling_rate=SAMPLE_RATE, return_tensors="pt"
        ).input_features
        with torch.inference_mode():
            sequences = self.library.generate(
                features, max_new_tokens=self.max_new_tokens, num_beams=1, do_sample=False
            )
        library_sequence = sequences[0].tolist()
        context = self.bundle.nodes[self.encoder_name](sound)["tokens"]
        _, deployed_sequence = self.decoder.generate(context)[0]
        return Transcripts(
            deployed_ids=self._keep_words(deployed_sequence),
            library_ids=self._keep_words(library_sequence),
            library_sequence=library_sequence,
            features=features,
        )

    def _keep_words(self, ids: list[int]) -> list[int]:
        """Keep the ids of words: all special tokens of Whisper come after them."""
        end = int(self.decoder.generation.eos)
        return [token for token in ids if token < end]

    def measure_lead(self, transcripts: Transcripts, index: int) -> float:
        """Measure how much the library preferred its token at an index to its second choice.

        Args:
            transcripts: of one clip.
            index: into the library's words.

        Returns:
            The difference of log-probabilities.
        """
        sequence = transcripts.library_sequence
        first_word = sequence.index(transcripts.library_ids[0])
        ids_before = torch.tensor([sequence[: first_word + index]])
        with torch.inference_mode():
            outputs = self.library(transcripts.features, decoder_input_ids=ids_before)
        scores = outputs.logits[0, -1].log_softmax(0)
        first, second = scores.topk(2).values.tolist()
        return first - second


def find_first_difference(first_ids: list[int], second_ids: list[int]) -> int:
    """Find the first index at which two sequences differ."""
    for i, (first, second) in enumerate(zip(first_ids, second_ids, strict=False)):
        if first != second:
            return i
    return min(len(first_ids), len(second_ids))


def count_tokens_before_guard(ids: list[int]) -> int:
    """Count the tokens after which the guard would end a text; more than it has if it would not."""
    for i in range(len(ids)):
        if count_repeated_tail(ids[:i]):
            return i
    return len(ids) + 1


def print_word_error_rate(side: str, texts: list[str], *, references: list[str]) -> None:
    """Print the word error rate of one side with its interval."""
    answers = Answers(texts=tuple(texts), references=tuple(references))
    quality = estimate_quality(score_word_errors(answers)["wer"])
    print(
        f"{side}: WER {quality.value:.2%} ({quality.low:.2%} - {quality.high:.2%}) "
        f"on {quality.n} test clips"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run of pipelines/speech_search.yaml")
    return parser.parse_args()


def main() -> int:
    run = RunFolder(path=parse_arguments().run)
    spec = read_record(Spec, run.spec)
    recognizers = Recognizers(run, spec)
    data = open_dataset(spec.data)
    deployed_texts: list[str] = []
    library_texts: list[str] = []
    references: list[str] = []
    total = 0
    same = 0
    wrong = 0
    for split in data.splits:
        pairs = data.load(split)
        for name, sound, reference in zip(pairs.names, pairs.inputs, pairs.texts, strict=True):
            transcripts = recognizers.transcribe(sound)
            deployed_ids = transcripts.deployed_ids
            library_ids = transcripts.library_ids
            total += 1
            if deployed_ids == library_ids:
                same += 1
            else:
                index = find_first_difference(deployed_ids, library_ids)
                guard_index = count_tokens_before_guard(library_ids)
                if index < guard_index:
                    wrong += 1
                lead = recognizers.measure_lead(transcripts, index)
                print(
                    f"{split} {name}: {len(deployed_ids)} and {len(library_ids)} tokens, apart at "
                    f"{index + 1}; the library's first choice leads by {lead:.1e}; the guard would "
                    f"have ended it after {guard_index}"
                )
            if split == "test":
                references.append(reference)
                deployed_texts.append(recognizers.tokenizer.decode(deployed_ids))
                library_texts.append(recognizers.tokenizer.decode(library_ids))
    print(f"{same} of {total} clips: the library's tokens exactly")
    print_word_error_rate("deployed", deployed_texts, references=references)
    print_word_error_rate("library", library_texts, references=references)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
