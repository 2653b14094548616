"""The error tree. Everything that a caller may want to catch derives from `MmcompressError`.

A command that ends with one of them has this exit code:

    MmcompressError
    ├── SpecError        the YAML says something that can't be            exit code 2
    ├── DataError        an input file or dataset is missing or odd       exit code 2
    │   └── DiskFull     a file can't be written                          exit code 2
    ├── ModelError       weights or a model that can't be used            exit code 2
    ├── BundleError      a bundle that is damaged, altered or too new     exit code 2
    ├── MissingPackage   an optional package is not installed             exit code 2
    ├── ClusterError     a cluster, a job server or a worker is gone      exit code 2
    ├── TrackingError    a server that keeps results does not answer      exit code 2
    ├── TargetNotMet     the best artifact was written, but is too slow   exit code 3
    ├── QualityUndetermined  the dense answers are empty or alike         exit code 3
    ├── LimitUndetermined    what a limit is about can't be measured      exit code 3
    ├── QualityNotRetained   less of the dense quality is kept than asked exit code 3
    ├── SplitSealed      a choice was about to see the test split         exit code 1
    ├── RunDamaged       a run folder is damaged; nothing was changed     exit code 1
    └── ProofFailed      an artifact does not compute what it should      exit code 1
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

CHECKOUT_FILE = Path(__file__).parent.parent / "pyproject.toml"
"""A file that is there where the package runs from a checkout."""


class MmcompressError(Exception):
    """An error that a person sees in one message, without a traceback."""

    exit_code = 1
    """Exit code of the command that ends with this error."""


class SpecError(MmcompressError):
    """A spec or a search space says something that can't be."""

    exit_code = 2


class DataError(MmcompressError):
    """An input file, a dataset or a run folder is missing, damaged or odd."""

    exit_code = 2


class DiskFull(DataError):
    """A file can't be written: the disk is full, or has become read-only."""


class ModelError(MmcompressError):
    """A model can't be used: weights are missing, or its layout is unknown."""

    exit_code = 2


class BundleError(MmcompressError):
    """A bundle is damaged, altered, or written by a newer version."""

    exit_code = 2


class MissingPackage(MmcompressError):
    """An optional package is needed."""

    exit_code = 2

    def __init__(self, package: str, extra: str):
        """Make the error.

        Args:
            package: The package that could not be imported.
            extra: The extra of this project that brings it.
        """
        super().__init__(package, extra)

    def __str__(self) -> str:
        package, extra = self.args
        install = f"pip install 'mmcompress[{extra}]'"
        if CHECKOUT_FILE.exists():
            install = f"pip install -e '.[{extra}]' in the checkout of mmcompress"
        return f"the package '{package}' is needed here: {install}"


class MissingProvider(MmcompressError):
    """An execution provider of ONNX Runtime is not installed, or finds no device here."""

    exit_code = 2


class PluginWarning(UserWarning):
    """A plug-in of an installed package can't be imported; everything else is usable."""


class ClusterError(MmcompressError):
    """A Ray cluster, a job server or a worker is gone."""

    exit_code = 2


class JobLost(ClusterError):
    """The job server was lost while a job ran: nobody knows whether it still does."""

    exit_code = 1


class TrackingError(MmcompressError):
    """A server that keeps the results of runs refuses, or can't be reached."""

    exit_code = 2


class TargetNotMet(MmcompressError):
    """The best artifact was written, but it misses the target or a limit."""

    exit_code = 3


class RegressionFound(MmcompressError):
    """A run is slower or worse than another one, by more than is allowed."""

    exit_code = 3


class QualityUndetermined(MmcompressError):
    """The artifact was written, but the dense answers are empty or alike: nothing can be judged."""

    exit_code = 3


class QualityNotRetained(MmcompressError):
    """The artifact was written, but it keeps less of the dense quality than `limits.retained`."""

    exit_code = 3


class LimitUndetermined(MmcompressError):
    """The artifact was written, but what a limit is about could not be measured."""

    exit_code = 3


class SplitSealed(MmcompressError):
    """Something that trains or chooses was about to load a split that only judges."""

    exit_code = 1


class RunDamaged(MmcompressError):
    """A run folder holds damaged files, or what a killed process left."""

    exit_code = 1


class ProofFailed(MmcompressError):
    """An artifact does not compute what it should."""

    exit_code = 1


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
"""Numbers of errors that say that a disk can't be written, whatever is written to it."""

FULL_DISK_CURE = "make room there and give the same command again, a run with --resume"
"""What a person can do about a disk that is full."""


def find_disk_error(error: BaseException, path: object = "") -> DiskFull | None:
    """Return the message for a person if an error says that a disk can't be written, else None.

    Args:
        error: Any error.
        path: What was written; by default the file that the error names.
    """
    if not isinstance(error, OSError) or error.errno not in DISK_ERRORS:
        return None
    return make_disk_error(error.errno, path or error.filename or "a file")


def make_disk_error(number: int, path: object) -> DiskFull:
    """Make the error for a disk that can't be written.

    Args:
        number: Number of the system's error.
        path: What was written.
    """
    return DiskFull(f"{path}: can't be written: {os.strerror(number)}; {FULL_DISK_CURE}")


MAX_QUOTED_LETTERS = 100
"""Letters of a user's own text that a message repeats at most, so that it stays readable."""


def shorten(value: object) -> str:
    """Return what a user wrote as a message repeats it: a long text is cut in the middle."""
    text = str(value)
    if len(text) <= MAX_QUOTED_LETTERS:
        return text
    half_length = MAX_QUOTED_LETTERS // 2
    return f"{text[:half_length]}…{text[-half_length:]} ({len(text):,} letters)"


def suggest_nearest(name: str, choices: Iterable[object]) -> str:
    """Return the tail of an error message: the nearest of the known names, then all of them."""
    names = sorted(str(choice) for choice in choices)
    # nobody means a known name by a text of this length, and the search would take long
    close_names: list[str] = []
    if len(name) <= MAX_QUOTED_LETTERS:
        close_names = difflib.get_close_matches(name, names, 1)
    known = f"known: {', '.join(names)}"
    return f"did you mean '{close_names[0]}'? ({known})" if close_names else known
