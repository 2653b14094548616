"""The card of a bundle: `README.md` in the form that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmcompress.report.fill_templates import fill_template
from mmcompress.results.records import Summary
from mmcompress.storage import replace_file
from mmcompress.workspace.folder import RunFolder

KNOWN_LICENCES = {
    "embedded:": "Apache-2.0, trained by mmcompress on drawn scenes",
    "pip:whisper-tiny.en": "MIT (OpenAI)",
    "pip:all-MiniLM-L6-v2": "Apache-2.0 (sentence-transformers)",
}
"""Licences of sources that come with packages, by the beginning of the source."""

UNKNOWN_LICENCE = "that of the source: look there before you share this"
"""What a card says of a source of someone else's."""

EXAMPLE_VALUES = {"image": '"photo.png"', "audio": '"speech.wav"', "text": '"a text"'}
"""What stands for an input in the example of a card, by its type."""


@dataclass(frozen=True, kw_only=True)
class CardSource:
    """Where the weights of a node come from."""

    node: str
    """The node."""
    source: str
    """The source, as the spec names it."""
    licence: str
    """Its licence."""


def write_bundle_card(summary: Summary, folder: RunFolder) -> None:
    """Write the card into the bundle of a run folder; nothing where there is no bundle."""
    if not folder.bundle.exists():
        return
    settings = summary.settings
    arguments = [
        f"{name}={EXAMPLE_VALUES.get(value_type, '...')}"
        for name, value_type in settings.get("inputs", {}).items()
    ]
    text = fill_template(
        "bundle_card.md",
        summary=summary,
        sources=_list_sources(settings.get("nodes", {})),
        arguments=", ".join(arguments),
        outputs=list(settings.get("outputs", {})),
    )
    with replace_file(folder.bundle / "README.md") as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _list_sources(nodes: Mapping[str, Mapping[str, str]]) -> list[CardSource]:
    """List the sources of all nodes with weights."""
    sources: list[CardSource] = []
    for name, node in nodes.items():
        source = node["source"]
        if source:
            licence = _find_licence(source)
            shown_source = _hide_folder(source)
            sources.append(CardSource(node=name, source=shown_source, licence=licence))
    return sources


def _hide_folder(source: str) -> str:
    """Return a source as others may see it: of a path of this machine its last part alone."""
    scheme, colon, location = source.rpartition(":")
    path = Path(location)
    return f"{scheme}{colon}{path.name}" if path.is_absolute() else source


def _find_licence(source: str) -> str:
    """Return the licence of a source, as far as it is known here."""
    for beginning, licence in KNOWN_LICENCES.items():
        if source.startswith(beginning):
            return licence
    return UNKNOWN_LICENCE
