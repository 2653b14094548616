"""`speech_folder`: recordings with their transcripts, laid out as LJSpeech is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from mmcompress.data.base import (
    LazySequence,
    Pairs,
    Row,
    RowsBySplit,
    draw_rows,
    identify_file,
    refuse_rows,
)
from mmcompress.data.text_files import split_lines
from mmcompress.errors import DataError
from mmcompress.runtime.audio import check_audio, open_audio
from mmcompress.runtime.similar_folder import suggest_folder
from mmcompress.storage import read_text_file

SOUND_FOLDER = "wavs"
"""The folder of the sound files, as LJSpeech names it."""

VALIDATION_SHARE = 0.3
"""Share of the clips that are not test clips on which structures are chosen (`val`)."""

EXPECTED_LINE = "expected name|transcript or name|transcript|normalized"
"""What an error says of a line that is neither."""

CLIP_LINE_EXAMPLE = "clip_0001|What is said in it."
"""A line of a list, for a person who has none."""

MIN_CLIPS = 8
"""The fewest clips of a folder: with less, one of its three splits could hold next to nothing."""


@dataclass(frozen=True, kw_only=True)
class SpeechFolder:
    """Sound files in `wavs/`, and a list of them with their transcripts.

    Every line of the list is `name|transcript`, or every line is `name|transcript|normalized
    transcript`. The last text of a line that is not empty is its reference. The list is UTF-8, and
    a line ends at \\n alone. A name without a suffix means a .wav file; any format and sample rate
    that libsndfile reads will do.

    Half of the clips are for the test, drawn by `split_seed`. Of the rest, 70 % are for calibration
    and distillation (`train`), and 30 % are for validation (`val`). Every sound file is checked
    when the folder is loaded, and one error lists all that can't be read.
    """

    path: str
    """The folder."""
    file: str = "metadata.csv"
    """The list, relative to the folder; the default is LJSpeech's name for it."""
    split_seed: int = 0
    """Which clips go to which split."""
    columns: Literal[2, 3] | None = None
    """Columns of the list. With 2, a `|` within a transcript belongs to it. With 3, a line may lack
    the last one. Without it: as many as every line has; lists whose lines differ are refused."""
    repeats: Literal["refuse", "first"] = "refuse"
    """What becomes of a clip in several lines. It could land in two splits, so it is refused;
    `first` reads its first line only."""
    count: int | None = None
    """How many clips of the list are read, from the first on. Without it, all of them are."""
    old_options: ClassVar[Mapping[str, str]] = {"seed": "split_seed"}
    """Options of version 0.1 and what they are called now."""
    splits: tuple[str, ...] = field(default=("train", "val", "test"), init=False)
    """Names of the splits."""
    modality: str = field(default="audio", init=False)
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
        rows = draw_rows(_read_clips(self)[split], count, seeds=[self.split_seed, seed])
        sound_folder = Path(self.path) / SOUND_FOLDER
        sounds = [sound for sound, _ in rows]
        texts = [text for _, text in rows]
        names = [os.path.relpath(sound, sound_folder) for sound in sounds]
        return Pairs(
            inputs=LazySequence(sounds, open_audio),
            texts=tuple(texts),
            names=tuple(names),
            files=tuple(sounds),
        )


@lru_cache(maxsize=4)
def _read_clips(folder: SpeechFolder) -> RowsBySplit:
    """Read the list and deal its clips to the splits, or raise `DataError` with all problems."""
    root = Path(folder.path)
    if not root.is_dir():
        raise DataError(f"data.options.path: '{root}': no such folder{suggest_folder(root)}")
    listing = root / folder.file
    if not listing.is_file():
        raise DataError(
            f"data.options.path: '{root}': no '{folder.file}' in it (data.options.file names "
            f"another list); it lists the clips of '{SOUND_FOLDER}/', a line each: "
            f"{CLIP_LINE_EXAMPLE}"
        )
    numbered_lines = [
        (number, line)
        for number, line in enumerate(split_lines(read_text_file(listing)), 1)
        if line.strip()
    ]
    columns = folder.columns or _count_columns(numbered_lines, listing=listing)
    rows: list[Row] = []
    line_by_sound: dict[Path, int] = {}
    problems: list[str] = []
    for line_number, line in numbered_lines:
        place = f"{listing}:{line_number}"
        name, text = _parse_line(line, columns=columns, place=place)
        file_name = name if Path(name).suffix else f"{name}.wav"
        sound = root / SOUND_FOLDER / file_name
        identity = identify_file(sound)
        if identity in line_by_sound:
            if folder.repeats == "refuse":
                problems.append(
                    f"{place}: {name} stands in line {line_by_sound[identity]} already"
                    " (repeats: first reads that one)"
                )
            continue
        line_by_sound[identity] = line_number
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
    return _deal_clips(rows, folder.split_seed)


def _count_columns(numbered_lines: list[tuple[int, str]], *, listing: Path) -> int:
    """Return how many columns every line of the list has, or raise `DataError`.

    Where lines differ, a `|` stands within a transcript, or a normalized transcript is missing:
    the list does not say which.
    """
    line_by_count: dict[int, int] = {}
    for line_number, line in numbered_lines:
        line_by_count.setdefault(line.count("|") + 1, line_number)
    counts = sorted(line_by_count)
    if len(counts) == 1 and counts[0] > 1:
        # a line with more is refused when it is read
        return min(counts[0], 3)
    if not counts or counts[0] < 2:
        line_number = line_by_count.get(1, 1)
        raise DataError(f"{listing}:{line_number}: {EXPECTED_LINE}")
    shown_counts = [f"{count} in line {line_by_count[count]}" for count in counts]
    raise DataError(
        f"{listing}:{line_by_count[counts[-1]]}: the lines differ in their columns "
        f"({', '.join(shown_counts)}); where a '|' belongs to a transcript, say "
        "data.options.columns: 2; where a normalized transcript is missing, say 3"
    )


def _parse_line(line: str, *, columns: int, place: str) -> tuple[str, str]:
    """Return the name of a clip and its reference text, or raise `DataError`."""
    parts = line.split("|", 1) if columns == 2 else line.split("|")
    name, *transcripts = [part.strip() for part in parts]
    if len(parts) > columns:
        raise DataError(
            f"{place}: {len(parts)} fields, expected {columns}: with {columns}, a transcript "
            "can't hold '|'; write another sign in its place"
        )
    # the normalized transcript comes last, and it is the one to use if there is any
    filled_transcripts = [transcript for transcript in transcripts if transcript]
    if not name or not filled_transcripts:
        raise DataError(f"{place}: {EXPECTED_LINE}")
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
    dealt_rows: RowsBySplit = {}
    for split, indices in indices_by_split.items():
        dealt_rows[split] = [rows[i] for i in sorted(indices)]
    return dealt_rows
