"""Counts the sentences of the project that are too long, and fails when there is one.

    python tools/check_prose.py    prints the count and every place; exit code 1 above the limit

What is read: docstrings, strings under fields, and every other text in the package; templates of
reports; the pages in Markdown that people write.

Definitions. A sentence ends at a full stop, a question mark, the end of a paragraph, or the end of
an item of a list. A word is what stands between blanks and holds a letter or a digit. What stands
between backticks is one word, and so is a value that a message inserts. Left out are code, tables,
headings, and blocks that are indented below a colon.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The folder of the repository."""

MAX_WORDS = 25
"""Words of a sentence."""

PYTHON_FOLDERS = ("mmcompress", "tools", "benchmarks")
"""Folders whose strings are read."""

PAGES = ("*.md", "docs/**/*.md", "reports/README.md", "tests/golden/README.md")
"""Pages that people write."""

TEMPLATES = "mmcompress/report/templates"
"""The folder of the templates of reports."""

LIST_ITEM = re.compile(r"\s*([-*]|\d+\.)\s+")
"""The start of an item of a list."""

DOCSTRING_ENTRY = re.compile(r"\s+[\w*, ]+: ")
"""The start of an entry of `Args`, `Returns` or `Raises`."""

SECTION = re.compile(r"\s*(Args|Returns|Raises|Yields):\s*$")
"""The line that opens a section of a docstring."""

INSERTED = "VALUE"
"""What stands for a value that a message inserts."""

BREAK = "\n\n"
"""What ends a paragraph."""


@dataclass(frozen=True, kw_only=True)
class LongSentence:
    """A sentence above the limit."""

    place: str
    """`file:line` where its text starts."""
    words: int
    """Its words."""
    text: str
    """The sentence itself."""


def list_sentences(text: str) -> list[str]:
    """List the sentences of a text whose paragraphs are apart by an empty line."""
    sentences: list[str] = []
    for paragraph in text.split(BREAK):
        flat = " ".join(paragraph.split())
        flat = re.sub(r"`[^`]*`", "CODE", flat)
        flat = re.sub(r"\]\([^)]*\)", "]", flat)
        flat = re.sub(r"\b(e\.g|i\.e|et al|vs)\.", r"\1", flat)
        sentences += re.split(r"(?<=[.!?])[\"')*]*\s+", flat)
    return sentences


def count_words(sentence: str) -> int:
    """Count the words of a sentence."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def read_page(text: str) -> str:
    """Return the prose of a page: without code, tables and headings, an item a paragraph."""
    lines: list[str] = []
    is_code = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            is_code = not is_code
        if is_code or line.lstrip().startswith(("```", "|", "#", "<")):
            lines.append("")
            continue
        if LIST_ITEM.match(line):
            lines.append("")
        elif line.startswith("    ") and (not lines or not lines[-1].strip()):
            lines.append("")
            continue
        lines.append(line)
    return "\n".join(lines)


def read_docstring(text: str, margin: int) -> str:
    """Return the prose of a docstring: without indented code, an entry a paragraph.

    Args:
        text: The docstring.
        margin: The column that it begins in.
    """
    lines: list[str] = []
    in_section = False
    is_code = False
    for i, row in enumerate(text.expandtabs().splitlines()):
        line = row if i == 0 else row[margin:]
        is_indented = line.startswith("    ")
        if SECTION.match(line):
            in_section = True
            lines.append("")
            continue
        in_section = in_section and (is_indented or not line.strip())
        if not line.strip():
            lines.append("")
            continue
        follows_break = not lines or not lines[-1] or lines[-1].endswith(":")
        is_code = is_indented and not in_section and (is_code or follows_break)
        if is_code:
            lines.append("")
            continue
        starts_entry = in_section and re.match(r" {4}\S", line) and DOCSTRING_ENTRY.match(line)
        if starts_entry or LIST_ITEM.match(line):
            lines.append("")
            line = DOCSTRING_ENTRY.sub("", line, count=1) if starts_entry else line
        lines.append(line)
    return "\n".join(lines)


def read_template(text: str) -> str:
    """Return the prose of a template: tags end a paragraph, inserted values are one word."""
    text = re.sub(r"<(style|script).*?</\1>", BREAK, text, flags=re.DOTALL)
    text = re.sub(r"\{\{.*?\}\}", INSERTED, text, flags=re.DOTALL)
    text = re.sub(r"\{[%#].*?[%#]\}", " ", text, flags=re.DOTALL)
    text = re.sub(r"</?(b|i|em|strong|code|span|a)\b[^>]*>", "", text)
    text = re.sub(r"<[^>]*>", BREAK, text)
    return read_page(text)


def join_parts(node: ast.JoinedStr) -> str:
    """Return the text of an f-string with one word for each inserted value."""
    parts: list[str] = []
    for part in node.values:
        is_text = isinstance(part, ast.Constant)
        parts.append(str(part.value) if is_text else INSERTED)
    return "".join(parts)


def list_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the prose of every string."""
    inner: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner.update(id(other) for other in ast.walk(node) if other is not node)
            if id(node) not in inner:
                yield node.lineno, join_parts(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inner.add(id(node.value))
            yield node.lineno, read_docstring(str(node.value.value), node.col_offset)
        elif _is_text(node) and id(node) not in inner:
            yield node.lineno, node.value


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def find_long_sentences() -> list[LongSentence]:
    """Find every sentence above the limit."""
    texts: list[tuple[str, str]] = []
    for folder in PYTHON_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            name = path.relative_to(ROOT)
            texts += [(f"{name}:{line}", text) for line, text in list_texts(tree)]
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            texts.append((str(path.relative_to(ROOT)), read_page(path.read_text(encoding="utf-8"))))
    for path in sorted((ROOT / TEMPLATES).iterdir()):
        text = read_template(path.read_text(encoding="utf-8"))
        texts.append((str(path.relative_to(ROOT)), text))
    long_sentences: list[LongSentence] = []
    for place, text in texts:
        for sentence in list_sentences(text):
            words = count_words(sentence)
            if words > MAX_WORDS:
                long_sentences.append(LongSentence(place=place, words=words, text=sentence))
    return long_sentences


def main() -> int:
    """Print the sentences above the limit; return 1 when there is one."""
    long_sentences = find_long_sentences()
    for sentence in long_sentences:
        print(f"{sentence.place}: {sentence.words} words: {sentence.text}")
    print(f"{len(long_sentences)} sentences of more than {MAX_WORDS} words (to reach: 0)")
    return int(bool(long_sentences))


if __name__ == "__main__":
    sys.exit(main())
