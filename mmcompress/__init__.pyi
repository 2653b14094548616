# The public names with their types: `__init__.py` imports them when they are used.
from mmcompress.errors import MmcompressError as MmcompressError
from mmcompress.graph.load_spec import load_spec as load_spec
from mmcompress.report.page import write_report as write_report
from mmcompress.run.load_modules import load_modules as load_modules
from mmcompress.run.profile import profile_pipeline as profile
from mmcompress.run.run_targets import run as run
from mmcompress.run.run_targets import run_targets as run_targets
from mmcompress.runtime.graph import load_bundle as load_bundle
from mmcompress.version import __version__ as __version__
from mmcompress.workspace.context import open_run as open_run
from mmcompress.workspace.load_summary import load_summary as load_summary

__all__ = [
    "MmcompressError",
    "__version__",
    "load_bundle",
    "load_modules",
    "load_spec",
    "load_summary",
    "open_run",
    "profile",
    "run",
    "run_targets",
    "write_report",
]
