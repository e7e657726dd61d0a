"""A start model's body is taken over whole or refused; of its head is said what is new."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_dist.errors import ConversionError
from moe_dist.inference.pretrained import StartModel, check_pretrained, load_pretrained
from tests.inference.start_models import (
    build_model,
    edit_config,
    edit_weights,
    write_start_model,
)

FAMILIES = ("bert", "gpt2", "t5", "bart")


def check(directory: Path, num_labels: int = 2) -> StartModel:
    names = [f"c{index}" for index in range(num_labels)]
    return check_pretrained(str(directory), num_labels=num_labels, label_names=names)


def refused(directory: Path) -> ConversionError:
    """Preflight and the load itself refuse it in the same words."""
    with pytest.raises(ConversionError) as checked:
        check(directory)
    with pytest.raises(ConversionError) as loaded:
        load_pretrained(str(directory), num_labels=2, label_names=("c0", "c1"))
    assert checked.value.message == loaded.value.message
    return checked.value


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {f"{prefix}{name}": one for name, one in weights.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_classifier_is_taken_over(tmp_path: Path, family: str) -> None:
    start = check(write_start_model(tmp_path / family, family))
    assert start.notes == ("its head has no names, and is read as c0, c1",)
    assert start.warnings == ()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.encoder."])
def test_a_prefix_is_refused_and_named(tmp_path: Path, family: str, prefix: str) -> None:
    if (family, prefix) == ("bart", "model."):
        prefix = "model.model."
    directory = write_start_model(tmp_path / family, family)
    edit_weights(directory, prefixed(prefix))
    error = refused(directory)
    assert "missing" in error.message and "left over" in error.message
    assert f"begin with '{prefix}'" in error.message.replace("'model.'", f"'{prefix}'")
    assert "take " in error.remedy


def test_a_body_alone_with_a_prefix_is_named_too(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert", kind="Model")
    edit_weights(directory, prefixed("module."))
    assert "begin with 'module.'" in refused(directory).message


def test_a_head_with_a_prefix_is_not_drawn_anew(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert")
    edit_weights(
        directory,
        lambda weights: {
            f"module.{name}" if name.startswith("classifier") else name: one
            for name, one in weights.items()
        },
    )
    assert "module.classifier.weight" in refused(directory).message


@pytest.mark.parametrize(
    ("entry", "value", "fault"),
    [
        ("vocab_size", 99, "word_embeddings.weight: [24, 16] in the file, [99, 16]"),
        ("intermediate_size", 48, "6 of another shape"),
        ("max_position_embeddings", 64, "position_embeddings"),
        ("num_hidden_layers", 3, "16 missing (bert.encoder.layer.2"),
        ("num_hidden_layers", 1, "16 left over (bert.encoder.layer.1"),
        ("type_vocab_size", 1, "token_type_embeddings"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, entry: str, value: int, fault: str
) -> None:
    directory = write_start_model(tmp_path / "bert")
    edit_config(directory, **{entry: value})
    assert fault in refused(directory).message


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "t5", "t5")
    build_model("bart").save_pretrained(tmp_path / "other")
    (tmp_path / "other/model.safetensors").rename(directory / "model.safetensors")
    assert "missing" in refused(directory).message


@pytest.mark.parametrize("name", ["bert.encoder.layer.1.output.dense.bias", "classifier.bias"])
def test_one_lacking_weight_is_refused(tmp_path: Path, name: str) -> None:
    directory = write_start_model(tmp_path / "bert")
    edit_weights(directory, lambda weights: {key: weights[key] for key in weights if key != name})
    assert f"1 missing ({name})" in refused(directory).message


def test_a_trained_head_over_a_new_pooler_is_refused(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert")
    edit_weights(
        directory,
        lambda weights: {key: one for key, one in weights.items() if "pooler" not in key},
    )
    assert "bert.pooler.dense.weight" in refused(directory).message


def test_an_encoder_without_its_decoder_is_refused(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "t5", "t5", kind="EncoderModel")
    assert "transformer.decoder" in refused(directory).message


def test_adapters_are_refused_with_their_remedy(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert")
    edit_weights(
        directory,
        lambda weights: (
            weights
            | {"bert.encoder.layer.0.attention.self.query.lora_A.default.weight": torch.ones(2, 16)}
        ),
    )
    assert "merge_and_unload" in refused(directory).remedy


@pytest.mark.parametrize(
    ("family", "kind", "new", "dropped"),
    [
        ("bert", "Model", "classifier.bias, classifier.weight", ""),
        ("bert", "ForMaskedLM", "bert.pooler.dense.bias", "cls.predictions.bias"),
        ("bert", "ForPreTraining", "classifier.bias, classifier.weight", "and 3 more"),
        ("bert", "ForQuestionAnswering", "classifier.weight", "qa_outputs.bias"),
        ("gpt2", "Model", "score.weight", ""),
        ("gpt2", "LMHeadModel", "score.weight", ""),
        ("t5", "ForConditionalGeneration", "classification_head.out_proj.weight", ""),
        ("bart", "ForConditionalGeneration", "classification_head.out_proj.weight", "final_logits"),
        ("bart", "Model", "classification_head.dense.bias", ""),
    ],
)
def test_ordinary_checkpoints_get_a_new_head(
    tmp_path: Path, family: str, kind: str, new: str, dropped: str
) -> None:
    directory = write_start_model(tmp_path / family, family, kind=kind)
    lines = check(directory).notes
    assert lines[0].startswith("new: ") and new in lines[0]
    assert len(lines) == 1 + bool(dropped)
    assert dropped in lines[-1]
    load_pretrained(str(directory), num_labels=2, label_names=("c0", "c1"))


def test_buffers_of_older_transformers_are_no_weights(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "gpt2", "gpt2", kind="Model")
    old = {"h.0.attn.masked_bias": torch.ones(()), "h.0.attn.bias": torch.ones(4, 4)}
    edit_weights(directory, lambda weights: weights | old)
    assert check(directory).notes == ("new: score.weight",)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_another_size_is_replaced_and_said(tmp_path: Path, family: str) -> None:
    directory = write_start_model(tmp_path / family, family, num_labels=3)
    (line,) = check(directory).notes
    assert line.startswith("new: ") and "another number of outputs" in line
    model, _ = load_pretrained(str(directory), num_labels=2, label_names=("c0", "c1"))
    assert model.config.num_labels == 2


def test_the_head_of_a_token_classifier_is_not_taken(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert", kind="ForTokenClassification")
    edit_weights(directory, lambda weights: weights | {"classifier.bias": torch.full((2,), 7.0)})
    assert (
        "new: the head; the one there is a BertForTokenClassification's" in check(directory).notes
    )
    model, _ = load_pretrained(str(directory), num_labels=2, label_names=("c0", "c1"))
    assert not model.classifier.bias.any()


def test_checking_reads_no_weights(tmp_path: Path) -> None:
    start = check(write_start_model(tmp_path / "bert"))
    body = start.model.bert.encoder.layer[0].output.dense.weight
    assert body.untyped_storage().nbytes() == body.element_size()


def test_a_list_of_files_that_are_not_there_is_refused(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="lacks model-00002-of-00002"):
        check(directory)


def test_a_model_in_parts_is_read(tmp_path: Path) -> None:
    directory = write_start_model(tmp_path / "bert")
    model = build_model("bert")
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="5KB")
    assert not (directory / "model.safetensors").exists()
    assert check(directory).notes == ("its head has no names, and is read as c0, c1",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"])
def test_other_formats_are_named_before_the_start(tmp_path: Path, name: str) -> None:
    directory = write_start_model(tmp_path / "bert")
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(ConversionError, match=f"no model.safetensors, only {name}") as caught:
        check(directory)
    assert "convert it" in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "message", "remedy"),
    [
        (b"not weights at all", "model.safetensors is damaged", "download the file again"),
        (None, "model.safetensors is damaged", "download the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page", "download the file itself"),
    ],
)
def test_damage_is_found_before_the_start(
    tmp_path: Path, content: bytes | None, message: str, remedy: str
) -> None:
    path = write_start_model(tmp_path / "bert") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ConversionError, match=message) as caught:
        check(path.parent)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    directory = write_start_model(tmp_path / "bert")
    edit_weights(directory, lambda weights: weights | {name: torch.full_like(weights[name], value)})
    with pytest.raises(ConversionError, match=rf"NaN or infinity: {name}"):
        load_pretrained(str(directory), num_labels=2, label_names=("c0", "c1"))
