"""`python -m tests.chaos.command …` is `python -m pipelines …` whose distillation is watched."""

from __future__ import annotations


def main() -> None:
    from moe_dist.jobs import distill
    from pipelines.cli import main as run
    from tests.chaos.job import WatchedDistillJob

    distill.DistillJob = WatchedDistillJob  # type: ignore[misc]
    run()


if __name__ == "__main__":
    main()
