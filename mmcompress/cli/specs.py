"""Commands that look at a spec: validate, profile, list."""

from __future__ import annotations

from dataclasses import replace

import click
from rich.markup import escape
from rich.table import Table

from mmcompress.cli.shared import Progress, out, parse_settings
from mmcompress.errors import MissingPackage, ModelError, SpecError
from mmcompress.spec.schema import Spec


@click.command()
@click.argument("spec", type=click.Path())
@click.option(
    "--space", type=click.Path(), help="Search space (default: search_spaces/joint.yaml)."
)
@click.option("--set", "sets", multiple=True, metavar="A.B=C", help="Override any key of the spec.")
def validate(spec: str, space: str | None, sets: tuple[str, ...]) -> None:
    """Check a spec, its graph and the search space, that sources and data are there; says what each node reads."""
    from mmcompress.graph.load_spec import load_spec
    from mmcompress.graph.modality import propagate_modalities
    from mmcompress.graph.references import topological_order
    from mmcompress.spec.loader import list_given_keys
    from mmcompress.spec.space import load_space
    from mmcompress.workspace.context import default_space

    loaded = load_spec(spec, parse_settings(sets))
    load_space(space or default_space(), loaded, fixed=list_given_keys(spec, parse_settings(sets)))
    tags, table = (
        propagate_modalities(loaded),
        Table("node", "kind", "reads", "modalities", box=None),
    )
    for name in topological_order(loaded):
        node = loaded.nodes[name]
        reads = ", ".join(f"{p}: {r}" for p, r in node.inputs.items())
        table.add_row(name, node.kind, reads, "+".join(sorted(tags[name])))
    out.print(table)
    try:
        few, looked = _present(loaded)
    except (MissingPackage, ImportError) as e:
        few, looked = "", f" (weights and data were not looked at: {e})"
    if few:
        out.print(f"[yellow]{escape(few)}[/yellow]")
    out.print(f"[green]{escape(spec)} is valid[/green]{escape(looked)}", soft_wrap=True)


def _present(spec: Spec) -> tuple[str, str]:
    """(what there is too little of, what was not looked at); no weights are read and no hub is asked.

    Raises `ModelError` or `DataError` for what is not there.
    """
    from mmcompress.models.sources import locate_node_source
    from mmcompress.workspace.context import describe_shortage, open_data

    hub = []
    for n, node in spec.model_nodes().items():
        for at, one in ((n, node), (f"{n}.rewind", replace(node, source=node.rewind)))[
            : 1 + bool(node.rewind)
        ]:
            try:
                location = locate_node_source(one)
            except ModelError as e:
                raise ModelError(f"nodes.{at}: {e}") from e
            hub += [at] if location.folder is None and location.library != "python" else []
    return describe_shortage(
        spec, open_data(spec)
    ), f" (not looked up at a hub: {', '.join(hub)})" if hub else ""


@click.command()
@click.argument("spec", type=click.Path())
@click.option(
    "--out",
    "folder",
    type=click.Path(),
    default=None,
    help="Where to keep it (default: runs/NAME-profile).",
)
@click.option("--resume", is_flag=True, help="Go on with the profile in the folder.")
@click.option("--set", "sets", multiple=True, metavar="A.B=C", help="Override any key of the spec.")
def profile(spec: str, folder: str | None, resume: bool, sets: tuple[str, ...]) -> None:
    """Measure the dense pipeline: per node and block, with the modality of every layer."""
    from mmcompress.graph.load_spec import load_spec
    from mmcompress.run.predictor import build_predictor
    from mmcompress.run.profile import profile_pipeline
    from mmcompress.workspace.context import open_run

    at = folder or f"runs/{load_spec(spec, parse_settings(sets)).name}-profile"
    with Progress() as say:
        r = open_run(
            spec, at, overrides=parse_settings(sets), resume=resume or not folder, on_progress=say
        )
        dense = profile_pipeline(r)
        predict = build_predictor(r, dense)
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
    precisions = tuple(dict.fromkeys(p for by in predict.fits.values() for p in by))
    blocks = Table("block", "units", "parameters", *precisions, "share", "modality", box=None)
    rows = predict.table.index_rows()
    for n, placed in predict.deployed.items():
        for b in dense.blocks[n]:
            if b.group == "tokens":
                blocks.add_row(
                    f"{n}.{b.name}", str(b.units), "", *("" for _ in precisions), "", "unimodal"
                )
        for p in placed:
            m = reasons[(n, p.name)]
            ms = {
                x: predict.block_ms(n, p, units=p.units, precision=x, rows=rows)
                for x in predict.fits[n]
            }
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


@click.command("list")
@click.argument("what", required=False)
def list_(what: str | None) -> None:
    """List what a spec may name: models, importance, allocation, data, metrics, executors, samplers, precisions."""
    from mmcompress.errors import suggest_nearest
    from mmcompress.registry import PLUG_POINTS

    if what and what not in PLUG_POINTS:
        raise SpecError(f"list: unknown '{what}'; {suggest_nearest(what, PLUG_POINTS)}")
    for name in [what] if what else PLUG_POINTS:
        out.print(f"[bold]{name}[/bold]")
        for entry in PLUG_POINTS[name].names():
            out.print(f"  {entry:<28}{escape(PLUG_POINTS[name].about(entry))}")
