"""`speech_folder`: recordings with their transcripts, laid out as LJSpeech is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from mmcompress.data.base import (
    LazySequence,
    Pairs,
    Row,
    RowsBySplit,
    draw_rows,
    read_text_file,
    refuse_rows,
    split_lines,
)
from mmcompress.errors import DataError
from mmcompress.runtime.audio import check_audio, open_audio

SOUND_FOLDER = "wavs"
"""The folder of the sound files, as LJSpeech names it."""

VALIDATION_SHARE = 0.3
"""Share of the clips that are not test clips on which structures are chosen (`val`)."""

MAX_TRANSCRIPTS = 2
"""Transcripts of a line: as it was spoken, and with numbers and short forms written out."""

MIN_CLIPS = 8
"""The fewest clips of a folder: with less, one of its three splits could hold next to nothing."""


@dataclass(frozen=True, kw_only=True)
class SpeechFolder:
    """Sound files in `wavs/`, and a list of them with their transcripts.

    Every line of the list is `name|transcript` or `name|transcript|normalized transcript`. The last
    text of a line that is not empty is its reference. A name without a suffix means a .wav file;
    any format and sample rate that libsndfile reads will do.

    Half of the clips are for the test, drawn by `seed`. Of the rest, 70 % are for calibration and
    distillation (`train`), and 30 % are for validation (`val`). Every sound file is checked when
    the folder is loaded, and one error lists all that can't be read.
    """

    path: str
    """The folder."""
    file: str = "metadata.csv"
    """The list, relative to the folder; the default is LJSpeech's name for it."""
    seed: int = 0
    """Which clips go to which split."""
    count: int | None = None
    """How many lines of the list are read, from the first on; None reads all of them."""
    splits: tuple[str, ...] = field(default=("train", "val", "test"), init=False)
    """Names of the splits."""
    modality: Literal["audio"] = field(default="audio", init=False)
    """What the inputs are."""

    def count_pairs(self) -> dict[str, int]:
        """Count the clips in each split."""
        return {split: len(rows) for split, rows in _read_clips(self).items()}

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """Load clips of a split; a sound is read when its item is asked for.

        Args:
            split: `train`, `val` or `test`.
            count: The most clips, drawn by `seed`; None loads all of them in the list's order.
            seed: Which clips are drawn.

        Raises:
            DataError: There is no such split, or the folder can't be read.
        """
        if split not in self.splits:
            raise DataError(f"speech_folder: no split '{split}' (known: {', '.join(self.splits)})")
        rows = draw_rows(_read_clips(self)[split], count, seeds=[self.seed, seed])
        sound_folder = Path(self.path) / SOUND_FOLDER
        return Pairs(
            inputs=LazySequence([sound for sound, _ in rows], open_audio),
            texts=tuple(text for _, text in rows),
            names=tuple(os.path.relpath(sound, sound_folder) for sound, _ in rows),
        )


@lru_cache(maxsize=4)
def _read_clips(folder: SpeechFolder) -> RowsBySplit:
    """Read the list and deal its clips to the splits, or raise `DataError` with all problems."""
    root = Path(folder.path)
    if not root.is_dir():
        raise DataError(f"data folder '{root}': no such folder")
    listing = root / folder.file
    rows: list[Row] = []
    line_by_sound: dict[Path, int] = {}
    problems: list[str] = []
    for line_number, line in enumerate(split_lines(read_text_file(listing)), 1):
        if not line.strip():
            continue
        place = f"{listing}:{line_number}"
        name, text = _parse_line(line, place=place)
        file_name = name if Path(name).suffix else f"{name}.wav"
        sound = root / SOUND_FOLDER / file_name
        if sound in line_by_sound:
            # Dealt twice, a clip would be learned and tested.
            problems.append(f"{place}: {name} stands in line {line_by_sound[sound]} already")
            continue
        line_by_sound[sound] = line_number
        try:
            check_audio(sound)
        except DataError as error:
            problems.append(f"{place}: {error}")
        rows.append((sound, text))
        if len(rows) == folder.count:
            break
    refuse_rows(problems, "sound files")
    if len(rows) < MIN_CLIPS:
        raise DataError(
            f"{listing}: {len(rows)} clips; at least {MIN_CLIPS} are needed for three splits"
        )
    return _deal_clips(rows, folder.seed)


def _parse_line(line: str, *, place: str) -> tuple[str, str]:
    """Return the name of a clip and its reference text, or raise `DataError`."""
    name, *transcripts = [part.strip() for part in line.split("|")]
    if len(transcripts) > MAX_TRANSCRIPTS:
        raise DataError(
            f"{place}: {len(transcripts) + 1} fields, expected name|transcript or "
            "name|transcript|normalized: a transcript can't hold '|'"
        )
    # the normalized transcript comes last, and it is the one to use if there is any
    filled_transcripts = [transcript for transcript in transcripts if transcript]
    if not name or not filled_transcripts:
        raise DataError(f"{place}: expected name|transcript or name|transcript|normalized")
    return name, filled_transcripts[-1]


def _deal_clips(rows: list[Row], seed: int) -> RowsBySplit:
    """Deal clips to the splits at random; within a split they keep the order of the list."""
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    test_start = len(rows) // 2
    validation_count = max(1, round(VALIDATION_SHARE * test_start))
    indices_by_split = {
        "val": order[:validation_count],
        "train": order[validation_count:test_start],
        "test": order[test_start:],
    }
    dealt: RowsBySplit = {}
    for split, indices in indices_by_split.items():
        dealt[split] = [rows[i] for i in sorted(indices)]
    return dealt
