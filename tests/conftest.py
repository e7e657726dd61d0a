"""What all tests share: few threads, no network, and honest skips."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

# Before torch is imported anywhere: several test processes on few cores are slower with more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray's workers, which it gives a low priority, would starve where other programs compute too.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
# A store of the user's own must not be written to by tests.
os.environ.pop("MLFLOW_TRACKING_URI", None)

import pytest

from tests.hosts.network import why_not

# Tests start processes of a group some fifty times, each of which would import torch for seconds.
multiprocessing.set_forkserver_preload(["tests.distributed.preloaded", "tests.distributed.watched"])

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests whose hardware or rights are missing, and say which."""
    for marker, reason in (("gpu", _no_gpu), ("hosts", why_not)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        why = reason() if marked else None
        if why is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=why))


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device on this machine"


@pytest.fixture
def shared_data() -> Path:
    """The public data sets that lie beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return SHARED_DATA
