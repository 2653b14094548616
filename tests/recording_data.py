"""A dataset that notes what is read of it."""

from __future__ import annotations


class RecordingData:
    """A dataset that notes what is loaded from it, among other events."""

    def __init__(self, data, events):
        self.splits = data.splits
        self.modality = data.modality
        self._data = data
        self.events = events

    def load(self, split, count=None, *, seed=0):
        self.events.append((split, count, seed))
        return self._data.load(split, count, seed=seed)
