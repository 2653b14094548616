"""`speech_folder`: recordings with their transcripts, laid out as LJSpeech is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from mmcompress.data.base import LazySequence, Pairs, draw_rows, refuse_rows
from mmcompress.errors import DataError
from mmcompress.runtime.audio import check_audio, open_audio

Rows = dict[str, list[tuple[Path, str]]]


CHOOSING = 0.3
"""Share of the clips that are not test clips on which structures are chosen."""


@dataclass(frozen=True, kw_only=True)
class SpeechFolder:
    """Sound files in `wavs/` and `metadata.csv`: `name|transcript` or `name|transcript|normalized`, one clip a line.

    Any format and sample rate that libsndfile reads; a name without a suffix means a .wav file. Half of the clips are
    for the test, by lot from `seed`; 70 % of the rest for calibration and distillation (`train`), 30 % to choose by
    (`val`). The transcript is the normalized one where there is one. `count` takes the first clips only.
    """

    path: str
    file: str = "metadata.csv"
    seed: int = 0
    count: int | None = None
    splits: tuple[str, ...] = field(default=("train", "val", "test"), init=False)
    modality: Literal["audio"] = field(default="audio", init=False)

    def count_pairs(self) -> dict[str, int]:
        """Clips in each split."""
        return {s: len(rows) for s, rows in _rows(self).items()}

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """Up to `count` clips of a split, drawn by seed; all of them in file order without a count."""
        if split not in self.splits:
            raise DataError(f"speech_folder: no split '{split}' (known: {', '.join(self.splits)})")
        rows = draw_rows(_rows(self)[split], count, seeds=[self.seed, seed])
        names = tuple(os.path.relpath(p, Path(self.path) / "wavs") for p, _ in rows)
        return Pairs(
            inputs=LazySequence([p for p, _ in rows], open_audio),
            texts=tuple(t for _, t in rows),
            names=names,
        )


@lru_cache(maxsize=4)
def _rows(folder: SpeechFolder) -> Rows:
    """(sound file, transcript) by split. Raises `DataError` listing what is missing or broken."""
    root = Path(folder.path)
    if not root.is_dir():
        raise DataError(f"data folder '{root}': no such folder")
    listing = root / folder.file
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{listing}: can't be read: {getattr(e, 'strerror', None) or e}") from e
    rows: list[tuple[Path, str]] = []
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *texts = (part.strip() for part in line.split("|"))
        text = next((t for t in reversed(texts[:2]) if t), "")
        if not name or not text:
            raise DataError(
                f"{listing}:{number}: expected name|transcript or name|transcript|normalized"
            )
        sound = root / "wavs" / (name if Path(name).suffix else f"{name}.wav")
        try:
            check_audio(sound)
        except DataError as e:
            problems.append(f"{listing}:{number}: {e}")
        rows.append((sound, text))
        if len(rows) == folder.count:
            break
    refuse_rows(problems, "sound files")
    if len(rows) < 8:
        raise DataError(f"{listing}: {len(rows)} clips; at least 8 are needed for three splits")
    order = np.random.default_rng([folder.seed, len(rows)]).permutation(len(rows))
    rest = len(rows) // 2
    choosing = max(1, round(CHOOSING * rest))
    parts = {"val": order[:choosing], "train": order[choosing:rest], "test": order[rest:]}
    return {split: [rows[i] for i in sorted(part)] for split, part in parts.items()}
