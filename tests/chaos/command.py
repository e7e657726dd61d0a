"""`python -m tests.chaos.command …` is `python -m pipelines …` whose distillation is watched."""

from __future__ import annotations

import os
from functools import partial

DIRECTORY_VARIABLE = "MDT_CHAOS_DIRECTORY"


def main() -> None:
    from moe_dist.jobs import jobs
    from pipelines.cli import main as run
    from tests.chaos.job import watched_distill_job

    jobs.distill_job = partial(watched_distill_job, os.environ[DIRECTORY_VARIABLE])  # type: ignore[assignment]
    run()


if __name__ == "__main__":
    main()
