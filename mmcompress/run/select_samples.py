"""Chooses the inputs of the test split that a report shows, with what both sides wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mmcompress.graph.judged_nodes import COMPARED_EMBEDDINGS, FINAL_TEXTS, find_judged_nodes
from mmcompress.registry import INPUT_TYPES, resolve_entry
from mmcompress.results.records import Sample, ShownInput
from mmcompress.run.answers import SplitAnswers
from mmcompress.runtime.input_types import InputType
from mmcompress.workspace.context import RunContext


def select_samples(
    run: RunContext, answers: Mapping[str, SplitAnswers], *, split: str
) -> tuple[Sample, ...]:
    """Return a few inputs of a split with the texts of both sides, for the eye.

    Right answers that were lost stand first, then other changes. Where several generators write,
    the first one is shown, or the join that chooses among its texts. Without a generator the text
    is the one that a join finds for the input.

    Args:
        run: Its spec says how many are shown (`report.samples`).
        answers: The answers of both sides.
        split: The name of the split.
    """
    asked = run.spec.report.samples
    count = 0 if asked == "none" else asked
    nodes = find_judged_nodes(run.spec, FINAL_TEXTS)
    nodes = nodes or find_judged_nodes(run.spec, COMPARED_EMBEDDINGS)
    pairs = run.data.load(split)
    samples: list[tuple[int, Sample]] = []
    for i, reference in enumerate(pairs.texts):
        texts: dict[str, str] = {}
        for side, split_answers in answers.items():
            texts[side] = split_answers.texts[nodes[0]][i] if nodes else ""
        sample = Sample(
            reference=reference, baseline=texts["baseline"], compressed=texts["compressed"]
        )
        samples.append((i, sample))
    samples.sort(key=_get_rank)
    shown: list[Sample] = []
    for i, sample in samples[:count]:
        shown.append(replace(sample, shown=_show_input(run, pairs.inputs[i])))
    return tuple(shown)


def _get_rank(numbered: tuple[int, Sample]) -> tuple[int, int]:
    """Return what samples are sorted by."""
    number, sample = numbered
    return sample.rank, number


def _show_input(run: RunContext, value: object) -> ShownInput:
    """Return an input as a report shows it. One that can't be shown costs no result."""
    input_type: InputType = INPUT_TYPES.get(run.data.modality)
    if not input_type.show:
        return ShownInput()
    try:
        show = resolve_entry(input_type.show)
        shown: ShownInput = show(value)
    except Exception as error:
        run.on_progress("evaluate", f"an input is not shown in the report: {error}", None)
        return ShownInput()
    return shown
