"""Loading and saving leave the terminal alone, and the user's settings as they were."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.inference import load_model, load_tokenizer, save_model
from moe_dist.inference.pretrained import load_pretrained
from moe_dist.inference.silence import quiet_transformers
from tests.conversion.dense_models import random_scores, tiny_model
from tests.inference.test_saving import word_tokenizer


@pytest.fixture(autouse=True)
def talkative(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As transformers is without anybody's settings."""
    from transformers.utils import logging

    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(verbosity)


def test_no_bars_and_no_hints_from_encoder_to_student(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    classifier = tiny_model("bert")
    with quiet_transformers():
        classifier.bert.save_pretrained(tmp_path / "encoder")
        word_tokenizer(tmp_path).save_pretrained(tmp_path / "encoder")
    capfd.readouterr()

    model, tokenizer = load_pretrained(
        str(tmp_path / "encoder"), num_labels=2, label_names=["no", "yes"]
    )
    plan = plan_partition(random_scores(model), num_experts=2, expert_size=8, num_shared_neurons=4)
    directory = save_model(dense_to_moe(model, plan), tmp_path / "student", tokenizer=tokenizer)
    load_model(directory)
    load_tokenizer(directory)
    assert capfd.readouterr() == ("", "")


def test_what_the_user_has_set_is_put_back() -> None:
    from transformers.utils import logging

    for has_bars in (True, False):
        logging._tqdm_active = has_bars
        logging.set_verbosity_info()
        with suppress(KeyError), quiet_transformers():
            assert logging.get_verbosity() == logging.ERROR
            assert not logging.is_progress_bar_enabled()
            raise KeyError
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled() == has_bars


def test_deepspeed_is_quiet_until_the_last_of_nested_blocks_ends() -> None:
    """It sets its level anew when transformers imports it."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("DeepSpeed"), Handler()
    level = logger.level
    logger.addHandler(handler)
    try:
        with quiet_transformers():
            with quiet_transformers():
                pass
            logger.setLevel(logging.INFO)
            logger.warning("a hint")
            logger.error("a fault")
        logger.warning("a hint to whoever uses it")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert said == ["a fault", "a hint to whoever uses it"]
