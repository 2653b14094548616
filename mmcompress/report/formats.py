"""Figures as a person reads them: in tables of pages and of the command line."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from mmcompress.stats import Quality

MAGNITUDES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
"""Factors with their letters, the largest first."""

NO_FIGURE = "–"
"""What stands where there is no figure."""


def format_percent(share: float | None) -> str:
    """Return a share in percent with one decimal; a dash for None."""
    return NO_FIGURE if share is None else f"{100 * share:.1f} %"


def format_retained(share: float | None) -> str:
    """Return what is retained of the quality in percent; a word for None."""
    return "undetermined" if share is None else format_percent(share)


def format_quality(quality: Quality) -> str:
    """Return a metric in percent with its 95 % interval: `92.9 % (91.1 – 94.4)`."""
    interval = f"({100 * quality.low:.1f} – {100 * quality.high:.1f})"
    return f"{format_percent(quality.value)} {interval}"


def format_count(count: float) -> str:
    """Return a count with three digits or so: 1234567 becomes `1.23 M`."""
    for factor, letter in MAGNITUDES:
        if count >= factor:
            return f"{count / factor:.2f} {letter}"
    return f"{count:.0f}"


def format_milliseconds(milliseconds: float) -> str:
    """Return milliseconds with two decimals."""
    return f"{milliseconds:.2f} ms"


def format_megabytes(megabytes: float) -> str:
    """Return a size on disk or in memory with one decimal."""
    return f"{megabytes:.1f} MB"


def format_speedup(speedup: float) -> str:
    """Return a speedup with two decimals: `2.03×`."""
    return f"{speedup:.2f}×"


def count_noun(count: int, noun: str) -> str:
    """Return a count with its noun: `1 thread`, `4 threads`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def keep_together(text: str) -> str:
    """Return a text that a browser breaks in one place only: before the interval of a figure."""
    unbroken = text.replace(" ", "\N{NO-BREAK SPACE}").replace("–", "–\N{WORD JOINER}")
    return unbroken.replace("\N{NO-BREAK SPACE}(", " (")


WORDS = re.compile(r"\s*(?:\w+|[^\w\s])")
"""A word or a sign of punctuation, with the space before it."""


def mark_words(text: str, other: str, element: str) -> Markup:
    """Mark the words that another text lacks.

    Args:
        text: The text that is shown.
        other: The text that it is compared with. Words and signs of punctuation count each.
        element: The HTML element around what differs: `ins` or `del`.

    Returns:
        HTML; the words themselves are escaped.
    """
    spaced_words = WORDS.findall(text)
    words = [word.strip() for word in spaced_words]
    matcher = SequenceMatcher(a=[w.strip() for w in WORDS.findall(other)], b=words, autojunk=False)
    pieces: list[Markup] = []
    for operation, _, _, start, end in matcher.get_opcodes():
        run_of_words = "".join(spaced_words[start:end])
        if not run_of_words:
            continue
        piece = escape(run_of_words.lstrip())
        if operation != "equal":
            piece = Markup(f"<{element}>{piece}</{element}>")
        is_spaced = run_of_words[0].isspace()
        pieces.append(Markup(" ") + piece if is_spaced else piece)
    return Markup("").join(pieces).lstrip()


def write_cell(text: str) -> str:
    """Return a text as it stands in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
