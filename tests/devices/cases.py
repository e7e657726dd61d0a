"""What runs on an accelerator: every router, objective, family and kind of task, and whole jobs.

A case makes its parts on the CPU and brings them to a device; what it returns is run there once,
and if its answer has a graph, differentiated.
"""

from __future__ import annotations

from functools import partial

from tests.devices.job_cases import adversary_case, job_case, step_case
from tests.devices.layer_cases import layer_cases
from tests.devices.model_cases import MODELS_OF_KINDS, family_case, kind_case, objective_case
from tests.devices.prepared import PRECISIONS, Case


def all_cases() -> dict[str, Case]:
    """Name every case."""
    from moe_dist.training.objectives import OBJECTIVES
    from tests.conversion.dense_models import EVERY_FAMILY

    found = layer_cases()
    for precision in PRECISIONS:
        for objective in (*OBJECTIVES, "router"):
            found[f"objective {objective}, {precision}"] = partial(
                objective_case, objective, precision
            )
        for family in EVERY_FAMILY:
            found[f"family {family}, {precision}"] = partial(
                family_case, family, "token_gate", precision
            )
        for kind in MODELS_OF_KINDS:
            found[f"kind of task {kind}, {precision}"] = partial(kind_case, kind, precision)
        found[f"two steps, {precision}"] = partial(step_case, precision)
    for regularizer in ("spectral", "r1"):
        found[f"adversary {regularizer}"] = partial(adversary_case, regularizer)
    for name, precision in (
        ("predict", ", bf16"),
        ("score-importance", ""),
        ("expert-scores", ""),
        ("fit-outputs", ""),
    ):
        found[f"job {name}{precision}"] = partial(job_case, name)
    return found
