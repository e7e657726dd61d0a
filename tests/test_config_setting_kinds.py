"""Every key says once what kind of setting it is, and all who care agree with it."""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import RunConfig, load_config
from moe_dist.config.in_flight import in_flight_keys
from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.config.setting_kinds import Kind, keys_of, kind_of, settings_of_kind
from moe_dist.tracking import recipe_hash
from pipelines.chain.training_settings import training_settings
from pipelines.stages.adapt import adapt_settings
from tests.pipelines.conftest import tiny_bert, tiny_settings, write_recipe

__all__ = ["tiny_bert", "tiny_settings", "write_recipe"]
Write = Callable[[dict[str, Any]], Path]

KINDS = {dotted: kind_of(*field) for dotted, *field in keys_of(RunConfig)}
# A value that the tiny recipe does not have, for every key that is no learning.
OTHER_VALUES = {
    "name": "other",
    "distill.keep_answers_gib": "0",
    "output_dir": "elsewhere",
    "compare": "[dense]",
    "train.gradient_checkpointing": "true",
    "train.eval_every": "3",
    "train.eval_batch_size": "3",
    "train.checkpoint_every": "3",
    "train.keep_checkpoints": "5",
    "train.log_every": "3",
    "train.step_timeout_s": "33",
    "parallel.num_workers": "2",
    "parallel.ep_size": "1",
    "parallel.zero_stage": "1",
    "parallel.cpus_per_worker": "2",
    "parallel.use_gpu": "false",
    "parallel.launcher": "ray",
    "parallel.max_failures": "9",
    "parallel.wait_s": "9",
    "evaluate.require_speedup": "1.5",
    "evaluate.forms": "eager",
    "tracking.enabled": "true",
    "tracking.uri": "sqlite:///other.db",
    "tracking.experiment": "other",
    "tracking.log_models": "false",
    "tracking.register_model": "other",
}


def identities(config: RunConfig) -> dict[str, Any]:
    """What decides whether a stage is done anew, and whether MLflow gets another run."""
    learning = settings_of_kind(config)
    return {
        "finetune-teacher": training_settings(config, config.teacher_train, has_experts=False),
        "adapt": adapt_settings(config),
        "distill": training_settings(config, config.train) | learning["distill"],
        "chain": recipe_hash(learning),
    }


def test_every_key_has_a_kind_that_exists() -> None:
    assert set(KINDS.values()) == set(typing.get_args(Kind))
    assert KINDS["train.keep_checkpoints"] == "observation"
    assert KINDS["train.learning_rate"] == KINDS["seed"] == KINDS["data.train"] == "learning"
    assert KINDS["parallel.ep_size"] == KINDS["train.gradient_checkpointing"] == "placement"


def test_a_mark_that_does_not_exist_is_no_silent_default() -> None:
    for dotted, section, name in keys_of(RunConfig):
        extra = section.model_fields[name].json_schema_extra or {}
        assert isinstance(extra, dict), dotted
        assert set(extra) <= {"kind", "in_flight", "read_with", "unread_at"}, dotted


def test_the_table_below_has_every_key_that_is_no_learning() -> None:
    others = {key for key, kind in KINDS.items() if kind != "learning"}
    assert {key for key in others if not key.startswith("search.")} == set(OTHER_VALUES)


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_what_is_not_learned_changes_no_fingerprint_and_no_run(
    write_recipe: Write, tiny_settings: dict[str, Any], key: str
) -> None:
    tiny_settings["parallel"] = {}
    recipe = write_recipe(tiny_settings)
    overrides = [f"{key}={OTHER_VALUES[key]}"]
    if key == "tracking.register_model":
        overrides.append("tracking.enabled=true")
    plain, other = load_config(recipe), load_config(recipe, overrides)
    assert plain.flatten() != other.flatten() or key == "parallel.ep_size"
    assert identities(plain) == identities(other)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=1", {"finetune-teacher", "adapt", "distill", "chain"}),
        ("model.max_length=12", {"finetune-teacher", "adapt", "distill", "chain"}),
        ("train.precision=fp32", {"finetune-teacher", "adapt", "distill", "chain"}),
        ("train.expert_learning_rate_scale=0.5", {"distill", "chain"}),
        ("finetune.num_epochs=2", {"finetune-teacher", "chain"}),
        ("moe.router=token_gate", {"adapt", "chain"}),
        ("distill.adversarial_weight=0.5", {"distill", "chain"}),
        # Nobody reads them where the loss has no weight.
        ("distill.adversarial_learning_rate=0.5", set()),
        ("distill.alignment_pooling=max", set()),
        ("data.metrics=[f1]", {"chain"}),
    ],
)
def test_what_is_learned_changes_the_stages_that_read_it_and_the_run(
    write_recipe: Write, tiny_settings: dict[str, Any], override: str, changed: set[str]
) -> None:
    recipe = write_recipe(tiny_settings)
    before, after = identities(load_config(recipe)), identities(load_config(recipe, [override]))
    assert {name for name in before if before[name] != after[name]} == changed


def test_what_a_loss_reads_counts_with_it(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    recipe = write_recipe(tiny_settings)
    for weight, other in (
        ("adversarial", "adversarial_learning_rate=0.5"),
        ("alignment", "alignment_pooling=max"),
    ):
        used = f"distill.{weight}_weight=1"
        before, after = (
            identities(load_config(recipe, more)) for more in ([used], [used, f"distill.{other}"])
        )
        assert {name for name in before if before[name] != after[name]} == {"distill", "chain"}


def test_what_changes_in_flight_is_learning() -> None:
    assert len(in_flight_keys()) == 18
    assert {KINDS[key] for key in in_flight_keys()} == {"learning"}


def test_a_key_at_what_was_always_so_redoes_nothing() -> None:
    """Stages that were made before there was the key stay as they are."""
    assert "teacher_precision" not in settings_of_kind(ObjectivesConfig())
    chosen = settings_of_kind(ObjectivesConfig(teacher_precision="int8"))
    assert chosen["teacher_precision"] == "int8"
    nobody_asks = ObjectivesConfig(
        teacher_precision="int8", task_weight=1.0, hidden_weight=0.0, kl_weight=0.0
    )
    assert "teacher_precision" not in settings_of_kind(nobody_asks)
