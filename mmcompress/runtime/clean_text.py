"""Cleaning of texts ahead of a tokenizer, as open_clip and SigLIP do it, in plain Python.

open_clip calls ftfy, which no device needs to have. Its steps stand here one by one, in its order.
One is left out: ftfy guesses how a text with wrong characters was once encoded, and decodes it
again. A text that was read as UTF-8 does not need it.
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Callable

ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
"""A character that is written by its name or number in HTML, such as `&amp;`."""

C1_CONTROLS = re.compile("[\x80-\x9f]")
"""Control characters that stand in the places of punctuation of Windows-1252."""

SINGLE_QUOTES = re.compile("[\u02bc\u2018-\u201b]")
"""Curly and reversed single quotation marks."""

DOUBLE_QUOTES = re.compile("[\u201c-\u201f]")
"""Curly and reversed double quotation marks."""

LINE_BREAKS = re.compile("\r\n|[\r\u2028\u2029\x85]")
"""Line breaks other than a line feed."""

TERMINAL_ESCAPE = re.compile("\033\\[((?:\\d|;)*)([a-zA-Z])")
"""An escape sequence that colours the text of a terminal."""

SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
"""Two halves of one character, as UTF-16 has them."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""A half of a character without the other one."""

LIGATURES = "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬅﬆ"
"""Characters that stand for two or three letters."""

SPELLED_LIGATURES = "IJ ij ʼn DZ Dz dz DŽ Dž dž LJ Lj lj NJ Nj nj ff fi fl ffi ffl ſt st"
"""The letters of each of `LIGATURES`, in the same order, with a space between."""

LIGATURE_TABLE = dict(zip(map(ord, LIGATURES), SPELLED_LIGATURES.split(), strict=True))
"""Letters by the code of a ligature, for `str.translate`."""

UNSEEN_CODES = (
    *range(0x00, 0x09),
    0x0B,
    *range(0x0E, 0x20),
    0x7F,
    *range(0x206A, 0x2070),
    0xFEFF,
    *range(0xFFF9, 0xFFFD),
)
"""Codes of control characters that show nothing."""

UNSEEN_TABLE = dict.fromkeys(UNSEEN_CODES)
"""Nothing by the code of a control character, for `str.translate`."""

PUNCTUATION_TABLE = str.maketrans("", "", string.punctuation)
"""Nothing by the code of a punctuation mark of ASCII, for `str.translate`."""

IDEOGRAPHIC_SPACE = 0x3000
"""Code of the space that is as wide as a Chinese character."""

WIDE_CODES = range(0xFF01, 0xFFF0)
"""Codes of characters that differ from others in width only."""


def _make_width_table() -> dict[int, str]:
    """Return the characters of usual width by the codes of those of another width."""
    table = {IDEOGRAPHIC_SPACE: " "}
    for code in WIDE_CODES:
        usual_character = unicodedata.normalize("NFKC", chr(code))
        if usual_character != chr(code):
            table[code] = usual_character
    return table


WIDTH_TABLE = _make_width_table()
"""Characters of usual width by code, for `str.translate`."""


def _decode_c1_control(match: re.Match[str]) -> str:
    """Return what Windows-1252 has in the place of a control character."""
    character = match.group(0)
    try:
        return character.encode("latin-1").decode("windows-1252")
    except UnicodeDecodeError:
        return character


def _join_surrogates(match: re.Match[str]) -> str:
    """Return the one character that two halves stand for."""
    return match.group(0).encode("utf-16", "surrogatepass").decode("utf-16")


def _decode_entity(match: re.Match[str]) -> str:
    """Return the character of an entity of HTML; the entity itself where there is none."""
    character = html.unescape(match.group(0))
    return match.group(0) if ";" in character else character


def _repair_line(line: str, *, has_entities: bool) -> str:
    """Repair the characters of one line, once."""
    if has_entities:
        line = ENTITY.sub(_decode_entity, line)
    line = C1_CONTROLS.sub(_decode_c1_control, line)
    line = line.translate(LIGATURE_TABLE).translate(WIDTH_TABLE)
    line = DOUBLE_QUOTES.sub('"', SINGLE_QUOTES.sub("'", line))
    line = LINE_BREAKS.sub("\n", line)
    line = SURROGATE.sub("\ufffd", SURROGATE_PAIR.sub(_join_surrogates, line))
    line = TERMINAL_ESCAPE.sub("", line)
    return unicodedata.normalize("NFC", line.translate(UNSEEN_TABLE))


def repair_text(text: str) -> str:
    """Replace odd characters by usual ones, as `ftfy.fix_text` does without guessing encodings."""
    has_entities = True
    repaired_lines: list[str] = []
    for line in re.findall("[^\n]*\n|[^\n]+", text):
        # a text with a tag is HTML: its entities are then meant as they are
        has_entities = has_entities and "<" not in line
        repaired_text = _repair_line(line, has_entities=has_entities)
        while repaired_text != line:
            line = repaired_text
            repaired_text = _repair_line(line, has_entities=has_entities)
        repaired_lines.append(repaired_text)
    return "".join(repaired_lines)


def _clean_basically(text: str) -> str:
    """Repair a text and decode the entities of HTML, even those that are written twice."""
    return html.unescape(html.unescape(repair_text(text))).strip()


def clean_whitespace(text: str) -> str:
    """Repair a text, and leave one space between words: open_clip's `whitespace`."""
    return " ".join(_clean_basically(text).split())


def clean_lower(text: str) -> str:
    """Repair a text, with small letters and one space between words: open_clip's `lower`."""
    return clean_whitespace(text).lower()


def clean_canonicalize(text: str) -> str:
    """Repair a text, without punctuation and capitals: open_clip's `canonicalize`."""
    words = _clean_basically(text).replace("_", " ").translate(PUNCTUATION_TABLE)
    return " ".join(words.lower().split())


def clean_siglip_cased(text: str) -> str:
    """Remove punctuation, and leave one space between words, as SigLIP's tokenizer does."""
    return re.sub(r"\s+", " ", text.translate(PUNCTUATION_TABLE)).strip()


def clean_siglip(text: str) -> str:
    """Do the same in small letters, which is the setting that SigLIP was trained with."""
    return clean_siglip_cased(text.lower())


CLEANERS: dict[str, Callable[[str], str]] = {
    "whitespace": clean_whitespace,
    "lower": clean_lower,
    "canonicalize": clean_canonicalize,
    "siglip": clean_siglip,
    "siglip_cased": clean_siglip_cased,
}
"""Functions that clean a text, by the names that manifests use. The first three are open_clip's."""
