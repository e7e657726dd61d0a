"""Fitted output weights against least squares over single tokens, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.conversion import dense_to_moe, output_fit, plan_partition
from moe_dist.conversion.families import find_slots
from moe_dist.conversion.importance import accepted_inputs
from moe_dist.conversion.output_fit import (
    RIDGE,
    TOKENS_PER_NEURON,
    fit_outputs,
    solve_definite,
)
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe.layer import MoELayer
from tests.conversion.dense_models import (
    NUM_NEURONS,
    model_inputs,
    random_scores,
    tiny_model,
    token_batch,
)


def student_of(
    model: Any, *, router: str = "hash_random", gate_scale: str = "straight_through", **changes: Any
) -> Any:
    sizes = {"num_experts": 2, "expert_size": 8, "num_shared_neurons": 4, "tie_shared": True}
    plan = plan_partition(random_scores(model), **(sizes | changes))
    return dense_to_moe(model, plan, router=router, gate_scale=gate_scale)


def batches_for(model: Any) -> list[dict[str, Tensor]]:
    batches = [token_batch(num_samples=16, length=9, seed=seed) for seed in (1, 2)]
    return [model_inputs(model, batch | {"labels": batch["input_ids"]}) for batch in batches]


def layers_of(student: Any) -> list[MoELayer]:
    return [layer for layer in student.modules() if isinstance(layer, MoELayer)]


class Seen:
    """What one dense FFN reads and gives, token by token."""

    def __init__(self, model: Any, index: int, batches: list[dict[str, Tensor]]) -> None:
        slot = find_slots(model)[index]
        rows: list[Tensor] = []
        outs: list[Tensor] = []
        real: list[Tensor] = []
        ids: list[Tensor] = []
        handles = [
            slot.linear_in.register_forward_pre_hook(lambda _, args: rows.append(args[0])),
            slot.linear_out.register_forward_hook(lambda _, __, out: outs.append(out)),
        ]
        with torch.no_grad():
            for batch in batches:
                model(**{key: value for key, value in batch.items() if key != "labels"})
                real.append(batch["attention_mask"].bool())
                ids.append(batch["input_ids"])
        for handle in handles:
            handle.remove()
        mask = torch.cat([one.flatten() for one in real])
        self.rows_TD = torch.cat([one.flatten(0, 1) for one in rows])[mask]
        self.outs_TD = torch.cat([one.flatten(0, 1) for one in outs])[mask]
        self.ids_T = torch.cat([one.flatten() for one in ids])[mask]


def objective(layer: MoELayer, before: MoELayer, seen: Seen, expert_T: Tensor) -> Tensor:
    """What the fit makes small, with its penalty, one token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    held = {name: torch.zeros((), dtype=torch.float64) for name in ("shared", "0", "1")}
    counts = {name: torch.zeros((), dtype=torch.float64) for name in held}
    for row, out, expert in zip(seen.rows_TD, seen.outs_TD, expert_T.tolist(), strict=True):
        count = 1 / (row + out).double().square().mean()
        found = layer.experts.b_out[expert].double()  # type: ignore[index]
        for name, experts, place in (
            ("shared", layer.shared, 0),
            (str(expert), layer.experts, expert),
        ):
            assert experts is not None and experts.w_in is not None and experts.b_in is not None
            assert experts.w_out is not None
            active = experts.activation(experts.w_in[place] @ row + experts.b_in[place]).double()
            found = found + experts.w_out[place].double() @ active
            held[name] = held[name] + count * active.square().mean()
        counts[str(expert)] = counts[str(expert)] + count
        total = total + count * (found - out.double()).square().sum()
    size = layer.experts.expert_size
    mass = counts["0"] + counts["1"]
    prior = TOKENS_PER_NEURON * size * mass / len(expert_T)
    usual = (held["0"] + held["1"]).detach() / mass
    for name, mean in held.items():
        new, old = (one.shared if name == "shared" else one.experts for one in (layer, before))
        place = 0 if name == "shared" else int(name)
        assert new is not None and old is not None
        moved = new.w_out[place].double() - old.w_out[place].double()  # type: ignore[index]
        weight = RIDGE * mean.detach() + (0 if name == "shared" else prior * usual)
        total = total + weight * moved.square().sum()
        if name != "shared":
            bias = new.b_out[place].double() - old.b_out[place].double()  # type: ignore[index]
            total = total + prior * bias.square().sum()
    return total


def test_the_fit_is_the_least_of_its_objective() -> None:
    model = tiny_model("bert")
    batches = batches_for(model)
    before, after = student_of(model), student_of(model)
    fit_outputs(after, model, [batches])
    old, new = layers_of(before)[-1], layers_of(after)[-1]
    seen = Seen(model, len(layers_of(after)) - 1, batches)
    router: Any = new.router
    expert_T = router.table[seen.ids_T]
    least = objective(new, old, seen, expert_T)
    assert least < 0.9 * objective(old, old, seen, expert_T)
    least.backward()
    assert new.shared is not None
    for weight in (new.experts.w_out, new.experts.b_out, new.shared.w_out):
        assert weight is not None and weight.grad is not None
        assert weight.grad.abs().max() < 1e-3 * least.detach(), "the gradient is zero there"


def first_block(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        outputs = model(**accepted_inputs(model, batch), output_hidden_states=True)
    states = getattr(outputs, "encoder_hidden_states", None) or outputs.hidden_states
    block: Tensor = states[1]
    return block


def test_an_expert_with_every_neuron_stays_as_it_is() -> None:
    model = tiny_model("bert")
    student = student_of(
        model, num_experts=1, expert_size=NUM_NEURONS, num_shared_neurons=0, tie_shared=False
    )
    old = {name: value.clone() for name, value in student.state_dict().items()}
    fit_outputs(student, model, [batches_for(model)])
    for name, value in student.state_dict().items():
        assert torch.equal(value, old[name]), name


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_layers_are_fitted_alike_with_little_room(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    at_once, one_by_one = student_of(model), student_of(model)
    fit_outputs(at_once, model, [batches_for(model)])
    monkeypatch.setattr(output_fit, "MAX_BYTES", 1)
    seen = []
    layers_of(one_by_one)[0].register_forward_hook(lambda *_: seen.append(1))
    fit_outputs(one_by_one, model, [batches_for(model)])
    assert len(seen) == len(layers_of(one_by_one)) * len(batches_for(model))
    for name, value in one_by_one.state_dict().items():
        assert torch.equal(value, at_once.state_dict()[name]), name


def test_products_of_a_batch_in_float32_leave_the_fit_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("bert")
    fast, slow = student_of(model), student_of(model)
    fit_outputs(fast, model, [batches_for(model)])
    monkeypatch.setattr(output_fit, "PRODUCT_DTYPE", torch.float64)
    fit_outputs(slow, model, [batches_for(model)])
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, slow.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_only_output_weights_of_experts_with_tokens_change() -> None:
    model = tiny_model("bert").train()
    student = student_of(model, tie_shared=False)
    for layer in layers_of(student):
        router: Any = layer.router
        router.table.zero_()
    old = {name: value.clone() for name, value in student.state_dict().items()}
    fit_outputs(student, model, [batches_for(model)])
    assert student.training and model.training
    for name, value in student.state_dict().items():
        if name.endswith(("w_out", "b_out")):
            assert not torch.equal(value[0], old[name][0])
            torch.testing.assert_close(value[1], old[name][1], rtol=0, atol=0)
        else:
            assert torch.equal(value, old[name]), name


def test_padding_says_nothing() -> None:
    model = tiny_model("bert")
    batch = token_batch(num_samples=16, length=9)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    padded = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in batch.items()}
    short, long = student_of(model), student_of(model)
    fit_outputs(short, model, [[batch]])
    fit_outputs(long, model, [[padded]])
    for name, value in short.state_dict().items():
        torch.testing.assert_close(value, long.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_several_experts_for_a_token_are_refused() -> None:
    model = tiny_model("bert")
    plan = plan_partition(random_scores(model), num_experts=4, expert_size=8, num_shared_neurons=0)
    student = dense_to_moe(model, plan, router="token_gate", top_k=2)
    with pytest.raises(ConversionError, match=r"set moe\.top_k to 1"):
        fit_outputs(student, model, [batches_for(model)])


def test_a_single_token_hardly_moves_its_expert() -> None:
    model = tiny_model("bert")
    student = student_of(model, tie_shared=False, expert_size=16, num_shared_neurons=0)
    batches = batches_for(model)
    rare = int(batches[0]["input_ids"][0, 0])
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == rare] = 0 if rare else 1
    batches[0]["input_ids"][0, 0] = rare
    for layer in layers_of(student):
        router: Any = layer.router
        router.table.zero_()
        router.table[rare] = 1
    old = {name: value.clone() for name, value in student.state_dict().items()}
    fit_outputs(student, model, [batches])
    for name, value in student.state_dict().items():
        if name.endswith("w_out"):
            moved = (value - old[name]).flatten(1).norm(dim=1)
            assert moved[1] < 0.5 * moved[0], name


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_tied_neurons_without_any_beside_them_are_fitted(family: str) -> None:
    model = tiny_model(family)
    student = student_of(model, num_shared_neurons=8)
    old = [layer.shared.w_out.clone() for layer in layers_of(student)]  # type: ignore[union-attr]
    fit_outputs(student, model, [batches_for(model)])
    for layer, before in zip(layers_of(student), old, strict=True):
        assert layer.shared is not None and layer.shared.w_out is not None
        assert not torch.allclose(layer.shared.w_out, before)


def test_without_batches_there_is_nothing_to_fit_on() -> None:
    model = tiny_model("bert")
    with pytest.raises(MissingInputError, match="no batches to fit"):
        fit_outputs(student_of(model), model, [[]])


def test_a_gate_s_own_weight_is_made_up_for_in_the_layers_that_were_converted() -> None:
    model = tiny_model("bert")
    student = student_of(model, router="token_gate", gate_scale="probability", layers=[0])
    (layer,) = layers_of(student)
    batch = batches_for(model)[0]
    real = batch["attention_mask"].bool()

    def missed() -> float:
        off = (first_block(student, batch) - first_block(model, batch))[real]
        return float(off.square().mean())

    first = missed()
    fit_outputs(student, model, [[batch]])
    assert missed() < 0.5 * first
    assert torch.isfinite(layer.experts.w_out).all()  # type: ignore[arg-type]


def test_a_teacher_that_is_not_finite_is_named() -> None:
    model = tiny_model("bert")
    student = student_of(model)
    with torch.no_grad():
        find_slots(model)[0].weights().w_out[0, 0] = float("nan")
    with pytest.raises(ConversionError, match="check the teacher"):
        fit_outputs(student, model, [batches_for(model)])


def test_large_systems_are_solved_with_several_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 400, 385, dtype=torch.float64, generator=generator)
    matrix = root.transpose(1, 2) @ root + torch.eye(385, dtype=torch.float64)
    wanted = torch.randn(4, 385, 32, dtype=torch.float64, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = solve_definite(matrix, matrix @ wanted)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, wanted)


def test_what_is_not_positive_definite_has_no_solution() -> None:
    matrix = torch.stack([torch.eye(3), -torch.eye(3)]).double()
    found = solve_definite(matrix, torch.ones(2, 3, 1, dtype=torch.float64))
    assert torch.equal(found[0], torch.ones(3, 1, dtype=torch.float64))
    assert found[1].isnan().all()


def test_merged_experts_are_not_fitted() -> None:
    model = tiny_model("bert")
    plan = plan_partition(random_scores(model), num_experts=2, expert_size=8, num_shared_neurons=0)
    student = dense_to_moe(model, plan, router="merged_task")
    with pytest.raises(ConversionError, match="merges its experts"):
        fit_outputs(student, model, [[token_batch()]])
