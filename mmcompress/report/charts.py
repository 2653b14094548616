"""Charts as inline SVG: small functions from numbers to markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate, KeptUnits
from mmcompress.results.records import Summary, Trial
from mmcompress.stats import Quality


def structure_rows(
    blocks: Mapping[str, tuple[Block, ...]], kept: Mapping[str, KeptUnits]
) -> dict[str, list[tuple[Block, int]]]:
    """(block, units kept) by node, for drawing."""
    return {n: [(b, kept.get(n, {}).get(b.name, b.units)) for b in bs] for n, bs in blocks.items()}


PALETTE = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")


def _svg(width: float, height: float, *, body: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, *, text: str, cls: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{cls}">{escape(text)}</text>'
    )


def draw_node_bars(s: Summary) -> str:
    """Where the time of a request goes, before and after, to one scale."""
    width, left, bar = 760.0, 96.0, 34.0
    longest = max(
        sum(n.latency_ms_p50 for n in side.nodes.values()) for side in (s.baseline, s.compressed)
    )
    scale = (width - left - 90) / max(
        longest, s.baseline.latency_ms.p50
    )  # branches in parallel add up to more
    body = []
    for row, (label, side) in enumerate((("before", s.baseline), ("after", s.compressed))):
        x, y = left, 10 + row * (bar + 14)
        body.append(_text(left - 10, y + bar / 2 + 4, text=label, anchor="end"))
        rest = side.latency_ms.p50
        for i, (name, node) in enumerate(side.nodes.items()):
            w = node.latency_ms_p50 * scale
            rest -= node.latency_ms_p50
            title = f"{name}: {node.latency_ms_p50:.2f} ms"
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{bar}"'
                f' fill="{PALETTE[i % 6]}">'
                f"<title>{escape(title)}</title></rect>"
            )
            if w > 60:
                body.append(
                    _text(
                        x + w / 2,
                        y + bar / 2 + 4,
                        text=f"{name} {node.latency_ms_p50:.1f}",
                        cls="on",
                        anchor="middle",
                    )
                )
            x += w
        if rest > 0:
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{rest * scale:.1f}"'
                f' height="{bar}" class="rest">'
                f"<title>around the models: {rest:.2f} ms</title></rect>"
            )
            x += rest * scale
        body.append(
            _text(x + 8, y + bar / 2 + 4, text=f"{side.latency_ms.p50:.2f} ms", cls="strong")
        )
    x = left + s.target.latency_ms * scale
    body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{2 * bar + 34:.0f}" class="target"/>')
    body.append(
        _text(x + 4, 2 * bar + 46, text=f"target {s.target.latency_ms:.2f} ms", cls="small")
    )
    return _svg(width, 2 * bar + 54, body=body, label="latency by node before and after")


def draw_structure_map(s: Summary) -> str:
    """Every block of every model: what was kept (filled) of what there was; cross-modal blocks
    outlined."""
    rows = structure_rows(s.blocks, s.kept_units)
    cell, gap, left = 74.0, 6.0, 96.0
    width = left + max(len(r) for r in rows.values()) * (cell + gap)
    body, y = [], 18.0
    for i, (node, blocks) in enumerate(rows.items()):
        body.append(_text(left - 10, y + 24, text=node, cls="strong", anchor="end"))
        for j, (b, kept) in enumerate(blocks):
            x, share = left + j * (cell + gap), kept / b.units
            crossing = b.name in s.cross_modal_reasons.get(node, {})
            title = f"{node}.{b.name}: {kept} of {b.units} kept" + (
                " (cross-modal)" if crossing else ""
            )
            body.append(
                f"<g><title>{escape(title)}</title>"
                f'<rect x="{x}" y="{y}" width="{cell}" height="40" class="slot"/>'
                f'<rect x="{x}" y="{y + 40 * (1 - share):.1f}" width="{cell}"'
                f' height="{40 * share:.1f}" '
                f'fill="{PALETTE[i % 6]}"/>'
            )
            if crossing:
                body.append(f'<rect x="{x}" y="{y}" width="{cell}" height="40" class="crossing"/>')
            body.append(
                _text(
                    x + cell / 2,
                    y + 24,
                    text=f"{kept}/{b.units}",
                    cls="on" if share > 0.6 else "",
                    anchor="middle",
                )
            )
            short = b.name.replace("attention", "attn").replace("cross_attn", "cross")
            body.append(
                _text(x + cell / 2, y + 53, text=short, cls="small", anchor="middle") + "</g>"
            )
        y += 74
    return _svg(width, y, body=body, label="units kept in every block")


def draw_trials(s: Summary) -> str:
    """Every trial: predicted latency against the loss it was judged on."""
    if not s.trials:
        return ""
    width, height, left, bottom = 760.0, 280.0, 60.0, 40.0
    xs = [t.latency_ms for t in s.trials] + [s.target.latency_ms]
    low, high = min(xs) * 0.98, max(xs) * 1.02
    losses = sorted(t.loss for t in s.trials)
    cap = losses[min(len(losses) - 1, int(len(losses) * 0.95))] * 1.05
    floor = losses[0] * 0.95

    def at(t: Trial) -> tuple[float, float]:
        x = left + (t.latency_ms - low) / (high - low) * (width - left - 16)
        share = (min(t.loss, cap) - floor) / max(cap - floor, 1e-9)
        return x, 12 + (1 - share) * (height - bottom - 12)

    body = []
    for k in range(5):
        value = floor + (cap - floor) * k / 4
        y = 12 + (1 - k / 4) * (height - bottom - 12)
        body.append(f'<line x1="{left}" x2="{width - 16}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        body.append(_text(left - 8, y + 4, text=f"{value:.2f}", cls="small", anchor="end"))
        ms = low + (high - low) * k / 4
        body.append(
            _text(
                left + (width - left - 16) * k / 4,
                height - 20,
                text=f"{ms:.2f}",
                cls="small",
                anchor="middle",
            )
        )
    x = left + (s.target.latency_ms - low) / (high - low) * (width - left - 16)
    body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{height - bottom}" class="target"/>')
    precision = {n: r.precision for n, r in s.compressed.nodes.items()}
    chosen = next((t for t in s.trials if t.candidate == Candidate(s.kept_units, precision)), None)
    for t in s.trials:
        px, py = at(t)
        cls = "trial mutation" if t.origin == "mutation" else "trial"
        body.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" class="{cls}">'
            f"<title>trial {t.number} ({t.origin}): "
            f"{t.latency_ms:.2f} ms, loss {t.loss:.3f}</title></circle>"
        )
    if chosen:
        px, py = at(chosen)
        body.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="8" class="chosen"/>')
    body.append(
        _text(
            (left + width) / 2,
            height - 4,
            text="predicted latency, ms",
            cls="small",
            anchor="middle",
        )
    )
    body.append(_text(4, height / 2, text="loss", cls="small"))
    return _svg(width, height, body=body, label="trials of the search")


def draw_front(summaries: Mapping[str, Summary]) -> str:
    """Speed-up against the quality that was kept, one point a target."""
    width, height, left, bottom = 760.0, 260.0, 60.0, 40.0
    runs = list(summaries.values())
    fastest = max([s.speedup for s in runs] + [s.target.speedup for s in runs]) * 1.08
    least = min(0.9, *(s.quality_retained for s in runs)) - 0.02

    def x(speedup: float) -> float:
        return left + (speedup - 1) / max(fastest - 1, 1e-9) * (width - left - 40)

    def y(retained: float) -> float:
        return 12 + (1.01 - retained) / (1.01 - least) * (height - bottom - 12)

    body = []
    for k in range(5):
        v = least + (1 - least) * k / 4
        body.append(
            f'<line x1="{left}" x2="{width - 16}" y1="{y(v):.1f}" y2="{y(v):.1f}" class="grid"/>'
        )
        body.append(_text(left - 8, y(v) + 4, text=f"{v:.0%}", cls="small", anchor="end"))
    points = [(1.0, 1.0), *sorted((s.speedup, s.quality_retained) for s in runs)]
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    body.append(f'<polyline points="{path}" fill="none" stroke="{PALETTE[0]}" stroke-width="1.5"/>')
    for s in runs:
        at = x(s.target.speedup)
        body.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="8" y2="{height - bottom}" class="target"/>'
        )
        body.append(_text(at, height - 20, text=s.target.asked, cls="small", anchor="middle"))
        body.append(
            f'<circle cx="{x(s.speedup):.1f}" cy="{y(s.quality_retained):.1f}"'
            f' r="5" fill="{PALETTE[0]}"/>'
        )
        body.append(
            _text(
                x(s.speedup) + 8,
                y(s.quality_retained) - 8,
                text=f"{s.speedup:.2f}×, {s.quality_retained:.1%}",
            )
        )
    body.append(
        _text((left + width) / 2, height - 4, text="speed-up", cls="small", anchor="middle")
    )
    return _svg(width, height, body=body, label="quality kept against speed-up")


def draw_comparison(summaries: Mapping[str, Summary]) -> str:
    """Each metric of each method with its interval, the dense pipeline first."""
    one = next(iter(summaries.values()))
    rows = [
        ("dense", 1.0, one.baseline.quality),
        *((n, s.speedup, s.compressed.quality) for n, s in summaries.items()),
    ]
    labels = [f"{name} {speedup:.2f}×" for name, speedup, _ in rows]
    width, left, step = 760.0, max(150.0, 7.0 * max(map(len, labels)) + 20), 24.0
    panel = (width - left - 20) / len(one.baseline.quality)
    body: list[str] = []
    for k, metric in enumerate(one.baseline.quality):
        values = [v for _, _, q in rows for v in (q[metric].low, q[metric].high)]
        low, high = min(values), max(max(values), min(values) + 1e-6)
        start = left + k * panel
        scale = (panel - 30) / (high - low)
        body.append(
            _text(
                start,
                14,
                text=metric + (" (less is better)" if rows[0][2][metric].is_error_rate else ""),
                cls="small",
            )
        )
        for i, (_, _, quality) in enumerate(rows):
            q = quality[metric]
            y = 34 + i * step
            left_end = start + (q.low - low) * scale
            right_end = start + (q.high - low) * scale
            middle = start + (q.value - low) * scale
            body.append(
                f'<line x1="{left_end:.1f}" x2="{right_end:.1f}" y1="{y}" y2="{y}" '
                'class="interval"/>'
            )
            dot = f'<circle cx="{middle:.1f}" cy="{y}" r="5" fill="{PALETTE[k % 6]}">'
            body.append(f"{dot}<title>{q.value:.1%}</title></circle>")
    for i, label in enumerate(labels):
        body.append(_text(left - 14, 38 + i * step, text=label, anchor="end"))
    return _svg(width, 44 + len(rows) * step, body=body, label="methods compared")


def draw_prediction(predicted: Sequence[float], measured: Sequence[float]) -> str:
    """Predicted against measured milliseconds, on one scale; it can stand in a file of its own."""
    size, left = 420.0, 54.0
    low, high = 0.95 * min(*predicted, *measured), 1.05 * max(*predicted, *measured)
    scale = (size - left - 16) / (high - low)

    def x(milliseconds: float) -> float:
        return left + (milliseconds - low) * scale

    def y(milliseconds: float) -> float:
        return size - 46 - (milliseconds - low) * scale

    style = (
        'style="max-width: 420px" xmlns="http://www.w3.org/2000/svg" '
        'font-family="system-ui, sans-serif" font-size="12"'
    )
    body = [
        f'<line x1="{x(low)}" y1="{y(low)}" x2="{x(high)}" y2="{y(high)}" '
        'stroke="#999" stroke-dasharray="5 4"/>'
    ]
    for k in range(5):
        v = low + (high - low) * k / 4
        body.append(
            _text(x(v), size - 26, text=f"{v:.3g}", anchor="middle")
            + _text(left - 8, y(v) + 4, text=f"{v:.3g}", anchor="end")
        )
    for a, b in zip(predicted, measured, strict=True):
        body.append(
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="4" fill="{PALETTE[0]}" opacity=".8"/>'
        )
    body.append(
        _text(size / 2, size - 6, text="predicted, ms", anchor="middle")
        + _text(6, 14, text="measured, ms")
    )
    return _svg(size, size, body=body, label="predicted against measured latency").replace(
        "<svg ", f"<svg {style} ", 1
    )


def draw_quality_bars(before: dict[str, Quality], after: dict[str, Quality]) -> str:
    """Each metric before and after with its 95 % interval."""
    width, left, step = 760.0, 170.0, 46.0
    body: list[str] = []
    for i, (name, b) in enumerate(before.items()):
        for k, (q, cls) in enumerate(((b, "dense"), (after[name], "compressed"))):
            y = 8 + i * step + k * 17
            x = [left + v * (width - left - 80) for v in (q.low, q.value, q.high)]
            body.append(
                f'<rect x="{left}" y="{y}" width="{x[1] - left:.1f}" height="13" class="{cls}"/>'
            )
            body.append(
                f'<line x1="{x[0]:.1f}" x2="{x[2]:.1f}" y1="{y + 6.5}"'
                f' y2="{y + 6.5}" class="interval"/>'
            )
            body.append(_text(x[2] + 8, y + 11, text=f"{q.value:.1%}", cls="small"))
        label = f"{name} (less is better)" if b.is_error_rate else name
        body.append(_text(left - 10, 28 + i * step, text=label, anchor="end"))
    return _svg(width, len(before) * step + 4, body=body, label="quality before and after")
