"""What a reader should know before trusting or deploying a result. No torch."""

from __future__ import annotations

from mmcompress.graph.blocks import list_input_readers
from mmcompress.graph.structure import measure_removed_share
from mmcompress.results.records import LONG_INPUTS, Summary, Target
from mmcompress.results.target_met import compute_corrected_target_share, compute_target_share
from mmcompress.run.run_policy import WANTED_LATENCY_MARGIN

MAX_INTERVAL_WIDTH = 0.06
"""Width of a 95 % interval above which a metric tells little apart."""

FEW_STEPS_SHARE = 0.25
"""Share of the steps that were asked for, below which a training hardly took place."""

MIN_DENSE_ACCURACY = 0.05
"""Share of inputs that the dense pipeline must be right on for a metric to say what was lost."""

NOTABLE_EMPTY_SHARE = 0.1
"""Share of the dense answers that are empty. From this share on a warning says so."""

NOTABLE_EQUAL_SHARE = 0.5
"""Share of the dense answers that are empty or one text. From this share on a warning tells of it,
as a lookup in a short list finds one text often."""

UNSEEN_LOSS = 0.2
"""Share of the dense quality that validation pairs may lose beyond what the test split loses."""

STEEP_CUT_SHARE = 0.6
"""Share of one kind of unit that is much to cut at once."""

HARMFUL_CUT_RATIO = 1.1
"""Loss after the cut / loss before it, from which a steep cut did harm."""

NOTABLE_SPARSITY = 0.1
"""Share of zeros from which the user may expect speed of them."""

UNCHANGED_LATENCY_SHARE = 0.98
"""Latency of a compressed node / latency of the dense one, from which it counts as no faster."""

SMALLER_PARAMS_SHARE = 0.95
"""Parameters of a compressed node / of the dense one, below which it should be faster."""

MIN_MODEL_SHARE = 0.85
"""Share of the dense request inside models, below which compression reaches little."""

MAX_PREDICTION_ERROR = 0.1
"""Relative difference of predicted and measured latency that is still usual."""

MIN_USED_TARGET_SHARE = 0.95
"""Latency / target below which more was cut than needed."""


def list_warnings(summary: Summary) -> tuple[str, ...]:
    """Return what to know before trusting or deploying the result, each with its reason."""
    warnings = [] if summary.target.met else [_explain_miss(summary)]
    warnings += [
        *_warn_of_skipped_steps(summary),
        *_warn_of_lost_quality(summary),
        *warn_of_time_cuts(summary),
        *_warn_of_few_steps(summary),
        *_warn_of_wide_intervals(summary),
        *_warn_of_unseen_loss(summary),
        *_warn_of_weak_metrics(summary),
        *_warn_of_chance(summary),
        *_warn_of_uninformative_answers(summary),
        *_warn_of_collapsed_answers(summary),
        *_warn_of_long_inputs(summary),
        *_warn_of_emptied_nodes(summary),
        *_warn_of_steep_cut(summary),
        *_warn_of_touched_bounds(summary),
        *_warn_of_slow_zeros(summary),
        *_warn_of_nodes_no_faster(summary),
        *_warn_of_time_outside_models(summary),
        *_warn_of_wrong_prediction(summary),
        *_warn_of_cross_modal_cut(summary),
        *_warn_of_unused_target(summary),
        *_warn_of_uncertain_latency(summary),
        *_warn_of_predicted_latency(summary),
    ]
    return tuple(warnings)


def _warn_of_skipped_steps(summary: Summary) -> list[str]:
    """Warn of what has no figure since it went wrong: the result is judged by the rest."""
    return [
        f"{name} has no figure: {reason}; everything else is measured and kept, and --resume "
        "tries it again"
        for name, reason in summary.skipped.items()
    ]


def _warn_of_lost_quality(summary: Summary) -> list[str]:
    """Warn where less of the dense quality is kept than was asked for, by either split."""
    retained = summary.retained
    if retained is None:
        return []
    warnings = []
    if not retained.is_kept:
        warnings.append(
            f"{retained.choosing.value:.1%} of the dense quality is kept on validation pairs, "
            f"{retained.limit:.1%} is asked for (limits.retained)"
        )
    elif retained.test.n > 0 and retained.test.high < retained.limit:
        warnings.append(
            f"limits.retained is kept on validation pairs, but on the test split "
            f"{retained.test.value:.1%} is kept, of {retained.limit:.1%} asked for"
        )
    return warnings


def warn_of_time_cuts(summary: Summary) -> list[str]:
    """Tell what was cut so that the run ended in time."""
    if not summary.time_cuts:
        return []
    return [
        f"to end within --max-time, the run made do with less: {'; '.join(summary.time_cuts)}; "
        "more time may keep more"
    ]


def _warn_of_few_steps(summary: Summary) -> list[str]:
    """Warn where the minutes of the training afforded a small part of its steps."""
    training = summary.training
    if training is None or training.ended_by != "minutes":
        return []
    if training.steps >= FEW_STEPS_SHARE * training.asked_steps:
        return []
    return [
        f"the artifact was hardly trained: {training.steps} of {training.asked_steps} steps fit "
        f"into {training.seconds / 60:.1f} minutes on this machine (distill.minutes, or another "
        "--effort)"
    ]


def _warn_of_wide_intervals(summary: Summary) -> list[str]:
    """Warn of metrics whose interval is too wide to tell results apart."""
    widths: dict[str, float] = {}
    for name, quality in summary.compressed.quality.items():
        width = quality.high - quality.low
        if width > MAX_INTERVAL_WIDTH:
            widths[name] = width
    if not widths:
        return []
    fewest = min(summary.compressed.quality[name].n for name in widths)
    narrowest, widest = (
        f"{100 * width:.1f}" for width in (min(widths.values()), max(widths.values()))
    )
    told = widest if narrowest == widest else f"{narrowest} to {widest}"
    return [
        f"{', '.join(widths)}: 95 % intervals are {told} points wide at n = {fewest}; differences "
        "smaller than that can't be told on this test split. A larger one tells more"
    ]


def _warn_of_unseen_loss(summary: Summary) -> list[str]:
    """Warn of quality that was lost on validation pairs and that the test split does not show."""
    if summary.training is None or summary.determined_quality is None:
        return []
    warnings = []
    for figure in summary.training.quality:
        if figure.after is None or figure.dense <= 0:
            continue
        kept_share = figure.after / figure.dense
        if kept_share < summary.determined_quality - UNSEEN_LOSS:
            warnings.append(
                f"{figure.name} fell from {figure.dense:.1%} to {figure.after:.1%} on validation "
                f"pairs, though {summary.determined_quality:.1%} is retained by the test split. "
                "Trust the lower figure, and judge by a larger test split"
            )
    return warnings


def _warn_of_weak_metrics(summary: Summary) -> list[str]:
    """Warn of metrics by which the dense pipeline itself is hardly ever right."""
    warnings = []
    for name, quality in summary.baseline.quality.items():
        accuracy = 1 - quality.value if quality.is_error_rate else quality.value
        if accuracy >= MIN_DENSE_ACCURACY:
            continue
        left_out = ", and it is left out of what is retained" if accuracy <= 0 else ""
        warnings.append(
            f"{name}: the dense pipeline itself is right only {max(accuracy, 0):.1%} of the time. "
            f"This says little of what was lost{left_out}; "
            "'agreement' with the dense pipeline may say more (metrics)"
        )
    return warnings


def _warn_of_chance(summary: Summary) -> list[str]:
    """Warn of a dense pipeline that only guesses."""
    if not summary.is_dense_at_chance:
        return []
    figures = ", ".join(
        f"{metric} {quality.value:.1%} of {quality.n}"
        for metric, quality in summary.baseline.quality.items()
    )
    return [
        f"the dense pipeline does no better than guessing here ({figures}). What is retained of it "
        "says nothing: take models that know such data, or more test pairs"
    ]


def _warn_of_uninformative_answers(summary: Summary) -> list[str]:
    """Warn where many dense answers are empty or equal: metrics then say little of what is lost."""
    warnings = []
    for name, counts in summary.dense_answers.items():
        empty_share = counts.empty / max(counts.inputs, 1)
        if empty_share < NOTABLE_EMPTY_SHARE and counts.uninformative_share < NOTABLE_EQUAL_SHARE:
            continue
        text = f"{name}: of the dense pipeline, {counts.describe()}"
        if counts.is_uninformative:
            text += (
                ": nearly any pipeline would agree with that, so its quality is undetermined; "
                "look at the model, its processor and the data before anything else"
            )
        warnings.append(text)
    return warnings


def _warn_of_collapsed_answers(summary: Summary) -> list[str]:
    """Warn where the compressed answers are empty or equal, and the dense ones are not."""
    warnings = []
    for name, counts in summary.compressed_answers.items():
        dense = summary.dense_answers.get(name)
        if counts.is_uninformative and dense is not None and not dense.is_uninformative:
            warnings.append(
                f"{name}: of the compressed pipeline, {counts.describe()}: its answers hardly "
                "depend on the input any more, whatever the metrics say. A milder target keeps more"
            )
    return warnings


def _warn_of_long_inputs(summary: Summary) -> list[str]:
    """Tell the error rates on inputs that are heard in several windows."""
    sides = summary.extra_splits.get(LONG_INPUTS, {})
    warnings = []
    for name, dense in sides.get("baseline", {}).items():
        compressed = sides["compressed"][name]
        warnings.append(
            f"{dense.n} test inputs are longer than the window and are heard in pieces: "
            f"{name} on them is {dense.value:.1%} before and {compressed.value:.1%} after"
        )
    return warnings


def _warn_of_emptied_nodes(summary: Summary) -> list[str]:
    """Warn of a model that lost every block through which it reads its input: the spec asked so."""
    emptied: list[str] = []
    for node, blocks in summary.blocks.items():
        kept = summary.kept_units.get(node, {})
        readers = list_input_readers(blocks)
        if readers and all(kept.get(name) == 0 for name in readers):
            emptied.append(node)
    if not emptied:
        return []
    return [
        f"every block through which {', '.join(emptied)} reads its input was dropped, as the spec "
        "says. Its answers hardly depend on the input, whatever the metrics say: keep one of them"
    ]


def _warn_of_steep_cut(summary: Summary) -> list[str]:
    """Warn of much that was cut in one step, where that did harm."""
    steep = []
    for (node_name, kind), share in _list_cuts_by_kind(summary).items():
        if share > STEEP_CUT_SHARE:
            steep.append(f"{share:.0%} of the {kind} units of {node_name}")
    schedule = summary.settings.get("prune", {}).get("schedule")
    if not steep or schedule != "one_shot" or not _was_cut_harmful(summary):
        return []
    return [
        f"{', '.join(steep)} were cut in one step{_describe_losses(summary)}; "
        "more training (distill.minutes, or --effort best) may keep more"
    ]


def _warn_of_touched_bounds(summary: Summary) -> list[str]:
    """Warn of a search space that may be too narrow, where quality was lost."""
    if not summary.touched_bounds or not _was_cut_harmful(summary):
        return []
    bounds = ", ".join(summary.touched_bounds)
    return [
        f"the structure reaches the end of the search space at {bounds}; "
        "a wider space (--space) may keep more"
    ]


def _list_cuts_by_kind(summary: Summary) -> dict[tuple[str, str], float]:
    """Return the share of units cut, by node and unit kind."""
    shares: dict[tuple[str, str], float] = {}
    for node_name, blocks in summary.blocks.items():
        kept = {node_name: summary.kept_units[node_name]}
        for kind in dict.fromkeys(block.kind for block in blocks):
            blocks_of_kind = {node_name: [block for block in blocks if block.kind == kind]}
            share = measure_removed_share(kept, blocks_of_kind, cross={}, crossing=False)
            if share is not None:
                shares[node_name, kind] = share
    return shares


def _was_cut_harmful(summary: Summary) -> bool:
    """Return whether the cut raised the loss notably; True where it was not measured."""
    losses = summary.validation_losses
    return len(losses) < 2 or losses[1] > HARMFUL_CUT_RATIO * losses[0]


def _describe_losses(summary: Summary) -> str:
    """Return the losses before the cut, after it and after training, in words, if measured."""
    losses = summary.validation_losses
    if len(losses) < 2:
        return ""
    text = f": the loss on validation pairs went from {losses[0]:.3f} to {losses[1]:.3f}"
    if len(losses) > 2:
        text += f", after training it was {losses[-1]:.3f}"
    return text


def _warn_of_slow_zeros(summary: Summary) -> list[str]:
    """Warn of zeros within layers: they bring no speed."""
    warnings = []
    for name, node in summary.compressed.nodes.items():
        if node.sparsity > NOTABLE_SPARSITY:
            warnings.append(
                f"{name}: {node.sparsity:.0%} of the weights of its blocks are zero; "
                f"it takes {node.latency_ms_p50:.2f} ms. "
                "ONNX Runtime multiplies zeros like other numbers, so this brings no speed"
            )
    return warnings


def _warn_of_nodes_no_faster(summary: Summary) -> list[str]:
    """Warn of nodes that are smaller or of another precision, yet take as long as before."""
    warnings = []
    for name, node in summary.compressed.nodes.items():
        dense = summary.baseline.nodes[name]
        is_faster = node.latency_ms_p50 <= UNCHANGED_LATENCY_SHARE * dense.latency_ms_p50
        is_smaller = node.params < SMALLER_PARAMS_SHARE * dense.params
        if not is_faster and (node.precision != "fp32" or is_smaller):
            warnings.append(
                f"{name}: {node.precision}, {node.params / dense.params:.0%} of its parameters, "
                "yet no faster on this machine"
            )
    return warnings


def _warn_of_time_outside_models(summary: Summary) -> list[str]:
    """Warn where much of a request is spent outside the models."""
    if summary.baseline.model_share >= MIN_MODEL_SHARE:
        return []
    return [
        f"only {summary.baseline.model_share:.0%} of the dense request is spent inside models; "
        "compressing them can't shorten the rest"
    ]


def _warn_of_wrong_prediction(summary: Summary) -> list[str]:
    """Warn where the last prediction missed the measurement."""
    if not summary.attempts:
        return []
    last = summary.attempts[-1]
    if abs(last.predicted_ms / last.measured_ms - 1) <= MAX_PREDICTION_ERROR:
        return []
    return [
        "predicted and measured latency differ by more than 10 %: the device table may be stale "
        "or the machine busy. A new --out with an empty table cache (MMCOMPRESS_CACHE) measures "
        "the device anew"
    ]


def _warn_of_cross_modal_cut(summary: Summary) -> list[str]:
    """Warn where layers that join modalities lost more than the others."""
    ratio = summary.cross_modal_ratio
    if ratio is None or ratio <= summary.unimodal_ratio + 1e-6:
        return []
    ratios = f"{ratio:.0%} against {summary.unimodal_ratio:.0%} of the units"
    return [f"cross-modal layers were pruned more than the others ({ratios})"]


def _warn_of_unused_target(summary: Summary) -> list[str]:
    """Warn of an artifact that is faster than asked for, with the reason."""
    if not summary.target.met or compute_corrected_target_share(summary) >= MIN_USED_TARGET_SHARE:
        return []
    if summary.aimed_share < MIN_USED_TARGET_SHARE:
        reason = (
            "that is less than asked, since the search found no slower structure that loses less"
        )
    else:
        reason = (
            "more was cut than needed, and another round may use the rest (search.max_artifacts)"
        )
    return [f"the pipeline takes {compute_target_share(summary):.1%} of its target: {reason}"]


def _warn_of_uncertain_latency(summary: Summary) -> list[str]:
    """Warn where the ratio of both latencies is still uncertain at the end of the measuring."""
    margin = summary.latency_margin
    if margin <= WANTED_LATENCY_MARGIN:
        return []
    share = compute_target_share(summary)
    text = (
        f"the ratio of both latencies may be off by {margin:.1%} (95 % interval over "
        f"the loads of {summary.bench_repeats} parts; {WANTED_LATENCY_MARGIN:.1%} is wanted). The "
        "machine was busy or changed its speed"
    )
    if abs(share - 1) <= margin:
        verdict = "met" if summary.target.met else "missed"
        text += f". The target is {verdict} by less than that ({share:.1%} of it)"
    return [text]


def _warn_of_predicted_latency(summary: Summary) -> list[str]:
    """Warn where the latency is predicted for another device and was not measured there."""
    if summary.compressed.latency_ms.n > 0:
        return []
    return [
        "the latency of the compressed pipeline is predicted for "
        f"{summary.cpu.get('name')}, not measured there: run `mmcompress device check KIT BUNDLE` "
        "on it, then `mmcompress report RUN --measured FILE` here"
    ]


def _explain_miss(summary: Summary) -> str:
    """Return what was exceeded, what stands in the way, and what could be reached."""
    target = summary.target
    nodes = summary.compressed.nodes
    text = f"{'; '.join(target.describe_misses())}: the target is not met"
    if any(bound.is_latency for bound in target.exceeded_bounds):
        name = max(nodes, key=lambda node_name: nodes[node_name].latency_ms_p50)
        text += (
            f". The bottleneck is '{name}' ({nodes[name].latency_ms_p50:.2f} ms). The lowest "
            f"latency this search space can reach is predicted at {target.floor_ms:.2f} ms. "
            f"Of it {target.fixed_ms:.2f} ms can't be pruned: pre-processing, the decode loop, "
            f"embeddings and heads of the models{_describe_fixed_part(target)}"
        )
    else:
        name = max(nodes, key=lambda node_name: nodes[node_name].params)
        text += (
            f". The largest model is '{name}' ({nodes[name].params / 1e6:.2f} M parameters, "
            f"{nodes[name].size_mb:.1f} MB)"
        )
    for lowest_bound in target.lowest_reachable:
        if any(lowest_bound.limits_same_thing(bound) for bound in target.exceeded_bounds):
            text += (
                f". The least {lowest_bound.name} of this search space is predicted at "
                f"{lowest_bound.value:.2f} {lowest_bound.unit}"
            )
    return text


def _describe_fixed_part(target: Target) -> str:
    """Return what each node has of the fixed part, the largest first, if it is known."""
    if not target.fixed_ms_by_node:
        return ""
    parts = sorted(target.fixed_ms_by_node.items(), key=lambda part: -part[1])
    texts = [f"{node_name} {ms:.2f} ms" for node_name, ms in parts]
    return f" (by node: {', '.join(texts)})"
