"""The Dockerfile, as far as it can be checked without building it: no image registry is at hand."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = (
    (ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
)
INSTRUCTIONS = [line.split(None, 1) for line in LINES if line and not line.startswith("#")]


def sources() -> list[str]:
    copies = [words for name, words in INSTRUCTIONS if name == "COPY"]
    return [word for words in copies for word in words.split()[:-1] if not word.startswith("--")]


def test_the_base_is_the_pinned_ray_and_python() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    ray = next(pin.partition("==")[2] for pin in pins if pin.startswith("ray=="))
    (base,) = [words for name, words in INSTRUCTIONS if name == "ARG"]
    assert base == f"RAY_IMAGE=rayproject/ray:{ray}-py311-gpu"
    assert ["FROM", "${RAY_IMAGE}"] in INSTRUCTIONS


def test_everything_that_is_copied_exists_and_reaches_the_builder() -> None:
    ignore = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    let_in = {line[1:] for line in ignore.splitlines() if line.startswith("!")}
    for source in sources():
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in let_in


def test_dependencies_are_pinned_and_installed_before_the_source() -> None:
    texts = [" ".join(pair) for pair in INSTRUCTIONS]
    install = next(i for i, text in enumerate(texts) if "--constraint constraints.txt" in text)
    source = next(i for i, text in enumerate(texts) if text.endswith(" moe_dist moe_dist"))
    assert install < source
    # What setup.py and pyproject.toml read must be there by then.
    before = " ".join(texts[:install])
    for needed in ("constraints.txt", "setup.py", "moe_dist/__init__.py", "README.md", "LICENSE"):
        assert needed in before


def test_it_runs_as_an_ordinary_user_with_tokens_on() -> None:
    users = [words for name, words in INSTRUCTIONS if name == "USER"]
    assert users[-1] == "ray"
    environment = " ".join(words for name, words in INSTRUCTIONS if name == "ENV")
    assert "RAY_AUTH_MODE=token" in environment
    assert not re.search(r"TOKEN=(?!token)|PASSWORD|SECRET", environment)
