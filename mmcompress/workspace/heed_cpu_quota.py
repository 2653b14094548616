"""A container may use fewer processors than its machine has: threads are bounded by that."""

from __future__ import annotations

import torch

from mmcompress.runtime.machine import count_cores, read_cpu_quota
from mmcompress.runtime.progress import ProgressListener
from mmcompress.spec.schema import Spec


def heed_cpu_quota(spec: Spec, on_progress: ProgressListener) -> None:
    """Give torch no more threads than a container may use, and warn of a spec that asks for more.

    Without a container, nothing happens.

    Args:
        spec: It says how many threads the measured pipeline has.
        on_progress: Receives the warning.
    """
    quota = read_cpu_quota()
    if quota is None:
        return
    torch.set_num_threads(min(torch.get_num_threads(), count_cores()))
    if spec.measure.threads > quota:
        on_progress(
            "load",
            f"measure.threads: {spec.measure.threads}, and this container may use {quota:g} cores: "
            "the container stops the threads again and again, and latencies are those of a slower "
            "machine",
            None,
        )
