"""What a job is told: plain values and paths, so that it can be sent to any worker.

The keys mirror the recipe's sections; a driver may hand over those sections as they are, since a
job reads the keys named here and leaves others alone. Every path must be one that all workers see;
a stage and models may lie at URIs, and are made local before the job reads its payload
(`moe_dist.workers.remote_stage`).
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

Split = Literal["train", "dev", "holdout"]


class TrainSection(TypedDict, total=False):
    """How to train; see `LoopSettings` and `build_engine` for meanings and defaults.

    ``eval_at`` lists further steps to evaluate after, ``checkpoint_at`` to save after.

    ``precision`` may be ``auto``: bf16 where every worker's hardware is fast at it. The keys with
    ``_every`` count optimizer steps; None means only at the end.
    """

    learning_rate: float
    num_epochs: float
    max_steps: int | None
    batch_size: int
    accumulation: int
    weight_decay: float
    warmup_fraction: float
    lr_schedule: Literal["linear", "constant"]
    max_grad_norm: float
    precision: Literal["auto", "fp32", "bf16"]
    eval_every: int | None
    eval_at: list[int]
    eval_batch_size: int
    checkpoint_every: int | None
    checkpoint_at: list[int]
    keep_checkpoints: int
    log_every: int
    expert_learning_rate_scale: float
    gradient_checkpointing: bool


class DistillSection(TypedDict, total=False):
    """The weight of each loss term, and what else `distill_terms` takes.

    ``warmup_fraction`` is the share of all steps over which the distillation weights grow from
    zero; 0 means that they are whole from the first step. The adversarial one waits for
    ``adversarial_warmup_fraction`` of them. A ``dropout`` of None leaves the student its own.
    """

    task_weight: float
    hidden_weight: float
    kl_weight: float
    load_balancing_weight: float
    z_loss_weight: float
    entropy_weight: float
    temperature: float
    dropout: float | None
    warmup_fraction: float
    hidden_layers: Literal["all", "last"] | int
    soft_weight: float
    attention_weight: float
    alignment_weight: float
    alignment_pooling: Literal["cls", "mean", "max"]
    mapping_weight: float
    adversarial_weight: float
    adversarial_regularizer: Literal["spectral", "r1"]
    adversarial_learning_rate: float
    adversarial_warmup_fraction: float


class ParallelSection(TypedDict, total=False):
    """How workers share the model. The number of workers is the process group's own."""

    ep_size: int
    zero_stage: int
    use_gpu: bool | Literal["auto"]


class DataJob(TypedDict, total=False):
    """What all jobs share.

    Args:
        data: arguments of `moe_dist.data.mixture.load_rows`.
        max_length: tokens per sample; longer ones are cut.
        cache_dir: where tokenised data is cached; None for the default.
        stage_dir: where rank 0 writes results, checkpoints and the metric log.
        seed: of data order, dropout and everything else that is drawn.
        use_gpu: ``auto``, or whether to run on a GPU.
    """

    data: dict[str, Any]
    max_length: int
    cache_dir: str | None
    stage_dir: str
    seed: int
    use_gpu: bool | Literal["auto"]


class FinetunePayload(DataJob, total=False):
    """`finetune_job`: ``model`` is a directory or hub id of a pre-trained encoder.

    ``revision`` is a hub commit, tag or branch; the newest when not given.
    """

    model: str
    revision: str | None
    train: TrainSection
    parallel: ParallelSection


class ImportancePayload(DataJob, total=False):
    """`importance_job`: ``model`` is the directory of a fine-tuned teacher, or of a student.

    ``num_samples`` training rows are drawn by the seed; None takes all.
    """

    model: str
    num_samples: int | None
    batch_size: int


class FitOutputPayload(DataJob, total=False):
    """`fit_output_job`: ``student`` is a fresh one's directory, ``teacher`` what it was made from.

    ``num_samples`` training rows are drawn by the seed; None takes all.
    """

    student: str
    teacher: str
    num_samples: int | None
    batch_size: int


class DistillPayload(DataJob, total=False):
    """`distill_job`: ``student`` and ``teacher`` are model directories.

    Of a student of another shape ``layers`` is the teacher's layer of each of its own, and
    ``hidden_ids`` the teacher's dimension of each of its own; None where they are the same. With
    ``keep_predictions`` rank 0 writes the answers of the last evaluation, which is on the dev split
    where ``eval_split`` does not say otherwise.
    """

    keep_predictions: bool
    eval_split: Split

    student: str
    teacher: str
    layers: list[int] | None
    hidden_ids: list[int] | None
    train: TrainSection
    distill: DistillSection
    parallel: ParallelSection


class PredictPayload(DataJob, total=False):
    """`predict_job`: scores ``model`` (a directory) on one split."""

    model: str
    split: Split
    batch_size: int
    output_name: str
