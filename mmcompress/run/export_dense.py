"""Export a pipeline as it is, with all proofs: no target, no metric, no training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mmcompress.data.base import Dataset
from mmcompress.data.open_dataset import open_dataset, read_all_lookup_texts
from mmcompress.errors import DataError, SpecError
from mmcompress.export.bundle import BundleContents, record_proofs, write_bundle
from mmcompress.export.fidelity import prove_fidelity
from mmcompress.export.proofs import require_proofs
from mmcompress.graph.inputs import make_request
from mmcompress.graph.load_spec import load_spec
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import find_unjoined_encoders
from mmcompress.metrics.answers import answer_pairs
from mmcompress.models.sources import load_models, pin_sources
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.results.records import MAX_UNINFORMATIVE_SHARE, Proof
from mmcompress.run.count_answers import count_answers
from mmcompress.run.evaluate import BUNDLE_REQUESTS
from mmcompress.run.profile import prove_generators
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.machine import describe_cpu
from mmcompress.runtime.progress import ProgressListener, ignore_progress
from mmcompress.runtime.sample_requests import write_requests
from mmcompress.spec.name_lines import name_spec_lines
from mmcompress.spec.schema import Spec

DRAWN_DATA = "drawn"
"""The kind of data of a spec that names none."""

MIN_COMPARED_ANSWERS = 4
"""Answers from which it says something that all are alike."""


def export_dense(
    spec_path: str | Path,
    bundle: str | Path,
    *,
    overrides: dict[str, Any] | None = None,
    on_progress: ProgressListener = ignore_progress,
) -> list[Proof]:
    """Write the dense pipeline of a spec as a bundle.

    Args:
        spec_path: The spec file. Its target and metrics are not looked at. Without `data`, inputs
            are drawn.
        bundle: The folder of the bundle; it must be new or empty.
        overrides: Values by dotted key that replace those of the spec.
        on_progress: Receives messages for a person.

    Returns:
        The proofs, which are in the bundle's manifest too.

    Raises:
        SpecError: The spec is wrong.
        ModelError: A model can't be loaded.
        DataError: The folder is not empty, or the data do not fit.
        ProofFailed: The bundle does not answer as the models do.
    """
    folder = Path(bundle)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: not empty; choose another --out")
    spec, _ = pin_sources(load_spec(spec_path, overrides, for_export=True), {})
    on_progress("export", f"{spec.name}: {len(spec.list_model_nodes())} models", None)
    _require_texts_of_lookups(spec)
    with name_spec_lines(spec_path, overrides):
        data = open_dataset(spec.data)
        models = load_models(spec)
    on_progress("export", "writing and proving the graphs", 0.2)
    contents = BundleContents(models=models, lookup_texts=read_all_lookup_texts(spec, data))
    proofs = write_bundle(spec, contents, folder=folder)
    on_progress("export", "comparing what generators write", 0.8)
    pipeline = TorchPipeline(spec, models)
    proofs += prove_generators(pipeline, models, data=data, bundle=folder)
    on_progress("export", "comparing with the models' own libraries", 0.9)
    proofs += prove_fidelity(
        spec, bundle=folder, data=data, on_progress=partial(on_progress, "export")
    )
    record_proofs(folder, proofs)
    require_proofs(proofs)
    _look_at_answers(spec, data=data, bundle=folder, on_progress=on_progress)
    return proofs


def _look_at_answers(
    spec: Spec, *, data: Dataset, bundle: Path, on_progress: ProgressListener
) -> None:
    """Put some requests with their answers into a bundle, and tell where all answers are alike.

    `verify` sends the requests again on the machine that serves. Drawn inputs tell nothing of what
    a model answers to real ones.
    """
    pairs = data.load("val", BUNDLE_REQUESTS)
    pipeline = load_bundle(bundle)
    if spec.report.samples != "none":
        requests = [
            make_request(spec.inputs, value, text=text)
            for value, text in zip(pairs.inputs, pairs.texts, strict=True)
        ]
        write_requests(pipeline, requests, machine=describe_cpu()["name"])
    if spec.data.kind == DRAWN_DATA or len(pairs) < MIN_COMPARED_ANSWERS:
        return
    answers_by_node = answer_pairs(pipeline, pairs, unjoined_encoders=find_unjoined_encoders(spec))
    texts: dict[str, tuple[str, ...]] = {}
    vectors: dict[str, list[list[float]]] = {}
    for node, answers in answers_by_node.items():
        if answers.texts:
            texts[node] = answers.texts
        if answers.vectors is not None:
            vectors[node] = answers.vectors.tolist()
    for node, counts in count_answers(spec, texts, vectors_by_node=vectors).items():
        if counts.uninformative_share >= MAX_UNINFORMATIVE_SHARE:
            on_progress(
                "export",
                f"{node}: {counts.describe()}: look at the model, its processor and the data",
                None,
            )


def _require_texts_of_lookups(spec: Spec) -> None:
    """Raise `SpecError` where a lookup would search texts that were only drawn."""
    if spec.data.kind != DRAWN_DATA:
        return
    for name, node in spec.nodes.items():
        list_option = get_kind(node.kind).list_option
        if list_option and not node.get_option(list_option, ""):
            raise SpecError(
                f"nodes.{name}.{list_option}: name a file of texts, or `data` in the spec: there "
                "is nothing else that this node could search"
            )
