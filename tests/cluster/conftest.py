"""A recipe small enough for a job, and the servers that the job needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.head import Head, running_head, running_mlflow
from tests.pipelines.conftest import tiny_bert, tiny_settings, write_recipe

__all__ = ["tiny_bert", "tiny_settings", "write_recipe"]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two CPUs")
    with running_head() as started:
        yield started


@pytest.fixture(scope="package")
def mlflow_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tracking server keeps its database and artifacts."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="package")
def mlflow_uri(mlflow_directory: Path) -> Iterator[str]:
    with running_mlflow(mlflow_directory) as address:
        yield address
