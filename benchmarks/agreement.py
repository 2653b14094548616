"""Do a run's bundles say what the torch pipeline says? Captions compared one by one, at fp32 and as deployed.

    python benchmarks/agreement.py runs/demo-2x-s0 --n 500

The torch side runs the libraries' own code: tower forwards, `generate` with beam search, cosine choice.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch

from mmcompress.data.open_dataset import open_dataset
from mmcompress.export.bundle import BundleContents, write_bundle
from mmcompress.export.weights import load_weights
from mmcompress.models.sources import load_models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.surgery import resize_
from mmcompress.report.page import load_summary
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.text import pad_ids
from mmcompress.spec.schema import Spec
from mmcompress.storage import read_record


@torch.inference_mode()
def torch_captions(pipeline: TorchPipeline, models: dict, batch) -> list[str]:
    """The pipeline's answer for every image of a batch, by the libraries' own code."""
    captioner, text = models["captioner"], models["text"]
    g, tok = captioner.config["generation"], pipeline.tokenizers["captioner"]
    found = []
    for pixels in batch.inputs["vision"]:
        embedding, tokens = models["vision"](pixels[None])
        out = captioner.lm.generate(
            input_ids=torch.full((1, 1), g["bos"]),
            encoder_hidden_states=tokens,
            num_beams=g["beams"],
            num_return_sequences=g["beams"],
            max_length=g["max_tokens"],
            early_stopping=g["early_stopping"],
            do_sample=False,
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        said = [tok.decode(row) for row in out.sequences.tolist()]
        encoded = [e.ids for e in pipeline.tokenizers["text"].encode_batch(said)]
        c = text.config
        keys = text(
            torch.from_numpy(pad_ids(encoded, c["context_length"], pad=c["pad"], eos=c["eos"]))
        )
        rank = keys @ embedding[0] + pipeline.spec.nodes["choose"].prior * out.sequences_scores
        found.append(said[int(rank.argmax())])
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", type=Path)
    p.add_argument("--n", type=int, default=500)
    a = p.parse_args()
    spec, summary = read_record(Spec, a.run / "spec.json"), load_summary(a.run)
    dense = load_models(spec)
    pipeline = TorchPipeline(spec, dense)
    pairs = open_dataset(spec.data).load("test", a.n)
    batch = pipeline.collate(pairs)
    small = {}
    for name, model in copy.deepcopy(dense).items():
        small[name] = load_weights(
            resize_(model, summary.kept_units[name]), a.run / "weights" / f"{name}.safetensors"
        ).eval()
    with tempfile.TemporaryDirectory() as scratch:
        write_bundle(
            spec,
            BundleContents(models=small, kept_units=summary.kept_units),
            folder=Path(scratch) / "fp32",
            prove=False,
        )
        sides = (("dense fp32", dense, a.run / "baseline"), ("compressed fp32", small, Path(scratch) / "fp32"),
                 ("compressed as deployed", small, a.run / "bundle"))  # fmt: skip
        said = {id(m): torch_captions(pipeline, m, batch) for m in (dense, small)}
        for name, models, bundle in sides:
            deployed = load_bundle(bundle)
            mine = [deployed(image=image)["caption"] for image in pairs.inputs]
            same = sum(x == y for x, y in zip(mine, said[id(models)], strict=True))
            print(
                f"{name}: same caption as torch on {same} of {a.n} ({same / a.n:.1%})", flush=True
            )


if __name__ == "__main__":
    main()
