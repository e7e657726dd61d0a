"""What the spawned processes of the distributed tests run; results go to a directory."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.distributed import (
    TrainEngine,
    gather_state_dict,
    load_checkpoint,
    save_checkpoint,
)
from moe_dist.distributed.gathering import gather_moments
from moe_dist.errors import CheckpointError, ConfigError, TrainingError
from tests.distributed.tiny_moe import NUM_STEPS, Case, all_logits, make_engine, train_steps

HALF = NUM_STEPS // 2


def snapshot(engine: TrainEngine) -> dict[str, Tensor]:
    """Whole weights and moments; the moments are on rank 0 only."""
    return {**gather_state_dict(engine), **gather_moments(engine)}


def run_case(case: Case, out: Path, *, checkpoint: bool) -> None:
    """Train all steps from scratch; keep first and last state, logits and norms."""
    engine = make_engine(case)
    result = {"logits.start": all_logits(engine, case)}
    norms = train_steps(engine, case, 0, 1)
    result.update({f"first.{k}": v for k, v in snapshot(engine).items()})
    norms += train_steps(engine, case, 1, HALF)
    if checkpoint:
        save_checkpoint(out / "checkpoints" / case.name, engine, step=HALF, state={"epoch": 3})
    norms += train_steps(engine, case, HALF, NUM_STEPS)
    result.update({f"last.{k}": v for k, v in snapshot(engine).items()})
    result["logits.end"] = all_logits(engine, case)
    result["norms"] = torch.tensor(norms, dtype=torch.float64)
    write_result(engine, result, out / f"{case.name}.safetensors")


def resume_case(case: Case, source: str, out: Path) -> None:
    """Load another size's checkpoint of the middle into a fresh engine and finish the run."""
    engine = make_engine(case)
    for parameter in engine.module.parameters():
        parameter.data.zero_()
    state = load_checkpoint(out / "checkpoints" / source, engine)
    assert state == {"epoch": 3, "step": HALF}, state
    result = {f"loaded.{k}": v for k, v in snapshot(engine).items()}
    norms = train_steps(engine, case, HALF, NUM_STEPS)
    result.update({f"last.{k}": v for k, v in snapshot(engine).items()})
    result["norms"] = torch.tensor(norms, dtype=torch.float64)
    write_result(engine, result, out / f"{source}--{case.name}.safetensors")


def write_result(engine: TrainEngine, result: dict[str, Tensor], path: Path) -> None:
    if engine.rank == 0:
        save_file({key: value.contiguous() for key, value in result.items()}, path)


def run_world(
    rank: int,
    world: int,
    cases: list[Case],
    saved: list[str],
    resumes: list[tuple[str, Case]],
    out: Path,
) -> None:
    """Run all cases of one world size in one group of processes."""
    warnings.filterwarnings("ignore")
    for case in cases:
        run_case(case, out, checkpoint=case.name in saved)
    for source, case in resumes:
        resume_case(case, source, out)


def run_faults(world: int, out: Path) -> dict[str, object]:
    """Damage and a failing write must be seen alike on every rank."""
    case = Case(world, world, 1)
    directory = out / "faults"
    engine = make_engine(case)
    train_steps(engine, case, 0, 1)
    save_checkpoint(directory, engine, step=1, state={})
    train_steps(engine, case, 1, 2)
    place = save_checkpoint(directory, engine, step=2, state={})
    if engine.rank == 0:
        damage(place / "optimizer.safetensors")
    torch.distributed.barrier()
    state = load_checkpoint(directory, engine)
    found: dict[str, object] = {"fallback_step": None if state is None else state["step"]}
    try:
        load_checkpoint(place, engine)
    except CheckpointError as error:
        found["named"] = str(error)
    blocker = out / "blocker"
    blocker.write_text("a file where a directory is needed")
    try:
        save_checkpoint(blocker / "run", engine, step=3, state={})
    except CheckpointError as error:
        found["unwritable"] = str(error)
    return found


def run_lopsided(case: Case) -> dict[str, Tensor]:
    """One expert gets every token, so that other ranks receive none."""
    engine = make_engine(case)
    engine.module.get_submodule("hashed.router").get_buffer("table").zero_()
    train_steps(engine, case, 0, 2)
    return gather_moments(engine)


def run_bf16(world: int) -> dict[str, object]:
    """Autocast computes in bf16 over fp32 weights and stays near the fp32 run."""
    case = Case(world, world, 1)
    engine = make_engine(case, precision="bf16")
    with engine.autocast():
        dtype = str(engine.module.get_submodule("head")(torch.ones(1, 8)).dtype)
    norms = train_steps(engine, case, 0, 3)
    dtypes = {str(p.dtype) for p in engine.module.parameters()}
    expected = train_steps(make_engine(case), case, 0, 3)
    gap = max(abs(a / b - 1) for a, b in zip(norms, expected, strict=True))
    return {"dtype": dtype, "weights": sorted(dtypes), "gap": gap}


def run_bert(case: Case) -> dict[str, Tensor]:
    """A converted BERT, with padding and gradient checkpointing, trains like any model."""
    from transformers import BertConfig, BertForSequenceClassification

    from moe_dist.conversion import dense_to_moe, plan_partition

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=23,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    teacher = BertForSequenceClassification(config).eval()
    plan = plan_partition(
        [torch.rand(16) for _ in range(2)],
        num_experts=4,
        expert_size=5,
        num_shared_neurons=2,
        tie_shared=True,
    )
    student = dense_to_moe(teacher, plan, router="token_gate", top_k=1)
    student.activation_checkpointing_enable({"use_reentrant": False})
    student.train()
    engine = make_engine(case, model=LogitsOf(student))
    train_steps(engine, case, 0, 3)
    return {**gather_state_dict(engine), **gather_moments(engine)}


class LogitsOf(torch.nn.Module):
    """A transformers model with the tiny model's arguments."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=token_ids, attention_mask=mask.long()).logits
        return logits


def run_refusals(world: int) -> dict[str, object]:
    """Sizes that do not divide, and gradients that are not finite, are errors on every rank."""
    found: dict[str, object] = {}
    try:
        make_engine(Case(world, 3, 0))
    except ConfigError as error:
        found["ep_size"] = str(error)
    for zero in (0, 1):
        case = Case(world, world, zero)
        engine = make_engine(case)
        before = gather_state_dict(engine)
        logits = engine.module(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2).bool())
        engine.backward(logits.sum() * float("nan"), is_last_micro_batch=True)
        try:
            engine.step()
        except TrainingError as error:
            found[f"nan.{zero}"] = str(error)
        after = gather_state_dict(engine)
        found[f"untouched.{zero}"] = all(torch.equal(before[k], after[k]) for k in before)
    return found


def run_edges(rank: int, world: int, resumes: list[tuple[str, Case]], out: Path) -> None:
    """What is not about sizes: faults, lopsided routing, bf16, refusals."""
    run_world(rank, world, [], [], resumes, out)
    found = {
        "faults": run_faults(world, out),
        "bf16": run_bf16(world),
        "refusals": run_refusals(world),
    }
    lopsided = run_lopsided(Case(world, world, 2))
    bert = run_bert(Case(world, world, 1))
    if rank == 0:
        save_file(lopsided, out / "lopsided.safetensors")
        save_file(bert, out / "bert.safetensors")
    (out / f"edges-{rank}.json").write_text(json.dumps(found))


def damage(path: Path) -> None:
    """Flip one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
