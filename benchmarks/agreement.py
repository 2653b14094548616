"""Compare the captions of a run's bundles with those of the torch pipeline, one by one.

    python benchmarks/agreement.py runs/demo-2x-s0 --n 500

Bundles are compared in fp32 and as deployed. The torch side runs the libraries' own code: forwards
of the towers, `generate` with beam search, choice by cosine. The run is one of
`pipelines/clip_captioner.yaml`.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmcompress.data.open_dataset import open_dataset
from mmcompress.export.bundle import BundleContents, write_bundle
from mmcompress.export.weights import load_weights
from mmcompress.kinds.base import Batch
from mmcompress.models.base import Model
from mmcompress.models.sources import load_models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.surgery import resize_model_
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.text import pad_ids
from mmcompress.spec.schema import Spec
from mmcompress.storage import read_record
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Name a bundle and the captions that it should give."""

    name: str
    """What is printed."""
    bundle: Path
    """Folder of the bundle."""
    expected: list[str]
    """The captions of the torch pipeline, one for each image."""


def load_tokenizer(model: Model) -> Tokenizer:
    """Load the tokenizer that belongs to a model."""
    assert model.tokenizer_json is not None
    return Tokenizer.from_str(model.tokenizer_json)


def generate_captions(captioner: Model, tokens: Tensor) -> tuple[list[str], Tensor]:
    """Generate captions of one image by the library's own beam search.

    Args:
        captioner: the decoder node.
        tokens: [1, n, w], image tokens.

    Returns:
        The captions of all beams, and the score of each.
    """
    settings = captioner.config["generation"]
    outputs = captioner.lm.generate(  # type: ignore[operator, union-attr]
        input_ids=torch.full((1, 1), settings["bos"]),
        encoder_hidden_states=tokens,
        num_beams=settings["beams"],
        num_return_sequences=settings["beams"],
        max_length=settings["max_tokens"],
        early_stopping=settings["early_stopping"],
        do_sample=False,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokenizer = load_tokenizer(captioner)
    captions = [tokenizer.decode(row) for row in outputs.sequences.tolist()]
    return captions, outputs.sequences_scores


def embed_texts(encoder: Model, texts: list[str]) -> Tensor:
    """Embed texts with a text encoder [len(texts), d]."""
    config = encoder.config
    tokenizer = load_tokenizer(encoder)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    padded = pad_ids(ids, config["context_length"], pad=config["pad"], eos=config["eos"])
    return encoder(torch.from_numpy(padded))


@torch.inference_mode()
def caption_images(spec: Spec, models: dict[str, Model], *, batch: Batch) -> list[str]:
    """Caption every image of a batch with the models in torch, as the libraries run them."""
    prior = spec.nodes["choose"].get_option("prior", 0.0)
    captions: list[str] = []
    for pixels in batch.inputs["vision"]:
        embedding, tokens = models["vision"](pixels[None])
        candidates, scores = generate_captions(models["captioner"], tokens)
        similarities = embed_texts(models["text"], candidates) @ embedding[0]
        best = int((similarities + prior * scores).argmax())
        captions.append(candidates[best])
    return captions


def load_compressed_models(
    run: RunFolder, dense: dict[str, Model], *, kept_units: dict[str, dict[str, int]]
) -> dict[str, Model]:
    """Cut copies of the dense models and load the weights of a run."""
    compressed: dict[str, Model] = {}
    for name, model in dense.items():
        cut = resize_model_(copy.deepcopy(model), kept_units[name])
        compressed[name] = load_weights(cut, run.locate_node_weights(name)).eval()
    return compressed


def count_same_captions(comparison: Comparison, images: Sequence[np.ndarray]) -> int:
    """Count the images that a bundle captions as the torch pipeline does."""
    deployed = load_bundle(comparison.bundle)
    same = 0
    for image, expected in zip(images, comparison.expected, strict=True):
        same += deployed(image=image)["caption"] == expected
    return same


def parse_arguments() -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--n", type=int, default=500, help="images of the test split")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    run = RunFolder(path=arguments.run)
    spec = read_record(Spec, run.spec)
    summary = load_summary(arguments.run)
    dense = load_models(spec)
    pairs = open_dataset(spec.data).load("test", arguments.n)
    batch = TorchPipeline(spec, dense).collate(pairs)
    compressed = load_compressed_models(run, dense, kept_units=summary.kept_units)
    dense_captions = caption_images(spec, dense, batch=batch)
    compressed_captions = caption_images(spec, compressed, batch=batch)
    with tempfile.TemporaryDirectory() as scratch:
        fp32_bundle = Path(scratch) / "fp32"
        write_bundle(
            spec,
            BundleContents(models=compressed, kept_units=summary.kept_units),
            folder=fp32_bundle,
            prove=False,
        )
        comparisons = (
            Comparison(name="dense fp32", bundle=run.baseline, expected=dense_captions),
            Comparison(name="compressed fp32", bundle=fp32_bundle, expected=compressed_captions),
            Comparison(
                name="compressed as deployed", bundle=run.bundle, expected=compressed_captions
            ),
        )
        for comparison in comparisons:
            same = count_same_captions(comparison, pairs.inputs)
            share = same / arguments.n
            figures = f"{same} of {arguments.n} ({share:.1%})"
            print(f"{comparison.name}: same caption as torch on {figures}", flush=True)


if __name__ == "__main__":
    main()
