"""Compile the native operators of this machine before somebody waits for them."""

from __future__ import annotations

import logging

from moe_dist.inference.backends.native import load_operators

if __name__ == "__main__":
    # What cannot be compiled is said, and is no error: torch's own operators do the same.
    logging.basicConfig(format="%(message)s")
    load_operators()
