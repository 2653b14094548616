"""Data labelled by the dense pipeline: generators learn from, and are chosen by, what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mmcompress.data.base import Dataset, Pairs
from mmcompress.errors import DataError
from mmcompress.graph.inputs import make_request
from mmcompress.graph.ports import NodeKind, get_kind
from mmcompress.runtime.graph import Pipeline, load_bundle
from mmcompress.storage import write_record
from mmcompress.workspace.context import RunContext

LABELLED_SPLITS = ("train", "val")
"""Splits that are labelled. The test split keeps its references: they judge the result."""


class TeacherLabelledData:
    """A dataset whose training and validation pairs carry what the dense pipeline writes for them.

    A label is made when its pair is first asked for. It is kept in a file by the pair's name.
    """

    def __init__(self, data: Dataset, *, bundle: Path, record: Path):
        self.splits = data.splits
        self.modality = data.modality
        self._data = data
        self._bundle = bundle
        self._record = record
        # Loaded by this object alone and not by path: the bundle at a path may be written anew.
        self._pipeline: Pipeline | None = None

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """Load pairs as the dataset does, with the label of each in `generated_texts`."""
        pairs = self._data.load(split, count, seed=seed)
        if split not in LABELLED_SPLITS:
            return pairs
        texts_by_name = self._complete_labels(pairs)
        return replace(pairs, generated_texts=tuple(texts_by_name[name] for name in pairs.names))

    def _complete_labels(self, pairs: Pairs) -> dict[str, str]:
        """Return all labels on record, after those of the given pairs were added."""
        texts_by_name: dict[str, str] = {}
        if self._record.exists():
            texts_by_name = json.loads(self._record.read_text(encoding="utf-8"))
        missing = [i for i, name in enumerate(pairs.names) if name not in texts_by_name]
        if not missing:
            return texts_by_name
        pipeline = self._load_pipeline()
        generator, kind = self._find_generator(pipeline)
        for i in missing:
            request = make_request(pipeline.inputs, pairs.inputs[i], text=pairs.texts[i])
            outputs = pipeline.run(**request)
            texts_by_name[pairs.names[i]] = outputs[generator][kind.answer_port]
        write_record(self._record, texts_by_name)
        return texts_by_name

    def _find_generator(self, pipeline: Pipeline) -> tuple[str, NodeKind]:
        """Return the first node that writes text, and its kind."""
        for name, node in pipeline.manifest["graph"]["nodes"].items():
            kind = get_kind(node["kind"])
            if kind.writes_text:
                return name, kind
        raise DataError("data.labels: teacher needs a node that writes text")

    def _load_pipeline(self) -> Pipeline:
        """Return the dense pipeline, loaded on first use."""
        if self._pipeline is None:
            self._pipeline = load_bundle(self._bundle)
        return self._pipeline


def label_by_teacher(run: RunContext) -> RunContext:
    """Return the run with the data that `data.labels` asks for, after the dense export."""
    if run.spec.data.labels == "reference":
        return run
    data = TeacherLabelledData(
        run.data, bundle=run.shared.baseline, record=run.shared.teacher_texts
    )
    return replace(run, data=data)
