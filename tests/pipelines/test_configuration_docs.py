"""docs/configuration.md says what the models say."""

from __future__ import annotations

from moe_dist.config import RunConfig
from pipelines.configuration_docs import DOCUMENT, render_configuration


def test_the_document_is_in_step_with_the_models() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render_configuration(), "run `make docs`"


def test_every_key_is_described() -> None:
    text = render_configuration()
    for name, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for dotted, described in (
            {name: field} if inner is None else {f"{name}.{key}": f for key, f in inner.items()}
        ).items():
            assert described.description, dotted
            assert f"| `{dotted}` |" in text
