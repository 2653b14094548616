"""TODO."""

from __future__ import annotations

from mmcompress.results.records import Summary, Target
from mmcompress.results.target import corrected_target_share, target_share

STEEP, HARM = 0.6, 1.1
"""A larger share of one kind of unit, cut at once, is warned about where it made the loss so many times what it was."""


SAYING = 0.05
"""So is a metric by which the dense pipeline itself is right less often."""


UNUSED = 0.95
"""So is an artifact that takes less than this share of its target."""


def _group_ratios(s: Summary) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    for node, blocks in s.blocks.items():
        for b in blocks:
            if b.group == "tokens":
                continue
            share = 1 - s.kept_units[node].get(b.name, b.units) / b.units
            found.setdefault((node, b.kind), []).append(share)
    return found


def list_warnings(s: Summary) -> tuple[str, ...]:
    """What the reader should know before trusting or deploying the result, each with its reason."""
    out = []
    for name, q in s.compressed.quality.items():
        if q.high - q.low > 0.06:
            out.append(
                f"{name}: the 95 % interval is {100 * (q.high - q.low):.1f} points wide at n = {q.n}; "
                "differences smaller than that can't be told on this test split"
            )
    for name, q in s.baseline.quality.items():
        if (right := 1 - q.value if q.is_error_rate else q.value) < SAYING:
            left_out = ", and it is left out of what is retained" if right <= 0 else ""
            out.append(
                f"{name}: the dense pipeline itself is right only {max(right, 0):.1%} of the time: this says little of "
                f"what was lost{left_out}; 'agreement' with the dense pipeline may say more (metrics)"
            )
    means = {of: sum(shares) / len(shares) for of, shares in _group_ratios(s).items()}
    steep = [
        f"{mean:.0%} of the {kind} units of {node}"
        for (node, kind), mean in means.items()
        if mean > STEEP
    ]
    if steep and s.settings.get("prune", {}).get("schedule") == "one_shot" and _harmed(s):
        out.append(
            f"{', '.join(steep)} were cut in one step{_damage(s)}; more training (distill.minutes), or rounds of "
            "pruning and training (prune.schedule: gradual), may keep more"
        )
    for node, r in s.compressed.nodes.items():
        if r.sparsity > 0.1:
            out.append(
                f"{node}: {r.sparsity:.0%} of the weights of its blocks are zero; it takes {r.latency_ms_p50:.2f} ms: "
                "ONNX Runtime multiplies zeros like other numbers, so this brings no speed"
            )
    for node, r in s.compressed.nodes.items():
        b = s.baseline.nodes[node]
        if r.latency_ms_p50 > 0.98 * b.latency_ms_p50 and (
            r.precision != "fp32" or r.params < 0.95 * b.params
        ):
            out.append(
                f"{node}: {r.precision}, {r.params / b.params:.0%} of its parameters, yet no faster on this machine"
            )
    if s.baseline.model_share < 0.85:
        out.append(
            f"only {s.baseline.model_share:.0%} of the dense request is spent inside models; compressing them "
            "can't shorten the rest"
        )
    if s.attempts and abs(s.attempts[-1].predicted_ms / s.attempts[-1].measured_ms - 1) > 0.1:
        out.append(
            "predicted and measured latency differ by more than 10 %: the device table may be stale or the machine "
            "busy; a new --out with an empty table cache (MMCOMPRESS_CACHE) measures the device anew"
        )
    if s.cross_modal_ratio is not None and s.cross_modal_ratio > s.unimodal_ratio + 1e-6:
        ratios = f"{s.cross_modal_ratio:.0%} against {s.unimodal_ratio:.0%} of the units"
        out.append(f"cross-modal layers were pruned more than the others ({ratios})")
    if s.target.met and corrected_target_share(s) < UNUSED:
        why = (
            f"it was meant to take {s.aimed_share:.1%}, for no structure that the search found between loses less"
            if s.aimed_share < UNUSED
            else "more was cut than needed, and another round may use the rest (search.max_artifacts)"
        )
        out.append(f"the pipeline takes {target_share(s):.1%} of its target: {why}")
    if s.compressed.latency_ms.n == 0:
        out.append(
            f"the latency of the compressed pipeline is predicted for {s.cpu.get('name')}, not measured there: "
            "run `mmcompress device check KIT BUNDLE` on it, then `mmcompress report RUN --measured FILE` here"
        )
    return (*out, _missed(s)) if not s.target.met else tuple(out)


def _missed(s: Summary) -> str:
    """What was exceeded, what stands in the way, and what could be reached."""
    said = f"{'; '.join(s.target.exceeded_bounds)}: the target is not met"
    if any(" ms, asked" in bound for bound in s.target.exceeded_bounds):
        name, node = max(s.compressed.nodes.items(), key=lambda n: n[1].latency_ms_p50)
        said += (
            f". The bottleneck is '{name}' ({node.latency_ms_p50:.2f} ms). The lowest latency this search "
            f"space can reach is predicted at {s.target.floor_ms:.2f} ms; {s.target.fixed_ms:.2f} ms of it "
            "can't be pruned: pre-processing, the decode loop, embeddings and heads of the models"
            f"{_shares(s.target)}"
        )
    else:
        name, node = max(s.compressed.nodes.items(), key=lambda n: n[1].params)
        said += f". The largest model is '{name}' ({node.params / 1e6:.2f} M parameters, {node.size_mb:.1f} MB)"
    units = {"parameters": "M", "size": "MB", "memory": "MB"}  # else it is the latency of a node
    for what, least in s.target.lowest_reachable.items():
        if any(bound.startswith(f"{what}: ") for bound in s.target.exceeded_bounds):
            said += f". The least {what} of this search space is predicted at {least:.2f} {units.get(what, 'ms')}"
    return said


def _shares(target: Target) -> str:
    """What the nodes have of the fixed part, the most first."""
    parts = sorted(target.fixed_ms_by_node.items(), key=lambda part: -part[1])
    return f" (by node: {', '.join(f'{n} {ms:.2f} ms' for n, ms in parts)})" if parts else ""


def _harmed(s: Summary) -> bool:
    """Whether the cut raised the loss on choosing pairs by more than a little, as far as it is known."""
    return len(s.validation_losses) < 2 or s.validation_losses[1] > HARM * s.validation_losses[0]


def _damage(s: Summary) -> str:
    """The loss on choosing pairs before the cut, after it, and with the weights that training left, in words."""
    if len(s.validation_losses) < 2:
        return ""
    told = f": the loss on choosing pairs went from {s.validation_losses[0]:.3f} to {s.validation_losses[1]:.3f}"
    return told + (
        f", after training it was {s.validation_losses[-1]:.3f}"
        if len(s.validation_losses) > 2
        else ""
    )
