"""Learning rates and parameter groups."""

from __future__ import annotations

import pytest

from moe_dist.distributed.parameter_groups import parameter_groups
from moe_dist.distributed.schedule import LearningRateSchedule
from tests.distributed.tiny_moe import make_model


def test_linear_schedule() -> None:
    """Warm-up never starts at zero, and the decay would reach zero one step after the last."""
    schedule = LearningRateSchedule("linear", num_steps=10, warmup_steps=4)
    factors = [schedule.factor(step) for step in range(11)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx(1 / 6)
    assert factors[10] == 0.0


def test_constant_schedule() -> None:
    """Without warm-up or decay the factor is one throughout."""
    schedule = LearningRateSchedule("constant", num_steps=3)
    assert [schedule.factor(step) for step in range(3)] == [1.0, 1.0, 1.0]


def test_unknown_schedule() -> None:
    """The message lists what exists."""
    with pytest.raises(ValueError, match="linear, constant"):
        LearningRateSchedule("cosine", num_steps=3)  # type: ignore[arg-type]


def test_groups() -> None:
    """Biases, stacked ones too, and norms are not decayed; routed experts have their own rate."""
    model = make_model()
    groups = parameter_groups(
        model, learning_rate=1.0, weight_decay=0.1, expert_learning_rate_scale=3.0
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found["gated.experts.w_in"] == (3.0, 0.1)
    assert found["gated.experts.b_in"] == (3.0, 0.0)
    assert found["gated.shared.w_in"] == (1.0, 0.1)
    assert found["gated.router.gate.weight"] == (1.0, 0.1)
    assert found["norm.weight"] == (1.0, 0.0)
    assert found["head.bias"] == (1.0, 0.0)
    assert not any(name.startswith("frozen") for name in found)
    assert len(found) == sum(1 for p in model.parameters() if p.requires_grad)
