"""What a spec means where a search must come out the same every time."""

from __future__ import annotations

from dataclasses import replace

from mmcompress.spec.schema import Spec

UNBOUNDED_MINUTES = 100_000.0
"""`distill.minutes` that no training reaches."""


def leave_out_clocks(spec: Spec) -> Spec:
    """Return a spec under which nothing depends on how long something takes.

    Trainings have all of their steps, and no precision is chosen by timing it. A spec that is not
    deterministic stays as it is.
    """
    if not spec.search.deterministic:
        return spec
    distill = spec.distill
    if distill.minutes:
        distill = replace(distill, minutes=UNBOUNDED_MINUTES)
    compute = spec.compute
    if compute.precision == "auto":
        compute = replace(compute, precision="fp32")
    return replace(spec, distill=distill, compute=compute)
