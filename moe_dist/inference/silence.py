"""Keeps transformers' bars and hints out of the terminal while we load or save a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Show no bars and no warnings of transformers inside the block, errors excepted.

    What it warns of there is known: a classifier's head is new, a student's class is ours. What
    the user has set is put back afterwards.
    """
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if has_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
