"""Keeps transformers from writing into the terminal while it loads a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Let transformers tell errors alone in the block, without progress bars.

    It tells of layers that are not sharded, and of weights that are missing, at length. Which
    weights are missing, and whether that matters, is checked by those who load. The caller's own
    settings are back behind the block.
    """
    verbosity = logging.get_verbosity()
    shows_bars = logging.is_progress_bar_enabled()
    hides_hub_bars = are_progress_bars_disabled()
    logging.set_verbosity_error()
    if shows_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()
            if hides_hub_bars:
                # The line above switched those of the hub on, too.
                disable_progress_bars()
