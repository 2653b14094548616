"""Addresses of servers, as a log or a message may show them."""

from __future__ import annotations

import re

PASSWORD = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/@\s]+@", re.IGNORECASE)
"""What stands between scheme and host of an address: a user, and often a password."""


def hide_password(text: str) -> str:
    """Return a text with `***` in place of users and passwords of addresses in it."""
    return PASSWORD.sub(r"\g<scheme>***@", text)
