"""Start models that are damaged, unsafe or incomplete are refused in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.errors import ConversionError
from moe_dist.inference.pretrained import check_pretrained, load_pretrained
from moe_dist.inference.skeleton import build_skeleton
from moe_dist.tasks import TASK_KINDS
from tests.inference.start_models import write_start_model
from tests.training.tiny_task import write_bert


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return Path(write_bert(tmp_path / "bert"))


def test_a_cut_file_is_refused(bert: Path) -> None:
    os.truncate(bert / "model.safetensors", 1000)
    with pytest.raises(ConversionError, match=r"model\.teacher: .* cannot be loaded"):
        load_pretrained(str(bert), num_labels=2)


def test_a_pickle_is_not_read(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    torch.save({}, bert / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"model\.teacher: .* cannot be loaded") as caught:
        load_pretrained(str(bert), num_labels=2)
    assert "model.safetensors" in caught.value.remedy


def test_code_that_comes_with_a_model_is_not_run(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (bert / "config.json").write_text(json.dumps(config))
    (bert / "evil.py").write_text("raise SystemExit('this ran')\n")
    with pytest.raises(ConversionError, match=r"model\.teacher: .* cannot be loaded"):
        load_pretrained(str(bert), num_labels=2)


@pytest.mark.parametrize(
    "entry",
    [
        {"hidden_size": "16"},
        {"num_attention_heads": 3},
        {"hidden_act": "nope"},
        {"id2label": ["a", "b"]},
        {"vocab_size": None},
        {"pad_token_id": 999},
        {"hidden_size": -1},
    ],
)
def test_a_senseless_configuration_is_said_in_one_line(bert: Path, entry: dict[str, Any]) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | entry))
    for attempt in (check_pretrained, load_pretrained, build_skeleton):
        with pytest.raises(
            ConversionError, match=r"^model\.teacher: .* cannot be loaded: "
        ) as caught:
            attempt(str(bert), num_labels=2)
        assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("kind", "family", "remedy"),
    [
        ("seq2seq", "bert", "choose an encoder-decoder, such as one of T5's or BART's kind"),
        ("seq2seq", "gpt2", "choose an encoder-decoder, such as one of T5's or BART's kind"),
        ("causal_lm", "bert", "choose a decoder, such as one of GPT-2's or Llama's kind"),
        ("causal_lm", "t5", "choose a decoder, such as one of GPT-2's or Llama's kind"),
        ("causal_lm", "bart", "choose a decoder, such as one of GPT-2's or Llama's kind"),
        ("embedding", "t5", "choose an encoder or a decoder"),
    ],
)
def test_a_model_of_another_kind_is_told_which_would_do(
    tmp_path: Path, kind: str, family: str, remedy: str
) -> None:
    write_start_model(tmp_path / family, family)
    with pytest.raises(ConversionError) as caught:
        build_skeleton(str(tmp_path / family), kind=TASK_KINDS[kind])
    assert caught.value.remedy == f"{remedy}, or another kind of task"
