"""Commands: arguments in, a function of another room, a table out. No logic here."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcompress import __version__
from mmcompress.errors import MmcompressError, SpecError, TargetNotMet

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Progress:
    """Stages as they pass: one live line on a terminal, one line every few seconds elsewhere."""

    def __init__(self) -> None:
        self.began, self.stage, self.last = time.monotonic(), "", 0.0
        self.live = err.is_terminal
        self.status = err.status("") if self.live else None

    def __call__(self, stage: str, what: str, share: float | None) -> None:
        now = time.monotonic()
        done = "" if share is None else f" {share:4.0%}"
        line = f"[dim]{now - self.began:5.0f} s[/dim]  [bold]{stage:<12}[/bold]{done}  {escape(what)}"
        fresh = stage != self.stage or share is None
        self.stage = stage
        if self.status:
            self.status.start()
            self.status.update(line)
            if share is None:
                err.print(line)
        elif fresh or now - self.last > 10:
            self.last = now
            err.print(line)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.status:
            self.status.stop()


class Group(click.Group):
    """Turns the project's errors into one line and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MmcompressError as e:
            err.print(f"[red]error:[/red] {escape(str(e))}", soft_wrap=True)
            ctx.exit(e.exit_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mmcompress")
def main() -> None:
    """Compress a multi-model multimodal pipeline to an end-to-end latency target."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def settings(pairs: tuple[str, ...], **named: Any) -> dict[str, Any]:
    """`--set a.b=c` and the options that stand for one."""
    found = {k.replace("__", "."): v for k, v in named.items() if v is not None}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise SpecError(f"--set {pair}: expected a.b=value")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise SpecError(f"--set {pair}: '{value}' is not a YAML value") from e
    return found


def run_options(f: Callable) -> Callable:
    for option in reversed(
        [
            click.option("--space", type=click.Path(), help="Search space (default: search_spaces/joint.yaml)."),
            click.option("--target", help="2x, 12ms or '12ms p95'; several with commas between them."),
            click.option("--trials", type=int, help="Trials of the search."),
            click.option("--workers", type=int, help="Trials at a time."),
            click.option("--ray-address", help="A Ray cluster: 'auto' or HOST:PORT (default: a local Ray)."),
            click.option("--device", type=click.Path(), help="Readings of another device: the target is for that one."),
            click.option("--seed", type=int, help="Seed of data, search and training."),
            click.option("--set", "sets", multiple=True, metavar="A.B=C", help="Override any key of the spec."),
        ]
    ):
        f = option(f)
    return f


def default_folder(spec: str, changes: dict[str, Any], kind: str = "") -> str:
    """`runs/NAME-TARGET-sSEED`, or with what else it holds in place of the seed."""
    from mmcompress.spec.loader import load

    loaded = load(spec, changes)
    return f"runs/{loaded.name}-{loaded.target.replace(' ', '')}-{kind or f's{loaded.seed}'}"


def overrides(
    target: Any, trials: Any, workers: Any, ray_address: Any, device: Any, seed: Any, sets: tuple[str, ...]
) -> dict[str, Any]:
    named = {"search__trials": trials, "search__workers": workers, "search__ray_address": ray_address}
    return settings(sets, target=target, measure__device=device, seed=seed, **named)


@main.command()
@click.argument("spec", type=click.Path())
@click.option("--set", "sets", multiple=True, metavar="A.B=C")
def validate(spec: str, sets: tuple[str, ...]) -> None:
    """Check a spec and its graph; says what each node reads."""
    from mmcompress.graph.modality import outputs
    from mmcompress.graph.topology import order
    from mmcompress.spec.loader import load

    loaded = load(spec, settings(sets))
    tags, table = outputs(loaded), Table("node", "kind", "reads", "modalities", box=None)
    for name in order(loaded):
        node = loaded.nodes[name]
        reads = ", ".join(f"{p}: {r}" for p, r in node.inputs.items())
        table.add_row(name, node.kind, reads, "+".join(sorted(tags[name])))
    out.print(table)
    out.print(f"[green]{escape(spec)} is valid[/green]")


@main.command()
@click.argument("spec", type=click.Path())
@click.option("--out", "folder", type=click.Path(), default=None, help="Where to keep it (default: runs/NAME-profile).")
@click.option("--resume", is_flag=True)
@click.option("--set", "sets", multiple=True, metavar="A.B=C")
def profile(spec: str, folder: str | None, resume: bool, sets: tuple[str, ...]) -> None:
    """Measure the dense pipeline: per node and block, with the modality of every layer."""
    from mmcompress import workflow

    with Progress() as say:
        r = workflow.open_run(
            spec, folder or f"runs/{Path(spec).stem}-profile", None, settings(sets), resume or not folder, say
        )
        dense = workflow.profile(r)
        predict = workflow.predictor(r, dense)
    total = dense.latency_ms.p50
    nodes = Table("node", "parameters", "MACs", "p50", "share", box=None)
    for n in dense.params:
        nodes.add_row(
            n,
            f"{dense.params[n] / 1e6:.2f} M",
            f"{dense.macs[n] / 1e6:.0f} M",
            f"{dense.nodes[n].p50:.2f} ms",
            f"{dense.nodes[n].p50 / total:.0%}",
        )
    out.print(nodes)
    out.print(
        f"end to end p50 {total:.2f} ms, p95 {dense.latency_ms.p95:.2f} ms, {dense.model_share:.0%} inside models\n"
    )
    reasons = {(m["node"], m["name"]): m for m in dense.modality}
    precisions = tuple(dict.fromkeys(p for by in predict.affine.values() for p in by))
    blocks = Table("block", "units", "parameters", *precisions, "share", "modality", box=None)
    rows = predict.table.lookup()
    for n, placed in predict.placed.items():
        for b in dense.blocks[n]:
            if b.group == "tokens":
                blocks.add_row(f"{n}.{b.name}", str(b.units), "", *("" for _ in precisions), "", "unimodal")
        for p in placed:
            m = reasons[(n, p.name)]
            ms = {x: a.scale * predict.block(rows, p, p.units, x) for x, a in predict.affine[n].items()}
            kind = f"[bold]cross-modal[/bold]: {m['reason']}" if m["cross_modal"] else "unimodal"
            blocks.add_row(
                f"{n}.{p.name}",
                str(p.units),
                f"{dense.block_params[n][p.name] / 1e3:.0f} k",
                *(f"{ms[x]:.3f} ms" if x in ms else "" for x in precisions),
                f"{ms['fp32'] / total:.1%}",
                kind,
            )
    for m in dense.modality:
        if m["name"] == "projection":
            blocks.add_row(
                f"{m['node']}.projection",
                "",
                "",
                *("" for _ in precisions),
                "",
                f"[bold]cross-modal[/bold]: {m['reason']}",
            )
    out.print(blocks)


@main.command()
@click.argument("spec", type=click.Path())
@run_options
@click.option("--out", "folder", type=click.Path(), default=None, help="Run folder (default: runs/NAME-TARGET-sSEED).")
@click.option("--resume", is_flag=True, help="Go on with the run in the folder; no finished trial is lost.")
def run(spec: str, space: str | None, folder: str | None, resume: bool, **options: Any) -> None:
    """Compress a pipeline to its target: profile, search, prune, distill, quantize, export, measure, report."""
    from mmcompress import workflow

    changes = overrides(**options)
    folder = folder or default_folder(spec, changes)
    with Progress() as say:
        found = workflow.run_targets(spec, folder, space, changes, resume, say)
    for s in found:
        at = Path(folder) if len(found) == 1 else Path(folder) / s.target.asked.replace(" ", "-")
        show_summary(s)
        out.print(f"\nreport  {escape(str(at / 'report.html'))}\nbundle  {escape(str(at / 'bundle'))}", soft_wrap=True)
    if len(found) > 1:
        out.print(f"front   {escape(str(Path(folder) / 'front.html'))}", soft_wrap=True)
    if missed := [s for s in found if not s.target.met]:
        raise TargetNotMet(
            "; ".join(f"{s.target.asked}: {', '.join(s.target.unmet)}" for s in missed) + "; the best found was written"
        )


def show_summary(s: Any) -> None:
    """The table a run ends with."""
    from mmcompress.report import quality

    table = Table("", "before", "after", box=None, title=f"{s.pipeline}, target {s.target.asked}")
    b, c = s.baseline, s.compressed
    for name in b.nodes:
        table.add_row(
            f"{name}, p50",
            f"{b.nodes[name].latency_ms_p50:.2f} ms",
            f"{c.nodes[name].latency_ms_p50:.2f} ms  ({c.nodes[name].precision})",
        )
    table.add_row("end to end, p50", f"{b.latency_ms.p50:.2f} ms", f"[bold]{c.latency_ms.p50:.2f} ms[/bold]")
    table.add_row("end to end, p95", f"{b.latency_ms.p95:.2f} ms", f"{c.latency_ms.p95:.2f} ms")
    for name, q in b.quality.items():
        table.add_row(name, quality(q), quality(c.quality[name]))
    table.add_row("parameters", f"{b.params / 1e6:.2f} M", f"{c.params / 1e6:.2f} M")
    table.add_row("bundle", f"{b.size_mb:.1f} MB", f"{c.size_mb:.1f} MB")
    out.print(table)
    verdict = "[green]target met[/green]" if s.target.met else "[red]target not met[/red]"
    verdict += "" if c.latency_ms.n else ", as predicted"
    cross = "" if s.cross_modal_ratio is None else f", cross-modal {s.cross_modal_ratio:.0%}"
    passed = sum(p.passed for p in s.proofs)
    out.print(
        f"[bold]{s.speedup:.2f}x[/bold], {verdict}; {s.quality_retained:.1%} of the quality retained; "
        f"pruned: unimodal {s.unimodal_ratio:.0%}{cross}; {passed} of {len(s.proofs)} proofs passed"
    )
    for w in s.warnings:
        out.print(f"[yellow]warning:[/yellow] {escape(w)}")


@main.command()
@click.argument("spec", type=click.Path())
@run_options
@click.option("--methods", help="Which, with commas between them (default: all).")
@click.option("--out", "folder", type=click.Path(), default=None, help="Folder (default: runs/NAME-TARGET-compare).")
@click.option("--resume", is_flag=True, help="Go on; methods that are done are kept.")
def compare(
    spec: str, methods: str | None, space: str | None, folder: str | None, resume: bool, **options: Any
) -> None:
    """The search beside other methods: same evidence, training budget and measured latency."""
    from mmcompress.report import percent, quality
    from mmcompress.workflow.compare import METHODS
    from mmcompress.workflow.compare import compare as run_all

    changes = overrides(**options)
    folder = folder or default_folder(spec, changes, "compare")
    wanted = tuple(m.strip() for m in methods.split(",")) if methods else tuple(METHODS)
    with Progress() as say:
        found = run_all(spec, folder, wanted, space, changes, resume, say)
    one = next(iter(found.values()))
    table = Table(
        "method", "speed-up", "retained", *one.baseline.quality, box=None, title=f"{one.pipeline} at {one.target.asked}"
    )
    table.add_row("dense", "1.00x", "100.0 %", *(quality(q) for q in one.baseline.quality.values()))
    for name, s in found.items():
        row = (f"{s.speedup:.2f}x", percent(s.quality_retained), *(quality(q) for q in s.compressed.quality.values()))
        table.add_row(name, *row)
    out.print(table)
    out.print(f"report  {escape(str(Path(folder) / 'compare.html'))}", soft_wrap=True)


@main.command()
@click.argument("spec", type=click.Path())
@run_options
@click.option("--tables", help="Which, with commas between them (default: all).")
@click.option("--out", "folder", type=click.Path(), default=None, help="Folder (default: runs/NAME-TARGET-ablation).")
@click.option("--resume", is_flag=True, help="Go on; cells that are done are kept.")
def ablate(spec: str, tables: str | None, space: str | None, folder: str | None, resume: bool, **options: Any) -> None:
    """What each part of the recipe brings: cells that differ in one thing, and a sentence for each claim."""
    from mmcompress.workflow.ablate import ablate as run_all

    changes = overrides(**options)
    folder = folder or default_folder(spec, changes, "ablation")
    wanted = tuple(t.strip() for t in tables.split(",")) if tables else ()
    with Progress() as say:
        run_all(spec, folder, space, changes, resume, say, wanted)
    for c in json.loads((Path(folder) / "claims.json").read_text()):
        points = f"{100 * c['gap']:+.1f} ± {100 * c['half']:.1f} points"
        out.print(f"{c['claim']}: [bold]{c['verdict']}[/bold] ({points})", soft_wrap=True)
    out.print(f"report  {escape(str(Path(folder) / 'ablation.html'))}", soft_wrap=True)


@main.group()
def device() -> None:
    """Search for a device that is not this machine: make a kit here, measure it there, search here or on a cluster."""


@device.command()
@click.argument("spec", type=click.Path())
@click.option("--out", "folder", required=True, type=click.Path(), help="Folder of the kit, to be carried over.")
@click.option("--space", type=click.Path(), help="Search space (default: search_spaces/joint.yaml).")
@click.option("--set", "sets", multiple=True, metavar="A.B=C")
def kit(spec: str, folder: str, space: str | None, sets: tuple[str, ...]) -> None:
    """Write what a device needs to measure this pipeline: dense bundle, requests, whole exports."""
    import tempfile

    from mmcompress import workflow

    with Progress() as say, tempfile.TemporaryDirectory() as scratch:
        r = workflow.open_run(spec, Path(scratch) / "run", space, settings(sets), False, say)
        workflow.write_kit(r, Path(folder))
    out.print(f"{folder}: on the device, run\n  mmcompress device measure {folder} --out readings.json", soft_wrap=True)


@device.command()
@click.argument("kit", type=click.Path())
@click.option("--out", "file", required=True, type=click.Path(), help="The readings (JSON).")
def measure(kit: str, file: str) -> None:
    """Measure a kit on this device; neither torch nor the models' libraries are needed."""
    from mmcompress.measure.readings import measure_kit, save

    with Progress() as say:
        found = measure_kit(Path(kit), lambda what, share: say("measure", what, share))
    save(found, Path(file))
    p50 = found.baseline.latency.p50
    out.print(
        f"{found.pipeline} on {found.cpu['name']}, {found.threads} threads: p50 {p50:.2f} ms\n{file}", soft_wrap=True
    )


@device.command()
@click.argument("kit", type=click.Path())
@click.argument("bundle", type=click.Path())
@click.option("--out", "file", required=True, type=click.Path(), help="The figures (JSON).")
def check(kit: str, bundle: str, file: str) -> None:
    """Measure a bundle beside the dense one of its kit on this device; `report --measured` takes the figures."""
    from mmcompress.measure.readings import check_bundle, save

    found = check_bundle(Path(kit), Path(bundle))
    save(found, Path(file))
    a, b = found.baseline.latency.p50, found.compressed.latency.p50
    out.print(f"p50 {a:.2f} -> {b:.2f} ms, [bold]{a / b:.2f}x[/bold]\n{file}", soft_wrap=True)


@main.command()
@click.argument("folder", type=click.Path())
@click.option("--measured", type=click.Path(), help="Figures of `device check`: they take the place of predicted ones.")
def report(folder: str, measured: str | None) -> None:
    """Write the report of a finished run again."""
    from mmcompress.measure.readings import Check
    from mmcompress.records import read, write
    from mmcompress.report import load_summary, write_report
    from mmcompress.report.assemble import remeasured
    from mmcompress.runtime.bundle import identity

    if measured:
        at = Path(folder)
        dense = next((p for p in (at / "baseline", at.parent / "baseline") if p.exists()), at)
        found = read(Check, Path(measured))
        write(at / "summary.json", remeasured(load_summary(at), found, identity(dense), identity(at / "bundle")))
    out.print(str(write_report(load_summary(folder), folder)), soft_wrap=True)


@main.command()
@click.argument("folder", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="The whole summary as JSON.")
def show(folder: str, as_json: bool) -> None:
    """Show the result of a finished run."""
    from mmcompress.records import plain
    from mmcompress.report import load_summary

    summary = load_summary(folder)
    if as_json:
        click.echo(json.dumps(plain(summary), indent=1))
    else:
        show_summary(summary)


@main.command()
@click.argument("bundle", type=click.Path())
@click.option("--input", "inputs", multiple=True, metavar="NAME=FILE", required=True)
@click.option("--threads", type=int)
def predict(bundle: str, inputs: tuple[str, ...], threads: int | None) -> None:
    """Run a bundle on one request; prints its outputs as JSON."""
    from mmcompress.runtime import load

    request = {}
    for pair in inputs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SpecError(f"--input {pair}: expected name=file, e.g. image=photo.png")
        request[name] = value
    found = load(bundle, threads)(**request)
    click.echo(json.dumps({k: v.tolist() if hasattr(v, "tolist") else v for k, v in found.items()}))


@main.command()
@click.argument("bundle", type=click.Path())
@click.option("--against", type=click.Path(), help="A second bundle, measured interleaved.")
@click.option("--input", "inputs", multiple=True, metavar="NAME=FILE", help="Requests (default: a grey test card).")
@click.option("--rounds", type=click.IntRange(2), default=200, show_default=True)
@click.option("--threads", type=int)
def bench(bundle: str, against: str | None, inputs: tuple[str, ...], rounds: int, threads: int | None) -> None:
    """Measure a bundle end to end, alone or against another."""
    import numpy as np

    from mmcompress.measure.latency import end_to_end
    from mmcompress.runtime import load

    names = {"bundle": bundle, **({"against": against} if against else {})}
    pipelines = {k: load(v, threads) for k, v in names.items()}
    first = next(iter(pipelines.values()))
    requests: list[dict[str, Any]] = [{k: v} for k, _, v in (p.partition("=") for p in inputs)]
    if not requests:
        card = np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)
        requests = [{next(iter(first.inputs)): card}]
    found = end_to_end(pipelines, requests, 10, rounds)
    table = Table("", "p50", "p95", "IQR", "n", "inside models", box=None)
    for key, m in found.items():
        table.add_row(
            escape(names[key]),
            f"{m.latency.p50:.2f} ms",
            f"{m.latency.p95:.2f} ms",
            f"{m.latency.spread:.2f} ms",
            str(m.latency.n),
            f"{m.model_share:.0%}",
        )
        for node, latency in m.nodes.items():
            table.add_row(f"  {node}", f"{latency.p50:.2f} ms", f"{latency.p95:.2f} ms")
    out.print(table)
    if against:
        ratio = found["against"].latency.p50 / found["bundle"].latency.p50
        out.print(f"[bold]{ratio:.2f}x[/bold] as fast as {escape(against)}")


@main.command("list")
@click.argument("what", required=False)
def list_(what: str | None) -> None:
    """List what a spec may name: models, importance, allocation, metrics, data, executors."""
    from mmcompress.registry import ALL, nearest

    short = {w.split()[-1] if w != "model family" else "models": r for w, r in ALL.items()}
    short |= {"data": ALL["data kind"], "metrics": ALL["metric"], "executors": ALL["executor"]}
    short |= {"samplers": ALL["sampler"]}
    short |= {"precisions": ALL["precision"]}
    short = {k: v for k, v in short.items() if k not in ("kind", "metric", "executor", "sampler", "precision")}
    if what and what not in short:
        raise SpecError(f"list: unknown '{what}'; {nearest(what, short)}")
    for name in [what] if what else short:
        out.print(f"[bold]{name}[/bold]")
        for entry in short[name].names():
            out.print(f"  {entry:<28}{escape(short[name].about(entry))}")


@main.command()
@click.argument("spec", type=click.Path())
@click.option("--address", required=True, metavar="http://HOST:8265", help="The cluster's job server.")
@click.option("--out", "folder", required=True, type=click.Path(), help="Run folder, on storage the cluster sees.")
@click.option("--resume", is_flag=True)
@run_options
def submit(spec: str, address: str, folder: str, resume: bool, space: str | None, **options: Any) -> None:
    """Run the same command as a job on a Ray cluster; follows its log until it ends."""
    from mmcompress.search.jobs import submit_run
    from mmcompress.spec.loader import document, load
    from mmcompress.workflow import default_space

    changes = overrides(**options) | {"search.ray_address": "auto"}
    echo = lambda text: click.echo(text, nl=False)
    load(spec, changes)
    code = submit_run(document(spec, changes), address, folder, space or default_space(), resume, echo)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
