"""Pages and charts: well-formed for every record, loading nothing, and saying what a run came to."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_summary import (
    make_bare_summary,
    make_block,
    make_missed_summary,
    make_quality,
    make_side,
    make_summary,
    make_trial,
)

from mmcompress.errors import DataError
from mmcompress.report.charts.comparison import draw_comparison
from mmcompress.report.charts.front import draw_front
from mmcompress.report.charts.node_bars import draw_node_bars
from mmcompress.report.charts.prediction import draw_prediction
from mmcompress.report.charts.quality_bars import draw_quality_bars
from mmcompress.report.charts.search_history import draw_search_history
from mmcompress.report.charts.structure_map import CELLS_PER_ROW, draw_structure_map
from mmcompress.report.charts.trials import draw_trials
from mmcompress.report.charts.vega import PAGE_WIDTH, SOFT_INK
from mmcompress.report.comparison_pages import write_ablation, write_comparison, write_front
from mmcompress.report.fill_templates import TEMPLATE_FOLDER
from mmcompress.report.formats import count_noun, format_count, format_percent, keep_together
from mmcompress.report.node_shares import list_node_shares
from mmcompress.report.page import write_report
from mmcompress.report.trial_rows import list_front_trials
from mmcompress.results.claims import ClaimResult
from mmcompress.results.records import PositionCut, Target
from mmcompress.run.warnings import _warn_of_wide_intervals
from mmcompress.stats import Latency, Quality
from mmcompress.storage import write_record
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary

REPORTS = Path(__file__).resolve().parents[1] / "reports"

VOID_TAGS = {"meta", "br", "link", "img", "hr", "input"}

CLAIMS = (
    ClaimResult(text="a > b", verdict="supported", difference=0.05, ci_half_width=0.01),
    ClaimResult(text="a > c", verdict="not supported", difference=-0.05, ci_half_width=0.01),
    ClaimResult(text="a > d", verdict="undecided at this n", difference=0.0, ci_half_width=0.1),
)


def read_chart(chart: str) -> ElementTree.Element:
    """Parse a chart; every number in it is finite, and it has a size."""
    root = ElementTree.fromstring(chart)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert width > 0 and height > 0 and root.attrib["aria-label"]
    for element in root.iter():
        for name in ("d", "transform", "x2", "y2"):
            assert not re.search("nan|infinity", element.attrib.get(name, ""), re.I), name
    return root


def list_texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter() if element.tag.endswith("text")]


def list_titles(root: ElementTree.Element) -> list[str]:
    """What is shown under the mouse, mark by mark."""
    return [element.text or "" for element in root.iter() if element.tag.endswith("title")]


def list_marks(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    """List the marks of a kind that describe themselves, as a screen reader calls the kind."""
    return [e for e in root.iter() if e.attrib.get("aria-roledescription") == kind]


def count_lines(root: ElementTree.Element) -> int:
    """Count the lines that trials are joined by."""
    return sum("mark-line" in element.attrib.get("class", "") for element in root.iter())


class TagBalance(HTMLParser):
    """Checks that every tag is closed by its own, and no attribute stands twice."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len({name for name, _ in attrs}), self.get_starttag_text()
        self.seen.append(tag)
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


def check_page(page) -> str:
    """Check that a page is well-formed, loads nothing and left no template behind."""
    html = page.read_text()
    balance = TagBalance()
    balance.feed(html)
    assert balance.open == []
    assert {"html", "title", "h1"} <= set(balance.seen)
    assert not {"script", "link", "iframe"} & set(balance.seen)
    # What it shows is inside: every source is a URL that holds its content.
    assert html.count("src=") == html.count('src="data:')
    assert "url(" not in html and "@import" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    markdown = page.with_suffix(".md").read_text()
    for text in (html, markdown):
        assert "{{" not in text and "{%" not in text and "None" not in text and "nan" not in text
    check_tables(markdown)
    for chart in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        read_chart(chart)
    return html


def check_tables(markdown: str) -> None:
    """Check that every row of a table has as many cells as the row above."""
    above = ""
    for line in markdown.splitlines():
        if above.startswith("|") and line.startswith("|"):
            assert line.count("|") == above.count("|"), line
        above = line


def make_equal_quality() -> Quality:
    return Quality(value=0.5, low=0.5, high=0.5, n=1)


# Axes.


@pytest.mark.parametrize("span", [1e-6, 0.12, 1.0, 99.0, 1e5])
def test_an_axis_has_ticks_in_order_and_not_too_many(span):
    root = read_chart(draw_prediction([1.7, 1.7 + span], [1.7, 1.7 + span]))
    labels = [e for e in root.iter() if e.attrib.get("class") == "mark-text role-axis-label"]
    for axis in labels:
        ticks = [float(text.text.replace(",", "")) for text in axis]
        assert 2 <= len(ticks) <= 13 and ticks == sorted(ticks)
    assert len(labels) == 2


def test_figures_are_written_for_people():
    assert [format_count(value) for value in (12, 1234, 1234567, 2.5e9)] == [
        "12",
        "1.23 k",
        "1.23 M",
        "2.50 G",
    ]
    assert format_percent(None) == "–" and format_percent(0.123) == "12.3 %"
    assert count_noun(1, "thread") == "1 thread" and count_noun(0, "trial") == "0 trials"
    assert keep_together("9.0 % (1.0 – 2.0)") == "9.0\u00a0% (1.0\u00a0–\u2060\u00a02.0)"


# Charts.


def test_the_bars_of_nodes_hold_every_node_and_the_target():
    texts = list_texts(read_chart(draw_node_bars(make_summary())))
    assert {"before", "after", "10.00 ms", "4.80 ms", "target 5.00 ms"} <= set(texts)
    assert {"vision", "captioner", "outside the nodes"} <= set(texts)


def test_the_bars_of_nodes_hold_a_target_that_is_slower_than_both_sides():
    target = Target(latency_ms=30.0, speedup=1 / 3, met=True, text="30ms")
    root = read_chart(draw_node_bars(make_summary(target=target)))
    [line] = [e for e in root.iter() if e.attrib.get("stroke-dasharray")]
    place = re.match(r"translate\(([\d.]+),", line.attrib["transform"])
    assert place is not None and 0 < float(place[1]) <= PAGE_WIDTH


def test_the_bars_of_nodes_take_sides_without_nodes_or_time():
    side = replace(make_side(0.0, precision="fp32"), nodes={})
    target = Target(latency_ms=0.0, speedup=1.0, met=True, text="1x")
    root = read_chart(draw_node_bars(make_summary(baseline=side, compressed=side, target=target)))
    assert list_texts(root).count("0.00 ms") >= 2


def test_the_map_of_a_structure_outlines_cross_modal_blocks_and_says_why():
    root = read_chart(draw_structure_map(make_summary()))
    assert list_titles(root) == [
        "vision.0.attention: 2 of 4 kept",
        "vision.0.ffn: 16 of 32 kept",
        "captioner.0.cross_attention: 4 of 4 kept (cross-modal: values meet: text and <image>)",
    ]
    assert len([e for e in root.iter() if e.attrib.get("stroke-width") == "2.5"]) == 1


def test_a_model_of_many_blocks_takes_several_rows_of_cells():
    blocks = tuple(make_block(f"{i}.attention", "attention", units=4) for i in range(48))
    root = read_chart(draw_structure_map(make_summary(blocks={"vision": blocks, "text": ()})))
    cells = list_marks(root, "rect mark")
    lefts = [float(re.match(r"M([-\d.]+),", cell.attrib["d"])[1]) for cell in cells]
    assert len(lefts) == 48 and len({round(left) for left in lefts}) == CELLS_PER_ROW
    assert max(lefts) < PAGE_WIDTH


def test_the_chosen_trial_is_ringed_once():
    root = read_chart(draw_trials(make_summary()))
    assert len([t for t in list_titles(root) if t.startswith("chosen: trial ")]) == 1
    colors = [circle.attrib["fill"] for circle in list_marks(root, "circle")]
    # The level switch is over the target.
    assert colors.count("#4c78a8") == 2 and colors.count(SOFT_INK) == 1


def test_trials_over_the_target_stand_back_and_the_front_is_a_line():
    trials = (
        make_trial(0, latency_ms=4.0, loss=0.4),
        make_trial(1, latency_ms=4.5, loss=0.5),  # beaten by the first
        make_trial(2, latency_ms=4.9, loss=0.2, origin="mutation"),
        make_trial(3, latency_ms=5.2, loss=0.1),  # the target is 5 ms
    )
    assert [trial.number for trial in list_front_trials(trials)] == [0, 2, 3]
    root = read_chart(draw_trials(make_summary(trials=trials)))
    colors = [circle.attrib["fill"] for circle in list_marks(root, "circle")]
    assert [colors.count(color) for color in ("#4c78a8", "#f58518", SOFT_INK)] == [2, 1, 1]
    assert count_lines(root) == 1


def test_the_history_tells_the_best_loss_within_the_target_so_far():
    trials = tuple(
        make_trial(i, latency_ms=ms, loss=loss)
        for i, (ms, loss) in enumerate([(4.0, 0.4), (5.2, 0.1), (4.9, 0.2), (4.8, math.inf)])
    )
    root = read_chart(draw_search_history(make_summary(trials=trials)))
    circles = list_marks(root, "circle")
    assert [circle.attrib["fill"] for circle in circles].count(SOFT_INK) == 1
    titles = list_titles(root)
    assert "trial 2: loss 0.200, 4.90 ms" in titles
    assert count_lines(root) == 1
    assert draw_search_history(make_summary(trials=trials[:2])) == ""


def test_what_each_node_gave_up_adds_up():
    summary = make_summary()
    shares = {share.node: share for share in list_node_shares(summary)}
    assert sum(share.dense_share for share in shares.values()) == pytest.approx(1)
    assert sum(share.saved_share for share in shares.values()) == pytest.approx(1)
    before = summary.baseline.nodes["captioner"].latency_ms_p50
    after = summary.compressed.nodes["captioner"].latency_ms_p50
    assert shares["captioner"].latency_ratio == pytest.approx(after / before)
    assert "int8 in place of fp32" in shares["captioner"].reason
    assert "cross-modal layers were spared (10% of their units, of others 50%)" in (
        shares["captioner"].reason
    )


def test_a_node_that_gave_up_positions_alone_says_so():
    summary = make_summary()
    before = summary.baseline.nodes["vision"]
    tokens = make_block("tokens", "tokens", units=64)
    cut = replace(
        summary,
        kept_units={"vision": {"tokens": 40}},
        blocks={"vision": (tokens,)},
        baseline=replace(summary.baseline, nodes={"vision": before}),
        compressed=replace(summary.compressed, nodes={"vision": before}),
    )
    assert list_node_shares(cut)[0].reason == "40 of 64 positions kept"
    whole = replace(cut, kept_units={"vision": {"tokens": 64}})
    assert list_node_shares(whole)[0].reason == "nothing"


def test_a_shorter_input_is_told_where_no_units_were_removed(tmp_path, capsys):
    """A pipeline of speech gains most by a shorter window, and no share of units shows it."""
    from mmcompress.cli.results_table import print_summary

    summary = make_summary(
        kept_units={"vision": {"tokens": 40}},
        blocks={"vision": (make_block("tokens", "tokens", units=64),)},
        unimodal_ratio=0.0,
        cross_modal_ratio=0.0,
    )
    assert summary.position_cuts == {"vision": PositionCut(kept=40, of=64)}
    page = write_report(summary, tmp_path)
    told = "The input of vision is shorter: 40 of 64 positions are kept"
    assert told in check_page(page)
    assert told in (tmp_path / "report.md").read_text(encoding="utf-8")
    print_summary(summary)
    assert "input of vision 38% shorter" in " ".join(capsys.readouterr().out.split())
    assert make_summary().position_cuts == {}


def test_wide_intervals_are_told_in_one_warning():
    quality = {
        "wer": Quality(value=0.12, low=0.08, high=0.17, n=35),
        "agreement": Quality(value=1.0, low=0.9, high=1.0, n=35),
    }
    summary = make_summary()
    wide = replace(summary, compressed=replace(summary.compressed, quality=quality))
    [warning] = _warn_of_wide_intervals(wide)
    assert warning.startswith(
        "wer, agreement: 95 % intervals are 9.0 to 10.0 points wide at n = 35"
    )


def test_markdown_tells_what_the_page_tells(tmp_path):
    summary = make_summary(latency_margin=0.02)
    page = write_report(summary, tmp_path)
    text = page.with_suffix(".md").read_text()
    assert f"| speedup, end to end | 1.00× | {summary.speedup:.2f}× ± 2.0 % |" in text
    for heading in ("Front of the search", "Why a layer counts as cross-modal", "Proofs"):
        assert f"## {heading}" in text
    for proof in summary.proofs:
        assert f"| {proof.name} | {proof.artifact} | {proof.node} |" in text
    assert summary.cpu["name"] in text and f"Seed {summary.seed}" in text


@pytest.mark.parametrize(
    "losses",
    [[0.3], [0.3, 0.3, 0.3], [0.0], [0.1, math.inf], [math.inf], [math.nan, 0.2]],
    ids=["one trial", "equal", "zero", "one infinite", "all infinite", "no number"],
)
def test_trials_are_drawn_whatever_their_losses_are(losses):
    trials = tuple(
        make_trial(i, latency_ms=5.0, loss=loss, origin="knapsack") for i, loss in enumerate(losses)
    )
    root = read_chart(draw_trials(make_summary(trials=trials)))
    assert len(list_marks(root, "circle")) == len(losses)


def test_no_trial_is_no_chart():
    assert draw_trials(make_summary(trials=())) == ""


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0, 2.1])
def test_bars_of_quality_stay_within_the_chart(value):
    quality = {"wer": make_quality(value, is_error_rate=True)}
    root = read_chart(draw_quality_bars(quality, quality))
    bars = list_marks(root, "bar")
    assert len(bars) == 2
    for bar in bars:
        width = re.search(r"h([\d.]+)v", bar.attrib["d"])
        assert width is not None and float(width[1]) <= PAGE_WIDTH
    assert "wer (less is better)" in list_texts(root)


def test_bars_of_quality_take_no_metric_and_no_interval():
    assert "r1" not in list_texts(read_chart(draw_quality_bars({}, {})))
    figure = {"r1": make_equal_quality()}
    assert "r1" in list_texts(read_chart(draw_quality_bars(figure, figure)))


@pytest.mark.parametrize(
    ("predicted_ms", "measured_ms"),
    [([5.0], [5.0]), ([5.0, 5.0], [5.0, 5.0]), ([0.0], [0.0]), ([1.0, 2.0], [1.1, 90.0])],
)
def test_predictions_are_drawn_to_one_scale(predicted_ms, measured_ms):
    chart = draw_prediction(predicted_ms, measured_ms)
    assert 'xmlns="http://www.w3.org/2000/svg"' in chart
    root = read_chart(chart)
    assert len(list_marks(root, "circle")) == len(predicted_ms)


def test_a_comparison_has_a_row_for_each_method_and_a_panel_for_each_metric():
    names = ("searched", "random", "a_method_with_a_name_that_no_chart_has_room_for_at_all")
    root = read_chart(draw_comparison({name: make_summary() for name in names}))
    texts = list_texts(root)
    assert {"dense 1.00×", "searched 2.08×", "caption_exact_match", "less is better"} <= set(texts)
    assert any(text.startswith("a_method") and text.endswith("…") for text in texts)
    assert len(list_marks(root, "circle")) == 4 * 2


@pytest.mark.parametrize("quality", [{}, {"r1": make_equal_quality()}], ids=["none", "equal"])
def test_a_comparison_takes_no_metric_and_equal_values(quality):
    side = replace(make_side(5.0, precision="fp32"), quality=quality)
    root = read_chart(draw_comparison({"one": make_summary(baseline=side, compressed=side)}))
    assert set(quality) <= set(list_texts(root))
    assert any(text.startswith("one") for text in list_texts(root))


def test_a_front_has_a_point_for_each_target():
    runs = {}
    for speedup in (1.05, 1.07, 1.1, 3.0):
        target = Target(latency_ms=10 / speedup, speedup=speedup, met=True, text=f"{speedup}x p95")
        runs[f"{speedup}"] = make_summary(target=target, speedup=speedup, quality_retained=1.02)
    root = read_chart(draw_front(runs))
    assert len(list_marks(root, "circle")) == 4
    # The names of near targets stand on two lines.
    names = [e for e in root.iter() if e.tag.endswith("text") and (e.text or "").endswith("p95")]
    heights = {e.attrib["transform"].partition(",")[2] for e in names}
    assert len(heights) == 2


@pytest.mark.parametrize("speedup", [0.8, 1.0])
def test_a_front_takes_a_result_that_is_no_faster(speedup):
    target = Target(latency_ms=10.0, speedup=1.0, met=False, text="1x")
    run = make_summary(target=target, speedup=speedup, quality_retained=0.0)
    root = read_chart(draw_front({"1x": run}))
    assert "1x" in list_texts(root) and len(list_marks(root, "circle")) == 1


# Pages.


def test_the_report_says_what_a_run_came_to(tmp_path):
    html = check_page(write_report(make_summary(), tmp_path / "run"))
    for fact in (
        "The target is met.",
        "measured end to end",
        "5.00 ms end to end (p50)",
        "97.0 %",
        "Cross-modal layers lost less than the others.",
        "3 trials in 12 s on 1 worker",
        "2 threads of Some CPU",
        "seed 7",
        "0123456789ab",
        "values meet: text and &lt;image&gt;",
        "&lt;cat&gt;",
        "passed",
        "1 warning</a>",
        "measured in 3 parts",
    ):
        assert fact in html, fact
    assert html.index("The target is met") < html.index("<h2>Before and after")
    assert html.index("What was removed") < html.index("<h2>Proofs") < html.index("How it was")


def test_the_report_of_a_missed_target_says_what_was_exceeded(tmp_path):
    page = write_report(make_missed_summary(), tmp_path)
    assert "The target is not met." in check_page(page)
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        assert "Exceeded: p95 end to end: 5.76 ms, asked for 1.00." in text
        assert "5.76 ms, measured end to end" in text


def test_the_report_of_a_predicted_latency_does_not_call_it_measured(tmp_path):
    predicted = replace(make_side(4.8, precision="int8"), latency_ms=Latency(p50=4.8, p95=5, n=0))
    html = check_page(write_report(make_summary(compressed=predicted), tmp_path))
    assert "as predicted for that device" in html and "not measured there yet" in html
    assert "measured end to end" not in html and "ms as measured" not in html


def test_the_report_of_empty_records_leaves_their_parts_out(tmp_path):
    html = check_page(write_report(make_bare_summary(), tmp_path))
    assert "The pipeline has no cross-modal layers." in html
    for absent in (
        "Prediction",
        "Warnings",
        "warnings",
        "Answers of both",
        "Why a layer",
        "commit",
    ):
        assert absent not in html, absent


def test_the_report_shows_optional_records_where_there_are_some(tmp_path):
    quality = {"wer": make_quality(0.3, is_error_rate=True)}
    search = replace(make_summary().search, split_losses=(0.4, 0.35), linearization_evaluations=9)
    summary = make_summary(
        extra_splits={"test_style": {"baseline": quality, "compressed": quality}},
        search=search,
        machine_speed_factor=0.9,
        peak_memory_mb=812.0,
    )
    html = check_page(write_report(summary, tmp_path))
    for fact in ("test_style", "0.400, 0.350", "9 structures", "&times; 0.900 = 86.4 %", "812 MB"):
        assert fact in html, fact


def test_every_sentence_of_a_template_has_at_most_25_words():
    for template in sorted(TEMPLATE_FOLDER.iterdir()):
        text = re.sub(r"<style>.*?</style>|<t[dhr][ >].*?\n", "", template.read_text(), flags=re.S)
        text = re.sub(r"\{%.*?%\}|\{#.*?#\}", " ", text, flags=re.S)
        text = re.sub(r"\{\{.*?\}\}", "X", text, flags=re.S)
        text = re.sub(r"<[^>]*>", " ", text)
        for sentence in re.split(r"[.]\s|\n", text):
            words = re.findall(r"\w+", sentence)
            assert sentence.startswith("|") or len(words) <= 25, (template.name, sentence)


def test_a_folder_of_several_runs_names_them(tmp_path):
    for name in ("2x", "3x"):
        write_record(RunFolder(path=tmp_path).get_subfolder(name).summary, make_summary())
    assert load_summary(tmp_path / "2x").pipeline == "made"
    with pytest.raises(DataError, match="several runs in it: 2x, 3x"):
        load_summary(tmp_path)
    with pytest.raises(DataError, match="there is no such folder"):
        load_summary(tmp_path / "4x")
    write_record(RunFolder(path=tmp_path / "5x").spec, {})
    with pytest.raises(DataError, match=r"not finished; `mmcompress watch .*5x` tells where it is"):
        load_summary(tmp_path / "5x")


def test_the_front_links_the_report_of_each_target(tmp_path):
    folder = RunFolder(path=tmp_path)
    page = write_front({"10x-p95": make_missed_summary(), "2x": make_summary()}, folder)
    html = check_page(page)
    assert page == folder.front_page
    assert html.index('href="2x/report.html"') < html.index('href="10x-p95/report.html"')
    assert '<td class="bad">no</td>' in html and '<td class="good">yes</td>' in html
    figures = json.loads(folder.front.read_text())
    assert list(figures) == ["2x", "10x-p95"]
    assert set(figures["2x"]) == {
        "speedup",
        "share_of_target",
        "latency_ms_p50",
        "met",
        "retained",
        "quality",
        "params",
        "size_mb",
    }
    assert figures["2x"]["share_of_target"] == pytest.approx(0.96)
    assert set(figures["2x"]["quality"]["wer"]) == {"value", "low", "high"}


@pytest.mark.parametrize("claims", [(), CLAIMS], ids=["no claim", "claims"])
def test_a_comparison_describes_its_methods_and_claims(tmp_path, claims):
    folder = RunFolder(path=tmp_path)
    summaries = {"searched": make_summary(), "random": make_missed_summary()}
    about = {"searched": "what the search found", "random": "as many <random> trials"}
    page = write_comparison(summaries, about, claims=claims, folder=folder)
    html = check_page(page)
    assert page == folder.comparison_page
    assert "as many &lt;random&gt; trials" in html
    assert ("undecided at this n" in html) == bool(claims) == ("Claims" in html)
    assert set(json.loads(folder.comparison.read_text())) == set(summaries)
    stored = json.loads(folder.claims.read_text())
    assert [claim["difference"] for claim in stored] == [claim.difference for claim in claims]


def test_an_ablation_has_a_section_for_each_table(tmp_path):
    folder = RunFolder(path=tmp_path)
    tables = {"order": {"a": make_summary()}, "precision": {"b": make_summary()}}
    page = write_ablation(tables, CLAIMS, folder=folder)
    html = check_page(page)
    assert page == folder.ablation_page
    assert "<h2>order</h2>" in html and "<h2>precision</h2>" in html
    assert "+5.0 ± 1.0 points" in html
    assert set(json.loads(folder.ablation.read_text())) == {"order", "precision"}


@pytest.mark.parametrize(("margin", "is_told"), [(0.5, True), (0.0, False)])
def test_a_target_that_is_met_or_missed_by_chance_is_told(tmp_path, capsys, margin, is_told):
    """Another measurement may end on its other side."""
    from mmcompress.cli.results_table import print_summary

    summary = make_summary(latency_margin=margin)
    assert summary.is_target_within_margin is is_told
    print_summary(summary)
    assert (
        "known to ± 50.0%, and lies that near" in " ".join(capsys.readouterr().out.split())
    ) is is_told
    write_report(summary, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("known to ± 50.0 % and lies that near" in page) is is_told
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert ("another measurement may end on its other side" in text) is is_told


def test_a_report_is_written_again_without_torch(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(REPORTS / "clip_captioner" / "2x" / "summary.json", folder)
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'ray', 'optuna'): sys.modules[name] = None\n"
        "from mmcompress.cli import main\n"
        f"main(['report', {str(folder)!r}])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    page = (folder / "report.html").read_text()
    assert "How the budget was split" in page and page.count("<svg") >= 5
    assert (folder / "report.md").stat().st_size > 5_000
