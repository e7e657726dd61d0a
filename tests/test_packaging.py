"""What a user installs: the wheel, the pins, the launcher file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command as a user would, without this checkout on the path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A build writes beside its source, so it gets a copy.
    kept = ("moe_dist", "pipelines", "cluster")
    for package in kept:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", folder, source),
        cwd=folder,
    )
    return next(folder.glob("moe_dist-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the bin directory of an environment that holds the wheel and sees our dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    run(
        *(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"),
        *("--quiet", "--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    # Only the dependencies: our own editable install would hide what the wheel lacks.
    visible = packages / "dependencies"
    visible.mkdir()
    ours = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    for entry in ours.iterdir():
        if "moe_dist" not in entry.name and entry.suffix != ".pth":
            (visible / entry.name).symlink_to(entry)
    (packages / "dependencies.pth").write_text(f"{visible}\n")
    return folder / "bin"


@pytest.mark.slow
def test_a_wheel_holds_one_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"moe_dist"}
    assert "moe_dist/_pipelines/cli.py" in names
    assert "moe_dist/_cluster/__init__.py" in names
    assert "moe_dist/py.typed" in names
    recipes = {path.name for path in (ROOT / "pipelines" / "recipes").glob("*.yaml")}
    assert {f"moe_dist/_pipelines/recipes/{name}" for name in recipes} <= set(names)


@pytest.mark.slow
def test_a_wheel_holds_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package, target in (
        ("moe_dist", "moe_dist"),
        ("pipelines", "moe_dist/_pipelines"),
        ("cluster", "moe_dist/_cluster"),
    ):
        for path in (ROOT / package).rglob("*.py"):
            assert f"{target}/{path.relative_to(ROOT / package).as_posix()}" in names


@pytest.mark.slow
def test_the_installed_command_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert "compress" in run(installed / "moe-dist", "--help", cwd=tmp_path)
    script = "import moe_dist._pipelines.cli as cli; print(cli.__file__)"
    where = run(installed / "python", "-c", script, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent)


@pytest.mark.slow
def test_every_installed_module_can_be_imported(installed: Path, tmp_path: Path) -> None:
    script = (
        "import importlib, pkgutil, moe_dist\n"
        "for module in pkgutil.walk_packages(moe_dist.__path__, 'moe_dist.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
    )
    run(installed / "python", "-c", script, cwd=tmp_path)


def test_the_same_program_runs_from_the_checkout() -> None:
    assert "compress" in run(sys.executable, "-m", "pipelines", "--help", cwd=ROOT)


def test_pipelines_import_each_other_by_relative_names() -> None:
    """A wheel knows them as moe_dist._pipelines; what only a type checker reads may differ."""
    absolute = re.compile(r"^\s*(?:from|import) (?:pipelines|cluster)\b", re.MULTILINE)
    unread = re.compile(r"^if TYPE_CHECKING:\n(?:[ \t].*\n|\n)*", re.MULTILINE)
    wrong = [
        str(path.relative_to(ROOT))
        for package in ("pipelines", "cluster", "moe_dist")
        for path in (ROOT / package).rglob("*.py")
        if absolute.search(unread.sub("", path.read_text(encoding="utf-8")))
    ]
    assert wrong == []


def test_constraints_are_exact_and_name_no_place() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    exact = re.compile(r"^[A-Za-z0-9._-]+==[A-Za-z0-9.]+$")
    assert [pin for pin in pins if not exact.match(pin)] == []
    assert not any(pin.lower().startswith(("moe-dist=", "moe_dist=")) for pin in pins)
    assert any(pin.startswith("torch==2.13.") for pin in pins)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {_normal(re.split(r"[\[<>=~! ]", line)[0]) for line in wanted}
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_normal(line.split("==")[0]) for line in constraints if "==" in line}
    # pip freeze leaves the installers out.
    assert names - pinned <= {"setuptools"}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_ray_accepts_the_launcher_file() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    ray = pytest.importorskip("ray")
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(config, json.loads(schema.read_text(encoding="utf-8")))
    assert config["head_node_type"] in config["available_node_types"]


def test_the_launcher_s_image_has_the_pinned_ray() -> None:
    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text(encoding="utf-8"))
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    version = next(pin.partition("==")[2] for pin in pins if pin.startswith("ray=="))
    images = [config["docker"]["image"]]
    images += [
        node["docker"]["worker_image"]
        for node in config["available_node_types"].values()
        if "docker" in node
    ]
    assert all(image.startswith(f"rayproject/ray:{version}-py311") for image in images)
