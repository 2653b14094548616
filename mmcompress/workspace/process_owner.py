"""The process that holds a run, as a lock or a lease names it: `pid` and `host`."""

from __future__ import annotations

import os
from collections.abc import Mapping

Owner = Mapping[str, object]
"""What a lock or a lease says of its process; keys may be missing."""


def describe_owner(owner: Owner) -> str:
    """Return who holds a run, for a message."""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def is_owner_alive(owner: Owner) -> bool:
    """Return whether the process of an owner on this machine is still there."""
    try:
        os.kill(int(str(owner["pid"])), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True
