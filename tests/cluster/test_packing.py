"""What a job carries: source and recipes, and neither data, results, caches nor credentials."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from cluster.packing import MIB, Package, collect, size_faults, write_package

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    kept = ("moe_dist/data/files.py", "recipes/mine.yaml", "pipelines/__main__.py")
    left = (
        *("data/train.tsv", "outputs/run/model.safetensors", "mlflow.db", "mlruns/1/meta.yaml"),
        *(".git/config", ".venv/bin/python", "moe_dist/__pycache__/x.pyc", ".env", "key.pem"),
        *("ignored/by-git.bin", "sub/.aws/credentials", ".mypy_cache/x"),
    )
    for name in (*kept, *left):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x" * 10)
    (root / ".gitignore").write_text("/ignored/\n")
    return root


def test_source_goes_along_and_the_rest_stays(checkout: Path, tmp_path: Path) -> None:
    package = collect(checkout)
    expected = {"moe_dist/data/files.py", "recipes/mine.yaml", "pipelines/__main__.py"}
    assert set(package.sizes) - {".gitignore"} == expected
    assert package.holds(checkout / "recipes") and package.holds(checkout / "recipes/mine.yaml")
    assert not package.holds(checkout / "data/train.tsv")
    assert not package.holds(tmp_path / "elsewhere")

    # What Ray packs is what was counted.
    archive = tmp_path / "package.zip"
    write_package(package, archive, {".moe-dist/recipe.yaml": "name: x\n"})
    with zipfile.ZipFile(archive) as content:
        assert set(content.namelist()) == {*package.sizes, ".moe-dist/recipe.yaml"}
        assert content.read(".moe-dist/recipe.yaml") == b"name: x\n"
    assert not (checkout / ".moe-dist").exists()


def test_more_can_be_left_out(checkout: Path) -> None:
    assert "recipes/mine.yaml" not in collect(checkout, ["/recipes"]).sizes


def test_too_large_a_directory_names_its_biggest_folders() -> None:
    sizes = {"a/1": 6 * MIB, "a/2": 6 * MIB, "b/c": 3 * MIB, "d": 2 * MIB, "e": 1}
    package = Package(Path("/x"), sizes, ())
    (fault,) = size_faults(package, 16)
    assert "17 MiB" in fault and "a (12 MiB), b (3 MiB), d (2 MiB)" in fault
    assert "--exclude" in fault
    assert size_faults(package, 18) == []


def test_this_checkout_is_small_enough() -> None:
    package = collect(ROOT)
    assert "pipelines/__main__.py" in package.sizes and "moe_dist/data/files.py" in package.sizes
    assert not any(name.startswith((".git/", ".venv/")) for name in package.sizes)
    assert size_faults(package, 100) == []
