"""URLs of storages that weights and data may lie at."""

from __future__ import annotations

REMOTE_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}
"""The package that reads a storage, by the scheme of its URLs."""


def is_remote(text: str) -> bool:
    """Return whether a text is a storage URL."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme in REMOTE_PACKAGES
