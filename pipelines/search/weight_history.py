"""How a trial of a population came to its weights, in words and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..markdown import markdown_table

if TYPE_CHECKING:
    from moe_dist.search.trials import Trial


def took_over_weights(trial: Trial) -> bool:
    """Tell whether a trial took over the weights of another."""
    return len(trial.weight_history) > 1


def history_words(trial: Trial) -> str:
    """Say in which trials the weights were trained, for example `2, from step 40 on 5`."""
    return ", ".join(
        f"from step {segment.step} on {segment.trial}" if segment.step else f"{segment.trial}"
        for segment in trial.weight_history
    )


def changed_keys(trial: Trial) -> list[str]:
    """Find the paths of keys that changed while a trial's weights were trained."""
    paths = sorted({path for segment in trial.weight_history for path in segment.overrides})
    return [
        path
        for path in paths
        if any(
            segment.overrides.get(path) != trial.overrides.get(path)
            for segment in trial.weight_history
        )
    ]


def history_lines(best: Trial | None, is_population: bool) -> list[str]:
    """Lay the best trial's values over its steps, in Markdown; none but for a population."""
    if best is None or not is_population:
        return []
    keys = changed_keys(best)
    if not took_over_weights(best):
        return [f"Trial {best.number} kept its own weights and values from the first step on.", ""]
    names = [path.rpartition(".")[2] for path in keys]
    lines = [
        f"The weights of trial {best.number}, and the values that changed on their way (all others "
        "stayed; `best.yaml` holds the last ones):",
        "",
    ]
    rows = [
        [
            str(segment.step),
            str(segment.trial),
            *(_shown(segment.overrides.get(key)) for key in keys),
        ]
        for segment in best.weight_history
    ]
    return [*lines, *markdown_table(["from step", "in trial", *names], rows), ""]


def history_remarks(best: Trial) -> list[str]:
    """Say in the best trial's recipe what a recipe cannot hold; none where it kept its values."""
    keys = changed_keys(best)
    if not keys:
        return []
    lines = ["Its values changed in flight, and this recipe holds the last of them from the first"]
    lines += ["step on: that is another training than the trial's, and may reach less."]
    for segment in best.weight_history:
        said = ", ".join(f"{key}={_shown(segment.overrides.get(key))}" for key in keys)
        lines.append(f"  from step {segment.step}: {said}")
    return lines


def _shown(value: object) -> str:
    if value is None:
        return "as in the recipe"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
