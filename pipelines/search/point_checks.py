"""Whether a proposed point can be trained: it is a sound recipe, suits the model, and is new."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from moe_dist.config import RunConfig
from moe_dist.config.checks import find_cross_faults
from moe_dist.config.search_checks import point_settings
from moe_dist.config.search_space import Point, value_of
from moe_dist.errors import ConversionError

from ..chain.fingerprints import value_digest
from ..checks.sizes import plan_skeleton, start_skeleton

if TYPE_CHECKING:
    from moe_dist.search.trials import TrialLog

    from ..chain.workspace import Workspace


class PointChecks:
    """Tells whether a point is worth a trial.

    How many neurons a layer has is known by the model alone, so a recipe can be sound and still ask
    for more experts than its layers can fill. Such points are drawn again, as are those that were
    tried: a trial of the same settings and seed would come out the same.

    Args:
        workspace: finds the start model.
        log: trials that there are already.
    """

    def __init__(self, workspace: Workspace, log: TrialLog) -> None:
        self._workspace, self._config = workspace, workspace.config
        self._seen = {self._key(trial.overrides) for trial in log.trials.values()}
        if self._config.search.baseline:
            self._seen.add(self._key({}))
        self.num_refused = 0

    def __call__(self, point: Point) -> bool:
        """Look at a point; one that passes counts as tried from now on."""
        key = self._key(point.overrides)
        if key in self._seen:
            return False
        config = RunConfig.model_validate(point_settings(self._config, point.overrides))
        if find_cross_faults(config) or not self._suits_model(config):
            self._seen.add(key)
            self.num_refused += 1
            return False
        self._seen.add(key)
        return True

    def ran_out(self, num_tried: int, num_trials: int) -> str:
        """Say, with a remedy, that the space has no further point."""
        refused = (
            f"; {self.num_refused} others are no sound recipe, or ask for more neurons than the "
            "model's layers have"
            if self.num_refused
            else ""
        )
        return (
            f"search.space has no further point for search.num_trials={num_trials}: {num_tried} "
            f"fit{refused}. Widen it, or ask for fewer trials."
        )

    @cached_property
    def _skeleton(self) -> Any:
        return start_skeleton(self._workspace, self._workspace.splits.task.num_labels)

    def _suits_model(self, config: RunConfig) -> bool:
        try:
            plan_skeleton(self._skeleton, config)
        except ConversionError:
            return False
        return True

    def _key(self, overrides: dict[str, Any]) -> str:
        """Digest what a point changes; keys at the recipe's own value change nothing."""
        changed = {
            path: list(value) if isinstance(value, tuple) else value
            for path, value in overrides.items()
            if value != value_of(self._config, path)
        }
        return value_digest(changed)
