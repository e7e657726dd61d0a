"""Names of the packages in a wheel.

`pipelines` and `cluster` stand at the top of the checkout, where `python -m pipelines` finds them.
As installed names they would collide with other projects', so a wheel holds them under `moe_dist`.
"""

from __future__ import annotations

from setuptools import find_packages, setup

_RENAMED = {"pipelines": "moe_dist._pipelines", "cluster": "moe_dist._cluster"}


def _installed_names() -> list[str]:
    names = find_packages(include=["moe_dist", "moe_dist.*"])
    for source, target in _RENAMED.items():
        found = find_packages(include=[source, f"{source}.*"])
        names += [target + name.removeprefix(source) for name in found]
    return names


setup(
    packages=_installed_names(),
    package_dir={"": ".", **{target: source for source, target in _RENAMED.items()}},
)
