"""Latency free of a machine's moods: a structure is held against whole pipelines that are measured again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from mmcompress.measure.latency import EndToEnd
from mmcompress.records import read, write

DENSE = "fp32"


@dataclass(frozen=True)
class Windows:
    """Of every measurement so far: the p50 of each node, over that of the whole dense request beside it, in the whole
    pipeline of each precision."""

    seen: tuple[dict[str, dict[str, float]], ...] = ()

    def usual(self, node: str, precision: str) -> float:
        return fmean(w[precision][node] for w in self.seen if precision in w)


def recall(record: Path) -> Windows:
    return read(Windows, record) if record.exists() else Windows()


def together(record: Path, found: Mapping[str, EndToEnd]) -> Windows:
    """What is on record, and last what whole pipelines took now, by precision."""
    whole = found[DENSE].latency.p50
    window = {p: {n: ms.p50 / whole for n, ms in m.nodes.items()} for p, m in found.items()}
    return Windows((*recall(record).seen, window))


def add(record: Path, found: Mapping[str, EndToEnd]) -> Windows:
    """`together`, put on record."""
    windows = together(record, found)
    write(record, windows, indent=None)
    return windows


def steadied(nodes: Mapping[str, float], precision: Mapping[str, str], windows: Windows, at: int = -1) -> float:
    """The factor from what a structure took in one window to what it takes usually, over the dense pipeline.

    `nodes`: the milliseconds of each of its nodes in that window, the last one or the one `at` an index.

    A busy machine slows a rounded model down otherwise than a large one in fp32, by up to a tenth and for minutes. A
    node of a structure feels what the whole node of its precision feels right beside it: what that one takes now and
    usually is known.
    """
    now, then = windows.seen[at], 0.0
    of = lambda n: p if (p := precision.get(n, DENSE)) in now else DENSE
    for n, ms in nodes.items():
        here = now[of(n)][n]
        then += ms * (windows.usual(n, of(n)) / here if here else 1.0)
    return then / sum(nodes.values())
