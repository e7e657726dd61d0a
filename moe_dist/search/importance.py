"""Which keys of a space matter: permutation importance in a forest fitted to the trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moe_dist.config.search_space import is_number
from moe_dist.search.trials import Trial

MIN_TRIALS = 8
NUM_TREES = 100
NUM_REPEATS = 20


def key_importance(trials: Sequence[Trial], metric: str, seed: int = 0) -> dict[str, float]:
    """Estimate how much each drawn key moves a measure.

    A random forest predicts the measure, less its mean over all trials at the same rung, from the
    point; a key's importance is how much of the prediction's R² is lost when its values are
    shuffled among the trials. Where a key was not drawn, that counts as a value of its own.

    Args:
        trials: any; those without the measure are left out.
        metric: the measure.
        seed: of forest and shuffles.

    Returns:
        Shares by path that add up to 1, the largest first; empty for fewer than `MIN_TRIALS`
        trials, or where the measure hardly changes.
    """
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    kept = [t for t in trials if t.drawn and not math.isnan(t.value(metric))]
    paths = sorted({path for trial in kept for path in trial.drawn})
    values = np.array(_beside_peers(kept, metric))
    if len(kept) < MIN_TRIALS or not paths or float(values.std()) == 0.0:
        return {}
    columns = [_column([trial.drawn.get(path) for trial in kept]) for path in paths]
    table = np.array(columns, dtype=np.float64).T
    forest = RandomForestRegressor(NUM_TREES, random_state=seed, min_samples_leaf=2)
    forest.fit(table, values)
    found = permutation_importance(
        forest, table, values, n_repeats=NUM_REPEATS, random_state=seed
    ).importances_mean
    positive = np.clip(found, 0.0, None)
    total = float(positive.sum())
    if total == 0.0:
        return {}
    shares = {path: float(share) / total for path, share in zip(paths, positive, strict=True)}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _beside_peers(trials: Sequence[Trial], metric: str) -> list[float]:
    """Give each trial's last value less the mean of all trials at that rung.

    Else a trial that was ended early would look bad for being short.
    """
    at_rung: dict[int, list[float]] = {}
    for trial in trials:
        for report in trial.reports:
            value = report.metrics.get(metric, math.nan)
            if not math.isnan(value):
                at_rung.setdefault(report.rung, []).append(value)
    means = {rung: sum(values) / len(values) for rung, values in at_rung.items()}
    return [trial.value(metric) - means[trial.reports[-1].rung] for trial in trials]


def _column(values: Sequence[Any]) -> list[float]:
    """Write a key's values as numbers: as they are, or as positions in an order of names."""
    present = [value for value in values if value is not None]
    if all(map(is_number, present)):
        # Trees cut anywhere: a key that was not drawn lies apart, below all others.
        apart = min(present) - max(1.0, max(present) - min(present))
        return [float(apart if value is None else value) for value in values]
    names = sorted({repr(value) for value in present})
    return [-1.0 if value is None else float(names.index(repr(value))) for value in values]
