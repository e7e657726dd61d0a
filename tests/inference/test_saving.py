"""A saved model comes back whole, in another process, and damage is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.errors import CheckpointError
from moe_dist.inference import load_model, load_tokenizer, save_model
from tests.conversion.dense_models import (
    FAMILY_NAMES,
    logits_of,
    random_scores,
    tiny_model,
    token_batch,
)
from tests.inference.start_models import build_model

WORDS = ["a", "fine", "film", "bad", "very", "not", "the", "story", "is", "dull"]
SENTENCES = ["a very fine film", "the story is dull", "not bad"]
REPOSITORY = Path(__file__).resolve().parent.parent.parent


def student_of(family: str, **options: Any) -> Any:
    model = tiny_model(family)
    plan = plan_partition(
        random_scores(model),
        num_experts=4,
        expert_size=8,
        num_shared_neurons=4,
        tie_shared=options.pop("tie_shared", False),
    )
    return dense_to_moe(model, plan, **options)


def word_tokenizer(directory: Path) -> Any:
    from transformers import BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    file = directory / "vocab.txt"
    file.write_text("\n".join(vocabulary) + "\n")
    return BertTokenizer(str(file))


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    student = student_of("bert", router="token_gate", top_k=2, tie_shared=True)
    student.config.id2label = {0: "negative", 1: "positive"}
    student.config.label2id = {"negative": 0, "positive": 1}
    return save_model(student, folder / "student", word_tokenizer(folder))


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "student"))


def test_all_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_model(student_of("bert"), tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {0o644}, modes


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("router", ["hash_random", "token_gate"])
def test_round_trip(family: str, router: str, tmp_path: Path) -> None:
    student = student_of(family, router=router, tie_shared=router == "token_gate").train()
    loaded = load_model(save_model(student, tmp_path / "model"))
    assert type(loaded) is type(student)
    assert not loaded.training
    assert set(loaded.state_dict()) == set(student.state_dict())
    for name, value in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # Not bit by bit: products of odd sizes depend on where the weights lie in memory.
    batch = token_batch()
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(student.eval(), batch))


def test_balanced_tables_need_no_counts_again(tmp_path: Path) -> None:
    counts = torch.arange(50)
    student = student_of("bert", router="hash_balanced", token_counts=counts)
    loaded = load_model(save_model(student, tmp_path / "model"))
    tables = [name for name in student.state_dict() if name.endswith("router.table")]
    assert len(tables) == 2
    for name in tables:
        assert torch.equal(loaded.state_dict()[name], student.state_dict()[name])


def test_pruned_student_and_half_precision(tmp_path: Path) -> None:
    model = tiny_model("bert").to(torch.bfloat16)
    plan = plan_partition(
        random_scores(model), num_experts=1, expert_size=8, num_shared_neurons=0, layers=[1]
    )
    student = dense_to_moe(model, plan)
    loaded = load_model(save_model(student, tmp_path / "model"))
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits_of(loaded, token_batch()), logits_of(student, token_batch()))


OTHER_PROCESS = """
import json, sys
import torch
from moe_dist.inference import load_model, load_tokenizer
import moe_dist.conversion.registration as registration
registration.register()
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers import pipeline
directory, sentences = sys.argv[1], json.loads(sys.argv[2])
tokens = load_tokenizer(directory)(sentences, padding=True, return_tensors="pt")
assert AutoTokenizer.from_pretrained(directory)(sentences, padding=True).input_ids == (
    tokens["input_ids"].tolist())
assert AutoConfig.from_pretrained(directory).moe["num_experts"] == 4
assert type(AutoModel.from_pretrained(directory)).__name__ == "MoeBertModel"
with torch.no_grad():
    ours = load_model(directory)(**tokens).logits
    auto = AutoModelForSequenceClassification.from_pretrained(directory)(**tokens).logits
classify = pipeline("text-classification", model=directory)
print(json.dumps({"ours": ours.tolist(), "auto": auto.tolist(), "pipeline": classify(sentences)}))
"""


def test_another_process_gives_the_same_outputs(saved: Path) -> None:
    tokens = load_tokenizer(saved)(SENTENCES, padding=True, return_tensors="pt")
    expected = logits_of(load_model(saved), dict(tokens))
    done = run_python(OTHER_PROCESS, saved, json.dumps(SENTENCES))
    assert done.returncode == 0, done.stderr
    assert "not supported" not in done.stderr
    answer = json.loads(done.stdout)
    torch.testing.assert_close(torch.tensor(answer["ours"]), expected)
    torch.testing.assert_close(torch.tensor(answer["auto"]), expected)
    labels = [("negative", "positive")[index] for index in expected.argmax(dim=-1)]
    assert [one["label"] for one in answer["pipeline"]] == labels
    scores = expected.softmax(dim=-1).max(dim=-1).values
    torch.testing.assert_close(torch.tensor([one["score"] for one in answer["pipeline"]]), scores)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("AutoModel", "moe_bert"),
        ("AutoModelForSequenceClassification", "moe_bert"),
        ("BertForSequenceClassification", "import moe_dist first"),
        ("BertModel", "import moe_dist first"),
    ],
)
def test_plain_transformers_refuses(saved: Path, kind: str, words: str) -> None:
    code = f"import sys, transformers; transformers.{kind}.from_pretrained(sys.argv[1])"
    done = run_python(code, saved)
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1] + done.stderr[-2000:]


def test_registering_later_than_transformers_works_too(saved: Path) -> None:
    code = (
        "import sys\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "from moe_dist.conversion.registration import register\n"
        "Auto._model_mapping\n"
        "register(); register()\n"
        "print(type(Auto.from_pretrained(sys.argv[1])).__name__)"
    )
    done = run_python(code, saved)
    assert done.stdout.strip() == "MoeBertForSequenceClassification", done.stderr


def test_registering_imports_nothing() -> None:
    code = (
        "import sys\n"
        "from moe_dist.conversion.registration import register\n"
        "register()\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_manifest_names_files_and_experts(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert set(manifest["files"]) == names - {"manifest.json"}
    layers = ("bert.encoder.layer.0", "bert.encoder.layer.1")
    assert set(manifest["experts"]) == {f"{layer}.{e}" for layer in layers for e in range(4)}
    assert len(set(manifest["experts"].values())) == 8


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damage_is_named(copied: Path, name: str) -> None:
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged: its SHA-256"):
        load_model(copied)
    path.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=f"{name} is damaged: .* bytes instead of"):
        load_model(copied)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_model(copied)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "extra/weights.pkl"])
def test_pickles_are_refused(copied: Path, name: str) -> None:
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=f"{name} is a pickle"):
        load_model(copied)


def test_weights_that_nobody_vouches_for(copied: Path) -> None:
    (copied / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not in the manifest"):
        load_model(copied)


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 1}', '{"files": 2}'])
def test_manifests_that_are_none(copied: Path, text: str) -> None:
    (copied / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing or damaged"):
        load_model(copied)


def test_manifests_cannot_point_outside(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["../elsewhere"] = {"sha256": "", "bytes": 0}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not list a model's files"):
        load_model(copied)


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        load_model(tmp_path)
    directory = save_model(tiny_model("bert"), tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(directory)


def test_saving_replaces_what_was_there(tmp_path: Path) -> None:
    first, second = tiny_model("bert"), student_of("bert")
    directory = save_model(first, tmp_path / "deep" / "model")
    (directory / "left.over").write_text("old")
    assert save_model(second, directory) == directory
    assert not (directory / "left.over").exists()
    assert type(load_model(directory)) is type(second)
    assert [path.name for path in directory.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_nothing_and_spares_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("bert")
    directory = save_model(model, tmp_path / "model")

    def full_disk(self: object, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    broken = tiny_model("bert")
    monkeypatch.setattr(type(broken), "save_pretrained", full_disk)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        save_model(broken, directory)
    assert "free space" in caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(
        logits_of(load_model(directory), token_batch()), logits_of(model, token_batch())
    )


def test_weights_are_plain_safetensors_under_canonical_names(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    assert weights["bert.encoder.layer.0.intermediate.experts.w_in"].shape == (4, 4, 16)
    assert weights["bert.encoder.layer.0.intermediate.shared.w_in"].shape == (1, 4, 16)
    assert weights["bert.encoder.layer.0.intermediate.router.gate.weight"].shape == (4, 16)


@pytest.mark.parametrize("converted", [False, True])
def test_a_bart_of_two_nameless_outputs_comes_back(converted: bool, tmp_path: Path) -> None:
    model = build_model("bart").eval()
    if converted:
        plan = plan_partition(
            random_scores(model), num_experts=2, expert_size=16, num_shared_neurons=4
        )
        model = dense_to_moe(model, plan, router="token_gate")
    save_model(model, tmp_path / "model")
    assert load_model(tmp_path / "model").config.num_labels == 2
