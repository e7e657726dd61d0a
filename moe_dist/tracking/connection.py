"""Reaching a tracking store: one error at once where it cannot be used, and no endless retries."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.errors import TrackingError
from moe_dist.tracking.database_lock import DatabaseLock
from moe_dist.tracking.privacy import redact_uri
from moe_dist.uris import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE_TIMEOUT_S = 20
# Seconds, spelled so that a later check tells them from a user's own 4 or 20.
CHECK_TIMEOUT = "04"
REQUEST_TIMEOUT = "020"
REJECTED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"}
"""The server understood and will never accept it: sending it again would block all that follows."""
_TIMEOUT_VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_DATABRICKS = "databricks"


def connect(uri: str, lock: DatabaseLock | None = None) -> MlflowClient:
    """Connect to a store and ask it something; TrackingError if it cannot be used.

    `uri` is `http(s)://...`, `sqlite:///FILE` or another database URI, `databricks` or
    `databricks://PROFILE`; who is going to write gives the `lock` of a sqlite database.
    """
    if uri.startswith("file:") or ("://" not in uri and uri != _DATABRICKS):
        raise TrackingError(
            f"tracking.uri={redact_uri(uri)} names a directory; MLflow no longer stores runs so",
            remedy="Use sqlite:///mlflow.db, or the URL of a tracking server.",
        )
    path = database_path(uri)
    if path is not None:
        _open_sqlite(path)
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Two processes that first open a database would both try to make its tables.
    with usable(uri), (lock or DatabaseLock(path)).held():
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        return client


def check_store(uri: str) -> None:
    """See that a store can be used, without making one; TrackingError if it cannot."""
    path = database_path(uri)
    if path is None or path.exists():
        connect(uri)
        return
    parent = next(one for one in path.absolute().parents if one.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise TrackingError(
            f"the tracking database {path.name} cannot be made in {parent}",
            remedy="Name a file that can be written, for example tracking.uri=sqlite:///mlflow.db.",
        )


@contextmanager
def usable(uri: str) -> Iterator[None]:
    """Turn what goes wrong with a store into one TrackingError, and hurry."""
    # MLflow would retry for minutes; the sender has its own patience. What the user set wins.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    is_ours = os.environ.get(_TIMEOUT_VARIABLE, CHECK_TIMEOUT) in (CHECK_TIMEOUT, REQUEST_TIMEOUT)
    if is_ours:
        os.environ[_TIMEOUT_VARIABLE] = CHECK_TIMEOUT
    try:
        yield
    except TrackingError:
        raise
    except Exception as fault:
        raise TrackingError(
            f"the tracking store {redact_uri(uri)} cannot be used: {describe_fault(fault, uri)}",
            remedy=_remedy(uri),
        ) from None
    finally:
        if is_ours:
            os.environ[_TIMEOUT_VARIABLE] = REQUEST_TIMEOUT


def is_databricks(uri: str) -> bool:
    """Say whether a tracking URI is `databricks` or `databricks://PROFILE`."""
    return uri == _DATABRICKS or uri.startswith(f"{_DATABRICKS}://")


def database_path(uri: str) -> Path | None:
    """Find the file of a sqlite store; None for other stores."""
    path = sqlite_path(uri)
    return Path(path) if path else None


def describe_fault(fault: BaseException, uri: str = "") -> str:
    """Say in one line, without the URI's credentials, why the server could not be used."""
    text = str(fault).strip().splitlines() or [type(fault).__name__]
    line = text[0].replace(uri, redact_uri(uri)) if uri else text[0]
    line = re.sub(r"//[^/@\s]+@", "//", line)
    return line if len(line) <= 300 else line[:300] + " ..."


def _remedy(uri: str) -> str:
    if is_databricks(uri):
        return (
            "Set DATABRICKS_HOST and DATABRICKS_TOKEN, or name a profile of ~/.databrickscfg as "
            "databricks://PROFILE; an experiment's name there is a path such as /Users/me/moe-dist."
        )
    return (
        "Start the server, or correct tracking.uri: sqlite:///mlflow.db needs no server, and "
        "tracking.enabled=false does without MLflow."
    )


def _open_sqlite(path: Path) -> None:
    """Open a sqlite store once, since MLflow would retry a hopeless one for a long time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=SQLITE_TIMEOUT_S)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            connection.rollback()
    except (sqlite3.Error, OSError) as fault:
        raise TrackingError(
            f"the tracking database {path.name} cannot be opened: {fault}",
            remedy="Name a file that can be written, for example tracking.uri=sqlite:///mlflow.db.",
        ) from None
