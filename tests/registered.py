"""Entries of a registry that are gone after a test."""

from __future__ import annotations

from contextlib import contextmanager


@contextmanager
def keep_entries(*registries):
    """Put back, at the end of the block, what stood in some registries at its beginning."""
    earlier = [dict(registry._entries) for registry in registries]
    try:
        yield
    finally:
        for registry, entries in zip(registries, earlier, strict=True):
            registry._entries.clear()
            registry._entries.update(entries)
