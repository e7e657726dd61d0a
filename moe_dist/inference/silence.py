"""Keeps transformers' bars and hints out of the terminal while we load or save a model."""

from __future__ import annotations

import logging as python_logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Show no bars and no warnings of transformers inside the block, errors excepted.

    Nor of DeepSpeed, which it imports when it saves a model.

    What it warns of there is known: a classifier's head is new, a student's class is ours. What
    the user has set is put back afterwards.
    """
    from transformers.utils import logging

    deepspeed = python_logging.getLogger("DeepSpeed")
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if has_bars:
        logging.disable_progress_bar()

    def is_error(record: python_logging.LogRecord) -> bool:
        return record.levelno >= python_logging.ERROR

    # Its level is set anew by its import.
    deepspeed.addFilter(is_error)
    try:
        yield
    finally:
        deepspeed.removeFilter(is_error)
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
