"""What every kind of task has beside its chain: search, compaction, seeds, a served model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from typer.testing import CliRunner

from moe_dist.config import RunConfig, load_config
from moe_dist.inference import load_model
from moe_dist.moe.layer import moe_layers
from moe_dist.tracking import TrackedModel
from moe_dist.tracking.models import describe_model
from pipelines.chain.chain import ChainResult, run_chain
from pipelines.chain.fingerprints import path_digest
from pipelines.chain.recording import log_models
from pipelines.chain.stage_recovery import stage_of
from pipelines.chain.workspace import Workspace
from pipelines.cli import app
from tests.pipelines.chain.test_causal_lm import language_recipe
from tests.pipelines.chain.test_embedding import embedding_recipe
from tests.pipelines.chain.test_question_answering import question_recipe
from tests.pipelines.chain.test_seq2seq import writing_recipe
from tests.pipelines.recorder import Recorder

RECIPES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "embedding": embedding_recipe,
    "causal_lm": lambda directory, _: language_recipe(directory),
    "question_answering": question_recipe,
    "seq2seq": lambda directory, _: writing_recipe(directory),
}
MOE = {
    "num_experts": 4,
    "expert_size": 8,
    "num_shared_neurons": 0,
    "router": "token_gate",
    "partition": "token_clusters",
}
# Names of the columns that a served model reads, where it minds them, and answers with.
SERVED: dict[str, tuple[list[str], list[str]]] = {
    "embedding": ([], ["vector"]),
    "causal_lm": ([], ["text"]),
    "question_answering": (["question", "context"], ["answer", "score"]),
    "seq2seq": ([], ["text"]),
}


@dataclass(frozen=True)
class Finished:
    """A finished run of one kind of task."""

    kind: str
    recipe: Path
    config: RunConfig
    chain: ChainResult

    @property
    def root(self) -> Path:
        """Where its results are."""
        return Path(self.config.output_dir) / self.config.name

    @property
    def report(self) -> dict[str, Any]:
        """What came out."""
        found: dict[str, Any] = json.loads((self.root / "report.json").read_text())
        return found


@pytest.fixture(scope="module", params=RECIPES)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path
) -> Finished:
    directory = tmp_path_factory.mktemp(request.param)
    settings = RECIPES[request.param](directory, tiny_bert)
    settings |= {
        "moe": MOE,
        "compare": {},
        "search": {"space": {"train.learning_rate": {"choice": [1e-3, 2e-3]}}, "num_trials": 2},
    }
    settings.setdefault("finetune", {"max_steps": 2})
    settings["train"] |= {"max_steps": 2}
    recipe = directory / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    config = load_config(recipe)
    return Finished(request.param, recipe, config, run_chain(config, Recorder()))


def told(*words: object) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.output


def test_a_search_can_be_planned(finished: Finished) -> None:
    output = " ".join(told("search", finished.recipe, "--dry-run").split())
    assert "the search is valid; nothing was run" in output
    assert "at most 2 points; 2 trials" in output
    best = "min" if finished.kind == "causal_lm" else "max"
    assert f"objectives {{'quality': '{best}'}}" in output


def test_a_student_is_compacted_repaired_and_measured(finished: Finished, tmp_path: Path) -> None:
    student = finished.root / "distill/model"
    options = ("--num-experts", 2, "--repair-steps", 2, "--output", tmp_path / "small", "--quiet")
    told("compact", student, *options)
    found = json.loads((tmp_path / "small/compact.json").read_text())
    assert found["before"]["metrics"] == pytest.approx(finished.report["student"]["metrics"])
    assert found["repaired"]["parameters"]["total"] < found["before"]["parameters"]["total"]
    assert found["repaired"]["metrics"].keys() == found["before"]["metrics"].keys()
    small = load_model(tmp_path / "small/model")
    assert {layer.num_experts for layer in moe_layers(small)} == {2}
    assert stage_of(student) == stage_of(student / "deeper") == finished.root / "distill"
    assert stage_of(tmp_path / "small/model") is None
    if finished.kind == "seq2seq":
        own = (small.generation_config.num_beams, small.generation_config.max_new_tokens)
        assert own == (2, 5), "the recipe's, by which it was measured"


def test_runs_of_several_seeds_are_compared(finished: Finished, tmp_path: Path) -> None:
    # What seeds change is not looked at here, so that one run can stand for both.
    other = shutil.copytree(finished.root, tmp_path / "other")
    found = json.loads(told("seeds", finished.root, other, "--json"))
    rows = {row["label"]: row for row in found}
    report = finished.report
    for name in ("teacher", "student"):
        value = report[name]["metrics"][report["main_metric"]]
        assert rows[name]["quality"] == pytest.approx(value, rel=1e-5)
        assert (rows[name]["num_seeds"], rows[name]["spread"]) == (2, pytest.approx(0))


class Logged:
    """A run that keeps what it is given to log."""

    def __init__(self) -> None:
        self.models: list[TrackedModel] = []

    def log_model(self, model: TrackedModel) -> None:
        """Keep a model's description."""
        self.models.append(model)


def test_mlflow_is_told_what_a_model_reads_and_answers(finished: Finished, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    tracking = finished.config.tracking.model_copy(update={"enabled": True})
    config = finished.config.model_copy(update={"tracking": tracking})
    chain: Any = Logged()
    log_models(config, Workspace(config, Recorder()), chain, finished.chain.results)
    teacher, student = chain.models
    assert (teacher.name, student.name) == ("teacher", "student")
    writes = finished.kind == "seq2seq"
    directory = finished.root / ("evaluate/models/student" if writes else "distill/model")
    assert student.directory == directory
    assert student.digest == path_digest(directory)
    place = tmp_path / "described"
    describe_model(student.directory, place, asdict(student), run_id="r", model_id="m")
    served = mlflow.pyfunc.load_model(str(place))
    inputs, outputs = SERVED[finished.kind]
    signature = served.metadata.signature
    columns = signature.inputs.inputs
    assert [column.name for column in columns if column.name is not None] == inputs
    assert len(columns) == max(1, len(inputs))
    assert signature.outputs.input_names() == outputs
    texts = ["the film was good"] * len(columns)
    frame = pandas.DataFrame([texts], columns=inputs or ["any name"])
    asked = [frame] if inputs else [frame, texts]
    for given in asked:
        found = served.predict(given)
        assert list(found.columns) == outputs and len(found) == 1
