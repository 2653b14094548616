"""A kit: a folder that another device measures, so that a search for that device can run elsewhere.

`mmcompress device kit` writes it (`run/write_kit.py`), `mmcompress device measure` measures it
(`measure_kit.py`), and the figures are a `Readings` record (`readings.py`). `mmcompress device
check` measures a compressed bundle beside the dense one of the kit (`bundle_check.py`). The device
needs neither torch nor the models' libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.measure.cost_model.plan import Export, MeasurementPlan
from mmcompress.measure.latency.benchmark_in_subprocess import SavedRequest
from mmcompress.runtime.providers import CPU_PROVIDER
from mmcompress.storage import read_record

KIT_FILE = "kit.json"
"""Name of the record in a kit's folder."""


@dataclass(frozen=True, kw_only=True)
class Kit:
    """`kit.json`, the record of a kit.

    Beside it lies the dense bundle in `baseline/`. The same in other precisions, and smaller
    pipelines, lie in `rounded/`; the requests are `requests.npz`. Every node that was exported has
    a folder.
    """

    pipeline: str
    """Name of the pipeline."""
    threads: int
    """Threads that the device is to measure with."""
    warmup: int
    """Requests sent before a measurement, uncounted."""
    requests: int
    """Requests counted in a measurement."""
    plan: MeasurementPlan
    """What has to be known of the device."""
    exports: tuple[Export, ...]
    """The exported nodes whose sessions are timed."""
    provider: str = CPU_PROVIDER
    """What sessions run on."""
    batch: int = 1
    """Requests that are answered together."""
    texts: tuple[SavedRequest, ...] = ()
    """What the requests hold beside arrays, by input: one entry a request. A kit that an earlier
    version wrote of pictures or sounds has none."""


def open_kit(folder: Path) -> Kit:
    """Read the record of a kit.

    Raises:
        DataError: The folder is no kit, or its record is damaged.
    """
    if not (folder / KIT_FILE).is_file():
        raise DataError(
            f"{folder}: not a kit: it holds no kit.json "
            "(mmcompress device kit SPEC --out FOLDER makes one)"
        )
    return read_record(Kit, folder / KIT_FILE)
