"""`python -m pipelines COMMAND` is the same program as `moe-dist COMMAND`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
