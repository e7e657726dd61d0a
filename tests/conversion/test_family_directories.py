"""Every family and head is saved and comes back in another process, tied as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.families import known_family
from moe_dist.inference import load_model, save_model
from tests.conversion.dense_models import (
    EVERY_FAMILY,
    kinds_of,
    random_scores,
    tiny_model,
    token_batch,
)
from tests.inference.test_saving import run_python

# A head that is built with an argument that its configuration does not keep, where there is one.
WITHOUT_POOLER = "Model without a pooler"
HEADS = [(family, kind) for family in EVERY_FAMILY for kind in kinds_of(family)]
HEADS += [
    (family, WITHOUT_POOLER)
    for family in EVERY_FAMILY
    if getattr(tiny_model(family, "Model"), "pooler", None) is not None
]
TIED = ("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def build(family: str, kind: str) -> Any:
    if kind != WITHOUT_POOLER:
        return tiny_model(family, kind)
    model = tiny_model(family, "Model")
    return type(model)(model.config, add_pooling_layer=False).eval()


def student_of(model: Any) -> Any:
    plan = plan_partition(random_scores(model), num_experts=2, expert_size=8, num_shared_neurons=4)
    return dense_to_moe(model, plan, router="token_gate", seed=1)


def inputs_for(model: Any, kind: str) -> dict[str, Tensor]:
    batch = token_batch(num_samples=2, length=5)
    if kind == "ForMultipleChoice":
        return {name: value[None] for name, value in batch.items()}
    if model.config.is_encoder_decoder and kind != "EncoderModel":
        # T5 and BART read their answers for a whole text at its one end token.
        ids = batch["input_ids"].clamp(min=3)
        ids[:, -1] = model.config.eos_token_id
        batch = {name: ids.clone() for name in ("input_ids", "decoder_input_ids")}
    return batch


def answer(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        first: Tensor = model(**batch)[0]
    return first


LOAD_ALL = """
import json, sys, traceback
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
PREPARE
import transformers
root = Path(sys.argv[1])
found = {}
for directory in sorted(root.iterdir()):
    for auto in json.loads((directory / "autos.json").read_text()):
        try:
            kind = getattr(transformers, auto)
            model, info = kind.from_pretrained(directory / "model", output_loading_info=True)
            lacking = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"]]))
            with torch.no_grad():
                first = model.eval()(**load_file(directory / "batch.safetensors"))[0]
            save_file({"first": first.contiguous()}, directory / f"{auto}.safetensors")
            found[f"{directory.name}/{auto}"] = f"{type(model).__name__} {lacking}"
        except Exception as error:
            found[f"{directory.name}/{auto}"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def load_all(root: Path, prepare: str) -> dict[str, str]:
    done = run_python(LOAD_ALL.replace("PREPARE", prepare), root)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each student asked for: the model, a batch, its answer and Auto classes."""
    root = tmp_path_factory.mktemp("students")
    asked: list[Any] = [one for one in request.session.items if one.path == Path(__file__)]
    cases = [one.callspec.params for one in asked if "saved" in one.fixturenames]
    for family, kind in dict.fromkeys((case["family"], case["kind"]) for case in cases):
        directory = root / f"{family} {kind}"
        model = student_of(build(family, kind))
        batch = inputs_for(model, kind)
        save_model(model, directory / "model")
        save_file(batch, directory / "batch.safetensors")
        save_file({"first": answer(model, batch)}, directory / "expected.safetensors")
        spec = known_family(model)
        assert spec is not None
        dense_name = type(model).__name__.removeprefix("Moe")
        autos = [*spec.heads[dense_name], dense_name]
        (directory / "autos.json").write_text(json.dumps(autos))
    return root


@pytest.fixture(scope="module")
def with_us(saved: Path) -> dict[str, str]:
    return load_all(saved, "import moe_dist")


@pytest.fixture(scope="module")
def without_us(saved: Path) -> dict[str, str]:
    return load_all(saved, "")


every_head = pytest.mark.parametrize(("family", "kind"), HEADS)


@every_head
def test_it_comes_back_by_load_model(family: str, kind: str, saved: Path) -> None:
    directory = saved / f"{family} {kind}"
    loaded = load_model(directory / "model")
    expected = load_file(directory / "expected.safetensors")["first"]
    batch = load_file(directory / "batch.safetensors")
    torch.testing.assert_close(answer(loaded, batch), expected)


@every_head
def test_auto_classes_find_it_in_another_process(
    family: str, kind: str, saved: Path, with_us: dict[str, str]
) -> None:
    directory = saved / f"{family} {kind}"
    auto, dense_name = json.loads((directory / "autos.json").read_text())
    assert with_us[f"{directory.name}/{auto}"] == f"Moe{dense_name} []"
    expected = load_file(directory / "expected.safetensors")["first"]
    found = load_file(directory / f"{auto}.safetensors")["first"]
    torch.testing.assert_close(found, expected)


@every_head
def test_plain_transformers_refuses_it(
    family: str, kind: str, saved: Path, without_us: dict[str, str]
) -> None:
    directory = saved / f"{family} {kind}"
    auto, dense_name = json.loads((directory / "autos.json").read_text())
    assert "moe_" in without_us[f"{directory.name}/{auto}"]
    # Which class of error it is differs; that it says why does not.
    assert "moe-dist experts" in without_us[f"{directory.name}/{dense_name}"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "kind"), [pair for pair in HEADS if pair[1] in TIED])
def test_tied_embeddings_stay_tied(family: str, kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, kind, tie_word_embeddings=tied)
    student = student_of(model)
    loaded = load_model(save_model(student, tmp_path / "model"))
    is_tied = [
        one.get_input_embeddings().weight is one.get_output_embeddings().weight
        for one in (model, student, loaded)
    ]
    # transformers ties T5's whatever its configuration says.
    assert is_tied == [tied or family.startswith("t5")] * 3
    batch = inputs_for(model, kind)
    torch.testing.assert_close(answer(loaded, batch), answer(student, batch))
    changed = loaded.get_input_embeddings().weight
    with torch.no_grad():
        changed.add_(torch.rand_like(changed))
    again = load_model(save_model(loaded, tmp_path / "again"))
    torch.testing.assert_close(answer(again, batch), answer(loaded, batch))


@every_head
def test_the_dense_model_comes_back_too(family: str, kind: str, tmp_path: Path) -> None:
    model = build(family, kind)
    batch = inputs_for(model, kind)
    loaded = load_model(save_model(model, tmp_path / "model"))
    assert type(loaded) is type(model)
    torch.testing.assert_close(answer(loaded, batch), answer(model, batch))
