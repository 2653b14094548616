"""One process works on a run at a storage URL at a time: it holds a lease, and renews it.

Storages have no locks. So who comes second watches the lease for a while. One that is renewed is
held; any other is that of a process that died. No clocks are compared. No torch.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mmcompress.errors import DataError
from mmcompress.workspace.process_owner import describe_owner, is_owner_alive
from mmcompress.workspace.run_storage import RunStorage

LEASE_FILE = "lease.json"
"""Name of the lease in the storage."""

RENEWAL_SECONDS = 10.0
"""Seconds between two renewals."""

LEASE_SECONDS = 45.0
"""Seconds without a renewal after which a lease counts as left behind."""

LOOK_SECONDS = 2.0
"""Seconds between two looks at the lease of another process."""

SETTLE_SECONDS = 1.0
"""Seconds after which a lease that was taken is read again: of two that took it at once, the later
one has it."""

TellUser = Callable[[str], None]
"""Receives a message for a person."""


class Lease:
    """The right to work on a run at a storage URL.

    Args:
        storage: The storage.
        tell: Receives that another process is watched, or that the lease was lost.
        on_lost: Called once, from another thread, when another process has taken the lease.
    """

    def __init__(self, storage: RunStorage, *, tell: TellUser, on_lost: Callable[[], None]):
        self.storage = storage
        self.is_lost = False
        self._tell_user = tell
        self._on_lost = on_lost
        self._owner = uuid.uuid4().hex
        self._renewals = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")

    def take(self) -> None:
        """Take the lease, and renew it from now on.

        Raises:
            DataError: Another process holds it, or the storage gives no answer.
        """
        held = self.storage.read_json(LEASE_FILE)
        if held is not None:
            is_local = held.get("host") == os.uname().nodename
            if not is_local or is_owner_alive(held):
                self._require_left_behind(held)
        self._write()
        time.sleep(SETTLE_SECONDS)
        if not self._is_ours():
            raise DataError(f"{self.storage.url}: another process began to work on this run")
        self._thread.start()

    def release(self) -> None:
        """Give the lease back. Where the storage is away, it runs out by itself."""
        self._is_over.set()
        self._thread.join()
        if not self.is_lost:
            with suppress(DataError):
                self.storage.remove(LEASE_FILE)

    def _require_left_behind(self, held: dict[str, Any]) -> None:
        """Watch the lease of another process; raise `DataError` when that renews it."""
        owner = describe_owner(held)
        self._tell_user(
            f"{owner} began to work on this run: watching for {LEASE_SECONDS:.0f} s whether it is "
            "still there"
        )
        give_up_at = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < give_up_at:
            time.sleep(LOOK_SECONDS)
            now = self.storage.read_json(LEASE_FILE)
            if now is None:
                return
            if now != held:
                raise DataError(
                    f"{self.storage.url}: {owner} is working on this run: wait for its end or stop "
                    "it, or choose another --out"
                )

    def _write(self) -> None:
        """Write the lease."""
        self._renewals += 1
        content = {
            "owner": self._owner,
            "renewals": self._renewals,
            "pid": os.getpid(),
            "host": os.uname().nodename,
        }
        self.storage.write_json(LEASE_FILE, content)

    def _is_ours(self) -> bool:
        """Return whether the lease in the storage is this one."""
        held = self.storage.read_json(LEASE_FILE)
        return held is not None and held.get("owner") == self._owner

    def _keep(self) -> None:
        """Renew the lease until it is given back, or lost."""
        while not self._is_over.wait(RENEWAL_SECONDS):
            try:
                if not self._is_ours():
                    self.is_lost = True
                else:
                    self._write()
            except DataError:
                # The storage is away. Who takes the lease meanwhile is seen when it is back.
                continue
            if self.is_lost:
                self._tell_user(
                    f"another process works on the run at {self.storage.url} now: this one stops"
                )
                self._on_lost()
                return
