"""Options of a node that several kinds have: one record each."""

from __future__ import annotations

from mmcompress.spec.node_options import NodeOption

MAX_TOKENS = NodeOption(
    about=(
        "Tokens of the longest text, written or read. 0 stands for a text encoder's own length, and"
        " for a generator's `max_new_tokens` or `max_length`: of its checkpoint, else 20 new ones."
    ),
    default=0,
    minimum=0,
    maximum=4096,
)
"""The option `max_tokens` of every kind that reads or writes texts."""
