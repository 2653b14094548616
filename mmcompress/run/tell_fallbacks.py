"""Tell which operators of a bundle a provider leaves to the processor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.providers import CPU_PROVIDER
from mmcompress.workspace.context import RunContext


def tell_fallbacks(run: RunContext, bundle: Path, *, stage: str) -> None:
    """Tell a person what the provider of a run can't run of a bundle.

    Args:
        run: The run.
        bundle: The bundle. It is loaded, unless sessions run on the processor.
        stage: The stage that tells it.

    Raises:
        BundleError: The provider can't load the bundle.
    """
    provider = run.spec.measure.provider
    if provider == CPU_PROVIDER or run.device_readings:
        return
    fallbacks = load_bundle(bundle, run.spec.measure.threads).list_fallbacks()
    for place, counts in fallbacks.items():
        run.on_progress(stage, describe_fallbacks(place, counts, provider=provider), None)


def describe_fallbacks(place: str, counts: Counter[str], *, provider: str) -> str:
    """Return what a provider can't run of a graph, in words.

    Args:
        place: The node and its graph.
        counts: Operators by type.
        provider: The provider, by the name that a spec uses.
    """
    operators = ", ".join(f"{operator} {count}" for operator, count in counts.most_common())
    return (
        f"{place}: {provider} can't run {counts.total()} operators, the processor does: {operators}"
    )
