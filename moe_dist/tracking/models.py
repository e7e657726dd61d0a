"""Models as MLflow knows them: a model directory with MLflow's description beside it.

`mlflow.pyfunc.load_model` and `mlflow models serve` read it through a loader of our own
(`moe_dist.inference.serving`), so that nothing in it is a pickle.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.tracking.connection import REJECTED, describe_fault
from moe_dist.tracking.database_lock import DatabaseLock
from moe_dist.tracking.journal import Journal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

logger = logging.getLogger("moe_dist.tracking")

LOADER_MODULE = "moe_dist.inference.serving"
MODEL_TYPE = "moe-dist"
# As it was trained; who loads it may name another (`moe_dist.inference.backends`).
_FORM = "eager-fp32"
# What the loader imports; MLflow would guess them by loading the model in another process.
_REQUIREMENTS = ("moe-dist", "mlflow", "torch", "transformers", "tokenizers", "safetensors")


class ModelSender:
    """Sends the models that a journal wants and the server lacks.

    Args:
        client: the connection.
        experiment_id: where the runs are.
        lock: of the database.
        is_served: whether a server answers, and not a database.
    """

    def __init__(
        self, client: MlflowClient, experiment_id: str, lock: DatabaseLock, *, is_served: bool
    ) -> None:
        self._client = client
        self._is_served = is_served
        self._experiment_id = experiment_id
        self._lock = lock
        self.uploading = ""
        """The name of the model that is on its way; empty if none is."""

    def send(self, journal: Journal, run_id: str) -> None:
        """Log and register the models that a run made since."""
        with journal.lock:
            wanted = {name: dict(entry) for name, entry in journal.wanted.models.items()}
        for name, entry in wanted.items():
            directory = journal.directory / entry["directory"]
            sent = journal.sent.models.get(name, {})
            if sent.get("digest") != entry["digest"]:
                if not directory.is_dir():
                    continue
                with journal.lock:
                    sent = journal.sent.models[name] = {"digest": entry["digest"]}
            if not sent.get("ready"):
                self.uploading = name
                try:
                    self._upload(directory, entry, sent, journal, run_id)
                finally:
                    self.uploading = ""
            if entry["register_as"] and sent.get("registered") != entry["register_as"]:
                self._register(entry, sent["model_id"], run_id)
                # What was refused once would be refused again, and hold up what follows.
                with journal.confirming():
                    sent["registered"] = entry["register_as"]

    def _upload(
        self,
        directory: Path,
        entry: Mapping[str, Any],
        sent: dict[str, str],
        journal: Journal,
        run_id: str,
    ) -> None:
        from mlflow.entities import LoggedModelOutput

        if "model_id" not in sent:
            with self._lock.held():
                model = self._client.create_logged_model(
                    self._experiment_id,
                    name=entry["name"],
                    source_run_id=run_id,
                    params=dict(entry["params"]) or None,
                    model_type=MODEL_TYPE,
                )
                self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
            # An upload that breaks off is taken up again for the same model.
            with journal.confirming():
                sent["model_id"] = model.model_id
        with tempfile.TemporaryDirectory(prefix="moe-dist-model-") as scratch:
            described = Path(scratch) / "model"
            describe_model(directory, described, entry, run_id=run_id, model_id=sent["model_id"])
            self._client.log_model_artifacts(sent["model_id"], str(described))
        with self._lock.held():
            self._client.finalize_logged_model(sent["model_id"], "READY")
        with journal.confirming():
            sent["ready"] = "yes"

    def _register(self, entry: Mapping[str, Any], model_id: str, run_id: str) -> None:
        from mlflow.exceptions import MlflowException

        name = entry["register_as"]
        source = f"models:/{model_id}"
        if not self._is_served:
            # MLflow would look the id up in the default store of this process, not in this one.
            source = self._client.get_logged_model(model_id).artifact_location
        try:
            with self._lock.held():
                self._ensure_registered(name)
                self._client.create_model_version(
                    name,
                    source=source,
                    run_id=run_id,
                    model_id=model_id if self._is_served else None,
                    tags=dict(entry["params"]) or None,
                    await_creation_for=0,
                )
        except MlflowException as fault:
            if fault.error_code not in REJECTED:
                raise
            logger.warning(
                "MLflow does not register %s as %s: %s", entry["name"], name, describe_fault(fault)
            )

    def _ensure_registered(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as fault:
            if fault.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def describe_model(
    directory: Path, target: Path, entry: Mapping[str, Any], *, run_id: str, model_id: str
) -> None:
    """Write a model directory as an MLflow model.

    Args:
        directory: what `moe_dist.inference.save_model` wrote.
        target: where to write; must not exist.
        entry: the fields of a `TrackedModel`.
        run_id: the run that made it.
        model_id: the model's id on the server.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    settings = {"max_length": entry["max_length"], "form": _FORM}
    for key in ("task", "options", "calibration"):
        # What waits since an earlier version lacks some.
        if entry.get(key) not in (None, "", {}):
            settings[key] = entry[key]
    with warnings.catch_warnings():
        # It asks for an example input, with which it would load the model to try it.
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            path=str(target),
            loader_module=LOADER_MODULE,
            data_path=str(directory),
            mlflow_model=Model(artifact_path=entry["name"], run_id=run_id, model_id=model_id),
            signature=_signature(entry),
            pip_requirements=_requirements(),
            model_config=settings,
        )


def _signature(entry: Mapping[str, Any]) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Map, Schema

    # Without names a plain list of texts is taken too, and any names of columns are.
    names = entry.get("inputs") or [None] * entry["num_texts"]
    columns = [ColSpec(DataType.string, name) for name in names]
    types = {
        "text": DataType.string,
        "number": DataType.double,
        "numbers": Array(DataType.double),
        "named numbers": Map(DataType.double),
    }
    # What waits since an earlier version says nothing of its answers.
    labelled = {"label": "text", "score": "number", "scores": "named numbers"}
    answers = entry.get("answers") or (labelled if entry["labels"] else {"value": "number"})
    outputs = [ColSpec(types[content], name) for name, content in answers.items()]
    return ModelSignature(inputs=Schema(columns), outputs=Schema(outputs))


def _requirements() -> list[str]:
    found = []
    for name in _REQUIREMENTS:
        try:
            # What follows a + names a build, such as +cpu, which no index need have.
            found.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            found.append(name)
    return found
