"""A model directory and data files for whole jobs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from moe_dist.config.data_section import DataConfig
from moe_dist.config.sections import ParallelConfig, TrainConfig

GOOD = ["good", "great", "fine", "superb"]
BAD = ["bad", "poor", "awful", "dull"]
PLAIN = ["the", "film", "was", "a", "plot", "and", "cast", "seemed", "very", "to", "me", "it"]


def write_bert(directory: Path, *, dropout: float = 0.1) -> str:
    """A random BERT with its tokenizer, as a hub directory has them."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    directory.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.1,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(directory)
    return str(directory)


def write_sentences(path: Path, num_rows: int, *, seed: int, regression: bool = False) -> str:
    """Sentences in which one word decides the label."""
    draw = random.Random(seed)
    lines = ["sentence\tlabel"]
    for row in range(num_rows):
        words = draw.choices(PLAIN, k=draw.randint(3, 9))
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if row % 2 else BAD))
        label = f"{(row % 2) * 2.5:.1f}" if regression else ("pos" if row % 2 else "neg")
        lines.append(f"{' '.join(words)}\t{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def task_data(root: Path, *, regression: bool = False) -> DataConfig:
    """The data of all jobs of a chain; the files are written on first use."""
    train, dev = root / "train.tsv", root / "dev.tsv"
    if not train.exists():
        write_sentences(train, 96, seed=1, regression=regression)
        write_sentences(dev, 33, seed=2, regression=regression)
        write_bert(root / "bert")
    return DataConfig(
        source="files",
        train=str(train),
        dev=str(dev),
        text_columns=("sentence",),
        kind="regression" if regression else "classification",
    )


def job_fields(root: Path, stage: str, *, regression: bool = False, **more: Any) -> dict[str, Any]:
    """What all jobs of a chain share, and more fields of one of them."""
    return {
        "data": task_data(root, regression=regression),
        "max_length": 16,
        "cache_dir": str(root / "cache"),
        "stage_dir": str(root / stage),
        "seed": 5,
        "parallel": on_cpu(),
        **more,
    }


def on_cpu(**changes: Any) -> ParallelConfig:
    """How workers share the work."""
    return ParallelConfig(use_gpu=False, **changes)


def train_section(**changes: Any) -> TrainConfig:
    """Enough training for so easy a task."""
    return TrainConfig(
        **{
            "learning_rate": 1e-2,
            "num_epochs": 12,
            "batch_size": 16,
            "weight_decay": 0.01,
            "warmup_fraction": 0.1,
            "precision": "fp32",
            "log_every": 10,
        }
        | changes
    )


def adapt(root: Path, teacher: str, **options: Any) -> str:
    """What the adapt stage does: scores to a plan to a student's directory."""
    from moe_dist.conversion import dense_to_moe, plan_partition
    from moe_dist.inference.saving import load_model, load_tokenizer, save_model
    from moe_dist.jobs.results import load_scores

    scores = load_scores(root / "score-importance" / "scores.safetensors")
    plan = plan_partition(
        scores, num_experts=4, expert_size=12, num_shared_neurons=8, tie_shared=True
    )
    student = dense_to_moe(load_model(teacher), plan, **({"router": "token_gate"} | options))
    directory = root / "adapt" / "model"
    save_model(student, directory, tokenizer=load_tokenizer(teacher))
    return str(directory)


def write_teacher(root: Path) -> str:
    """A teacher without dropout, so that one process and two can be compared."""
    from moe_dist.inference.pretrained import load_pretrained
    from moe_dist.inference.saving import save_model

    write_bert(root / "plain", dropout=0.0)
    model, tokenizer = load_pretrained(
        str(root / "plain"), num_labels=2, label_names=("neg", "pos"), seed=1
    )
    return str(save_model(model, root / "teacher", tokenizer=tokenizer))


def write_untrained_pair(root: Path) -> dict[str, str]:
    """A teacher and the student made of it by scores that were drawn; their directories."""
    from moe_dist.jobs.results import save_scores

    teacher = write_teacher(root)
    save_scores([torch.rand(32), torch.rand(32)], root / "score-importance" / "scores.safetensors")
    return {"teacher": teacher, "student": adapt(root, teacher)}
