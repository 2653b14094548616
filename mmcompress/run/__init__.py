"""The order of the stages, and each stage.

This room can be called: `mmcompress.run(spec, out)` compresses a pipeline to one target. Python
puts the room under that name as soon as one of its modules is imported, in place of the function.
So the room passes the call on. It imports nothing before that: some of its modules need no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    """The module of this room; a call is a call of `mmcompress.run.run_targets.run`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Compress a pipeline to its one target: see `mmcompress.run.run_targets.run`."""
        return import_module("mmcompress.run.run_targets").run(*arguments, **options)


sys.modules[__name__].__class__ = _CallableRoom
