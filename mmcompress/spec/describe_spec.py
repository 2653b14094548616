"""The JSON Schema of a spec, for editors."""

from __future__ import annotations

from typing import Any

from mmcompress.registry import DATA_KINDS, METRICS, NODE_KINDS, Registry
from mmcompress.spec.schema import Spec
from mmcompress.storage import describe_record

NAMED_KINDS: dict[str, Registry] = {"Node": NODE_KINDS, "Data": DATA_KINDS, "Metric": METRICS}
"""Records whose key `kind` is a name in a registry."""


def describe_spec() -> dict[str, Any]:
    """Return the JSON Schema of a spec.

    An editor completes the names of kinds. They are examples and no closed list: plug-ins add more.
    """
    schema = describe_record(Spec)
    definitions = schema["$defs"]
    for record_name, registry in NAMED_KINDS.items():
        definitions[record_name]["properties"]["kind"]["examples"] = registry.list_names()
    # The loader takes the name of a metric alone.
    name_alone = {"type": "string", "examples": METRICS.list_names()}
    metrics = schema["properties"]["metrics"]
    metrics["items"] = {"anyOf": [name_alone, metrics["items"]]}
    return schema
