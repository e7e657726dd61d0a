"""From a micro-batch to named loss terms: where losses meet what routers recorded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.attention import record_attention
from moe_dist.conversion.heads import answered_kind
from moe_dist.conversion.hidden_states import hidden_stacks
from moe_dist.losses.router import (
    noisy_load,
    router_entropy,
    router_z_loss,
    token_entropy,
    token_weights,
    without_padding,
)
from moe_dist.losses.total import LossTerm
from moe_dist.moe.routing import LayerRouting, RoutingRecord, record_routing
from moe_dist.tasks import TaskKind
from moe_dist.training.collectives import gather_rows, num_ranks
from moe_dist.training.companion import Companion
from moe_dist.training.feature_maps import FeatureMaps
from moe_dist.training.objectives import (
    ModelOutputs,
    ObjectiveSettings,
    PairedOutputs,
    objective_terms,
    reads,
)
from moe_dist.training.parts import part
from moe_dist.training.teacher_answers import TeacherAnswers


@dataclass(frozen=True)
class GateSum:
    """What one gate gives real tokens, or the groups of them that share a merge, summed.

    Args:
        probability_E: each expert's probability; of merged experts its weight in the merges. With
            its graph.
        top_k: experts of each token or group.
        load_E: of merged experts how many merges each would be in, with its graph; else None.
    """

    probability_E: Tensor
    top_k: int
    load_E: Tensor | None = None


@dataclass(frozen=True)
class StepTerms:
    """What one micro-batch gives.

    Args:
        terms: loss terms by name, undivided and unweighted.
        tokens_per_expert: by layer what `expert_counts` gives, on the model's device.
        routing_sums: by layer what `routing_sums` gives.
        gate_sums: by layer with a gate, for the load-balancing loss, which needs the choices of
            the whole step (`moe_dist.training.balance`); empty where it is not asked for.
    """

    terms: dict[str, LossTerm]
    tokens_per_expert: dict[str, Tensor] = field(default_factory=dict)
    routing_sums: dict[str, Tensor] = field(default_factory=dict)
    gate_sums: dict[str, GateSum] = field(default_factory=dict)


def freeze(model: nn.Module) -> nn.Module:
    """Make a model a teacher, in place: no dropout, no gradients."""
    model.eval()
    return model.requires_grad_(False)


def finetune_terms(model: nn.Module, batch: Mapping[str, Tensor]) -> StepTerms:
    """Compute the loss term ``task`` of a micro-batch; labels are float for regression."""
    kind = answered_kind(model).finetuning
    with record_routing() as record:
        output = kind.run(model, batch)
    terms = {"task": _task_term(kind, kind.predictions(model, output, batch), batch)}
    return StepTerms(terms, expert_counts(record), routing_sums(record))


def distill_terms(
    student: nn.Module,
    teacher: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    objectives: Collection[str] = ("prediction_kl", "hidden_mse"),
    settings: ObjectiveSettings | None = None,
    companion: Companion | None = None,
    load_balancing: bool = False,
    z_loss: bool = False,
    entropy: bool = False,
    with_task: bool = True,
    answers: TeacherAnswers | None = None,
) -> StepTerms:
    """Compute the task loss and what pulls the student to the teacher.

    Hidden states and attention are asked for only where a loss reads them, and the teacher is not
    run where none does.

    Args:
        student: the model that learns.
        teacher: a frozen model (see `freeze`).
        batch: input_ids, attention_mask, labels (float for regression) and so on.
        objectives: names in `OBJECTIVES`.
        settings: what they share; by default all hidden states are compared one to one.
        companion: maps between unequal widths, and the discriminator; not needed by two models of
            one width that nobody plays against.
        load_balancing: keep what the load-balancing loss needs.
        z_loss: add the router z-loss.
        entropy: add the router's entropy.
        with_task: compute the task's loss; without it no labels are read.
        answers: what the teacher says of each sample, if that is known; it is not run then.

    Returns:
        Term ``task`` where it is asked for, one for each objective (``prediction_mse`` for
        ``prediction_kl`` in regression), and where asked for ``z_loss`` and ``router_entropy``.
    """
    kind = answered_kind(student)
    with record_routing() as record, part("student forward"):
        own = _outputs(student, kind, batch, objectives)
    terms = {"task": _task_term(kind, own.predictions, batch)} if with_task else {}
    if objectives:
        with torch.no_grad(), part("teacher forward"):
            if answers is None:
                target = _outputs(teacher, kind, batch, objectives)
            else:
                target = ModelOutputs(answers.of_batch(), (), ())
        paired = PairedOutputs(
            own,
            target,
            batch=batch,
            kind=kind,
            settings=settings or ObjectiveSettings(),
            companion=companion or Companion(FeatureMaps(1, 1)),
        )
        terms |= objective_terms(objectives, paired)
    terms |= _router_terms(record, kind, batch, z_loss=z_loss, entropy=entropy)
    gates = gate_sums(record) if load_balancing else {}
    return StepTerms(terms, expert_counts(record), routing_sums(record), gates)


def expert_counts(record: RoutingRecord) -> dict[str, Tensor]:
    """Count each expert's real tokens, (E,) float32 by layer, without a device sync.

    Of merged experts it is by gate: each expert's part of the merges, of which each counts 1.
    """
    counts: dict[str, Tensor] = {}
    for position, entry in enumerate(record.entries):
        routing = entry.routing
        parts_TK = torch.ones_like(routing.expert_ids, dtype=torch.float32)
        if _merges(entry):
            parts_TK = routing.expert_weights.detach().float()
        if entry.mask_T is not None:
            parts_TK = parts_TK * entry.mask_T.reshape(-1, 1)
        count_E = _by_expert(routing.expert_ids, parts_TK, entry.num_experts)
        name = _layer_name(entry, position)
        counts[name] = counts[name] + count_E if name in counts else count_E
    return counts


@torch.no_grad()
def routing_sums(record: RoutingRecord) -> dict[str, Tensor]:
    """Add up how undecided each layer's gate was and what its experts turned away, without a sync.

    By layer (4,) float32: the sum of the gate's entropy, the tokens it is over, the slots dropped,
    the slots they are among. Layers without gate and capacity are left out.
    """
    sums: dict[str, Tensor] = {}
    for position, entry in enumerate(record.entries):
        routing = entry.routing
        if routing.logits is None and routing.kept is None:
            continue
        real_T = torch.ones_like(routing.expert_ids[:, 0], dtype=torch.float32)
        if entry.mask_T is not None:
            real_T = real_T * entry.mask_T
        none = real_T.new_zeros(())
        entropy = num_gated = dropped = num_slots = none
        if routing.logits is not None:
            entropy, num_gated = (token_entropy(routing.logits) * real_T).sum(), real_T.sum()
        if routing.kept is not None:
            dropped = ((~routing.kept).sum(dim=1) * real_T).sum()
            num_slots = real_T.sum() * routing.kept.shape[1]
        total = torch.stack([entropy, num_gated, dropped, num_slots])
        name = _layer_name(entry, position)
        sums[name] = sums[name] + total if name in sums else total
    return sums


def gate_sums(record: RoutingRecord) -> dict[str, GateSum]:
    """Add up what the gates give each expert; layers without a gate are left out."""
    sums: dict[str, GateSum] = {}
    for position, entry in enumerate(record.entries):
        if entry.routing.logits is None:
            continue
        own = _merge_sum(entry) if _merges(entry) else _probability_sum(entry)
        name = _layer_name(entry, position)
        sums[name] = _added(sums[name], own) if name in sums else own
    return sums


def _probability_sum(entry: LayerRouting) -> GateSum:
    logits_TE, real_T = _real_tokens(entry)
    probability_TE = logits_TE.float().softmax(dim=-1)
    if real_T is not None:
        probability_TE = probability_TE * real_T[:, None]
    return GateSum(probability_TE.sum(dim=0), entry.routing.expert_ids.shape[1])


def _merge_sum(entry: LayerRouting) -> GateSum:
    """Sum the weights in the merges of groups, and how likely each expert is in one."""
    routing = entry.routing
    clean_GE, scores_GE, std_GE = routing.clean_logits, routing.logits, routing.noise_std
    assert clean_GE is not None and scores_GE is not None
    top_k = routing.expert_ids.shape[1]
    real_G1 = torch.ones_like(scores_GE[:, :1]) if entry.mask_T is None else entry.mask_T[:, None]
    weights_GK = routing.expert_weights.float() * real_G1
    if std_GE is None:
        load_E = _by_expert(
            routing.expert_ids, torch.ones_like(weights_GK) * real_G1, entry.num_experts
        )
    else:
        load_E = (noisy_load(clean_GE, scores_GE, std_GE, top_k) * real_G1).sum(dim=0)
    return GateSum(_by_expert(routing.expert_ids, weights_GK, entry.num_experts), top_k, load_E)


def _real_tokens(entry: LayerRouting) -> tuple[Tensor, Tensor | None]:
    """Give the logits of real tokens and None.

    On an accelerator those of all, padding's 0, and (T,) float32 which are real: how many there
    are the host does not know, and would have to wait for.
    """
    logits_TE, mask_T = entry.routing.logits, entry.mask_T
    assert logits_TE is not None
    if mask_T is None:
        return logits_TE, None
    if logits_TE.device.type == "cpu":
        return logits_TE[mask_T.bool()], None
    return without_padding(logits_TE, mask_T), mask_T.float()


def _added(one: GateSum, other: GateSum) -> GateSum:
    load_E = one.load_E
    if load_E is not None and other.load_E is not None:
        load_E = load_E + other.load_E
    return GateSum(one.probability_E + other.probability_E, other.top_k, load_E)


def _by_expert(ids_TK: Tensor, parts_TK: Tensor, num_experts: int) -> Tensor:
    zeros_E = torch.zeros(num_experts, dtype=torch.float32, device=ids_TK.device)
    return zeros_E.scatter_add(0, ids_TK.reshape(-1), parts_TK.reshape(-1))


def _merges(entry: LayerRouting) -> bool:
    """Whether rows are groups that share a merge: their gates alone keep scores without noise."""
    return entry.routing.clean_logits is not None


def _layer_name(entry: LayerRouting, position: int) -> str:
    return entry.name or f"layer{position}"


def _outputs(
    model: nn.Module, kind: TaskKind, batch: Mapping[str, Tensor], objectives: Collection[str]
) -> ModelOutputs:
    """Run a model and keep what the objectives read."""
    inputs = kind.inputs(model, batch)
    hidden = reads(objectives, "hidden")
    attends = reads(objectives, "attention")
    with record_attention(model) if attends else nullcontext(()) as attention:
        output = kind.run(model, batch, output_hidden_states=hidden)
    return ModelOutputs(
        kind.predictions(model, output, batch),
        hidden_stacks(output, inputs) if hidden else (),
        attention,
    )


def _task_term(kind: TaskKind, predictions: Any, batch: Mapping[str, Tensor]) -> LossTerm:
    if kind.compares_samples and num_ranks() > 1:
        # Every rank computes the loss of all samples, and counts its share.
        everyone = {"labels": gather_rows(batch["labels"])}
        total = kind.losses(gather_rows(predictions), everyone).sum() / num_ranks()
    else:
        total = kind.losses(predictions, batch).sum()
    return LossTerm(total, kind.count_kind)


def _router_terms(
    record: RoutingRecord,
    kind: TaskKind,
    batch: Mapping[str, Any],
    *,
    z_loss: bool,
    entropy: bool,
) -> dict[str, LossTerm]:
    """Router losses: mean over layers, weighed by tokens so that micro-batches count by size."""
    wanted: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {}
    if z_loss:
        wanted["z_loss"] = router_z_loss
    if entropy:
        wanted["router_entropy"] = router_entropy
    learned = [entry for entry in record.entries if entry.routing.logits is not None]
    if not learned or not wanted:
        return {}
    given = [
        (logits_TE, None if real_T is None else token_weights(real_T))
        for logits_TE, real_T in map(_real_tokens, learned)
    ]
    # A decoder that writes has tokens of its own; they are what its layers' means are over.
    is_written = [kind.writes and "decoder" in entry.name.split(".") for entry in learned]
    terms = {}
    for name, loss in wanted.items():
        means = [loss(logits_TE, weights_T) / len(learned) for logits_TE, weights_T in given]
        none = means[0].new_zeros(())
        read, written = (
            sum((mean for mean, own in zip(means, is_written, strict=True) if own is which), none)
            for which in (False, True)
        )
        more = (
            (LossTerm(written * batch["num_targets"].sum(), "targets"),) if any(is_written) else ()
        )
        terms[name] = LossTerm(read * batch["attention_mask"].sum(), "tokens", more)
    return terms
