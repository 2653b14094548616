"""The error tree. Everything a caller may want to catch derives from `MmcompressError`.

MmcompressError
├── SpecError        the YAML says something that can't be            exit code 2
├── DataError        an input file or dataset is missing or odd       exit code 2
├── ModelError       weights or a model that can't be used            exit code 2
├── BundleError      a bundle that is damaged, altered or too new     exit code 2
├── MissingPackage   an optional package is not installed             exit code 2
├── ClusterError     a cluster, a job server or a worker is gone      exit code 2
├── TargetNotMet     the best found was written, but is too slow      exit code 3
└── ProofFailed      an artifact does not compute what it should      exit code 1
"""

from __future__ import annotations

import difflib


class MmcompressError(Exception):
    exit_code = 1


class SpecError(MmcompressError):
    exit_code = 2


class DataError(MmcompressError):
    exit_code = 2


class ModelError(MmcompressError):
    exit_code = 2


class BundleError(MmcompressError):
    exit_code = 2


class MissingPackage(MmcompressError):
    """An optional package is needed. `extra` names the extra of this project that brings it."""

    exit_code = 2

    def __init__(self, package: str, extra: str):
        super().__init__(package, extra)

    def __str__(self) -> str:
        package, extra = self.args
        return f"the package '{package}' is needed here: pip install -e '.[{extra}]' in a checkout of mmcompress"


class ClusterError(MmcompressError):
    exit_code = 2


class TargetNotMet(MmcompressError):
    exit_code = 3


class ProofFailed(MmcompressError):
    exit_code = 1


def suggest_nearest(name: str, known: object) -> str:
    """A tail for an error message: the nearest of the known names, then all of them."""
    names = sorted(str(k) for k in known)  # type: ignore[attr-defined]
    close = difflib.get_close_matches(str(name), names, 1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}(known: {', '.join(names)})"
