"""A run folder with everything loaded: what the stages work on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmcompress.errors import DataError
from mmcompress.records import Block, plain, read, write
from mmcompress.spec.loader import given, load, load_space, parse_target
from mmcompress.spec.schema import Space, Spec

Say = Callable[[str, str, float | None], None]
"""(stage, what, share done or None): progress for a person."""
SILENT: Say = lambda stage, what, share: None
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Run:
    """A run folder with everything loaded. Heavy parts are made by `open_run`."""

    spec: Spec
    space: Space
    folder: Path
    say: Say
    models: dict[str, Any]
    pipeline: Any
    data: Any
    cross: dict[str, dict[str, str]]
    timings: dict[str, float]

    @property
    def blocks(self) -> dict[str, tuple[Block, ...]]:
        return {n: m.blocks for n, m in self.models.items()}

    def timed(self, stage: str) -> Any:
        return _Clock(self, stage)


class _Clock:
    def __init__(self, run: Run, stage: str):
        self.run, self.stage = run, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        spent = time.perf_counter() - self.start
        self.run.timings[self.stage] = self.run.timings.get(self.stage, 0.0) + spent
        write(self.run.folder / "timings.json", self.run.timings)


def default_space() -> Path:
    return ROOT / "search_spaces" / "joint.yaml"


def open_run(
    spec_path: str | Path,
    out: str | Path,
    space_path: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    say: Say = SILENT,
) -> Run:
    """Load and check everything a run needs. Without `resume` the folder must be new or empty.

    Raises `SpecError`, `DataError` or `ModelError`; nothing is written before all of it is checked.
    """
    spec = load(spec_path, overrides)
    space = load_space(space_path or default_space(), spec, given(spec_path, overrides))
    folder = Path(out)
    say("load", f"{spec.name}: {len(spec.models())} models", None)
    from mmcompress.data import open_dataset
    from mmcompress.graph.modality import cross_modal
    from mmcompress.graph.pipeline import TorchPipeline
    from mmcompress.models.sources import load_models

    data = open_dataset(spec.data)
    for split in ("train", "val", "test", *spec.data.report):
        if split not in data.splits:
            raise DataError(f"data.report: '{spec.data.kind}' has no split '{split}' (known: {', '.join(data.splits)})")
        data.load(split, 1)
    models = load_models(spec)
    cross = cross_modal(spec, {n: m.blocks for n, m in models.items()})
    _claim(folder, spec, space, resume)
    timings = json.loads((folder / "timings.json").read_text()) if (folder / "timings.json").exists() else {}
    return Run(spec, space, folder, say, models, TorchPipeline(spec, models), data, cross, timings)


def _claim(folder: Path, spec: Spec, space: Space, resume: bool) -> None:
    record = folder / "spec.json"
    if record.exists() and resume:
        if _decisive(read(Spec, record)) != _decisive(spec):
            raise DataError(f"{folder}: --resume, but the spec (or an override) has changed since; use a new --out")
        if read(Space, folder / "space.json") != space:
            raise DataError(f"{folder}: --resume, but the search space has changed since; use a new --out")
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty; add --resume to go on with the run in it, or choose another --out")
    write(folder / "space.json", space)
    write(record, spec)


def _decisive(spec: Spec) -> Any:
    """The part of a spec that must not change between a run and its resumption: not where or how long it searches."""
    return plain(
        replace(spec, search=replace(spec.search, workers=1, trials=0, mutations=0, ray_address=None, executor="ray"))
    )


def budget(spec: Spec, dense_ms: float) -> float:
    kind, value = parse_target(spec.target)
    return dense_ms / value if kind == "speedup" else value
