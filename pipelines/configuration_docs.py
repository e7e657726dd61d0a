"""Write docs/configuration.md from the pydantic models.

Run it with `make docs` or `python -m pipelines.configuration_docs`.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moe_dist.config import RunConfig
from moe_dist.config.sections import Section
from moe_dist.config.setting_kinds import in_flight_meaning, kind_of

from .markdown import markdown_table

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

_HEAD = """\
# Configuration

<!-- Written by `make docs` from the sections in moe_dist/config; a test keeps the two in step. -->

A recipe is a YAML file with the sections below; `pipelines/recipes/` holds examples. Any key can be
changed on the command line by its dotted name. The value is YAML; that of a key of text is the
text as it stands (`--set 'tracking.experiment=run #3'`), and `null` stands for "not given":

```
moe-dist compress pipelines/recipes/demo.yaml --set moe.router=hash_random --set 'moe.layers=[0, 2]'
```

`--dry-run` checks a recipe and stops. Unknown keys are refused, and everything that is wrong is
listed at once. Relative paths are relative to the working directory.

Keys without a default must be given; `null` means "not given".

A key's kind says what a change of it does. `learning`: what is learned, or what it is measured on;
the stages that read it are done anew, and MLflow gets another run. `placement` (where and how the
work is done) and `observation` (what is watched, recorded or put beside it) leave finished results
and the run as they are. `in flight`: a population of `moe-dist search` may change it in training.
"""

_RULES = """\
## Rules across keys

- `parallel.ep_size` divides `moe.num_experts` and `parallel.num_workers`; of a pair of worker
  counts it divides one between them.
- `moe.num_shared_neurons` is at most `moe.expert_size`, which counts the shared neurons too.
- `moe.top_k` is at most `moe.num_experts`.
- `moe.tie_shared` needs shared neurons and several experts.
- A batch gives every micro-batch of every worker a sample: `train.batch_size` is at least
  `parallel.num_workers` × `train.accumulation`; of a pair, its larger number counts.
- `distill.load_balancing_weight`, `distill.z_loss_weight`, `distill.entropy_weight`,
  `moe.gate_noise` and `moe.gate_jitter` need a router with a gate.
- `data.source: tasks` needs two or more `data.tasks`, and no other key of `data` but `data.mixing`
  and `data.mixing_temperature`. It cannot be joined with `search.space`,
  `distill.adversarial_weight`, the partitions `coactivation` and `clustered_importance`, or, under
  `task_gate` and `merged_task`, `distill.load_balancing_weight`.
- `moe.partition: task_importance` needs `data.source: tasks`, `moe.router: task_gate`, and no more
  experts than tasks times `moe.top_k`.
- `moe.partition: token_clusters` needs `moe.router: token_gate`; `moe.fit_output: true`
  needs `moe.top_k: 1`.
- Of routers that merge experts (docs/merged_experts.md): `moe.combine` says the same as
  `moe.router`, or `auto`; they know no `moe.capacity_factor`, `moe.gate_noise`, `moe.gate_jitter`,
  `moe.gate_scale: probability`, `moe.task_map: fixed` and `moe.fit_output: true`. Under
  `merged_sequence` and `merged_token` `parallel.ep_size` is 1. Any partition but `full_copy` is
  allowed with a warning.
- `data.source: files` needs `data.train`, and `data.dev` or `data.dev_size`; the other sources need
  `data.name`.
- `student.layer_map` as a list names one teacher layer for each of `student.num_layers`.
- `distill.attention_weight` needs as many heads in the student as in the teacher.
- `search.space` names keys that exist, with values that they may hold; points of it are checked as
  whole recipes (docs/search.md).
- A comparison may change `student`, `moe`, `distill`, `train` and `parallel`; the teacher and the
  data are the same for all students of a run.

## Comparisons

`compare: [dense]` trains the plain pruned student beside the main one: one expert with as many
neurons as a token uses in the main student, chosen by importance, without routing, at `ep_size` 1.
Others are named sets of overrides:

```yaml
compare:
  dense:
  random: {moe.partition: random}
  gate: {moe.router: token_gate, moe.tie_shared: true}
```
"""


def render_configuration() -> str:
    """Describe every key of a recipe: the text of docs/configuration.md."""
    tops = [name for name, field in RunConfig.model_fields.items() if not _section(field)]
    parts = [_HEAD, "## Top level\n\n" + _table("", RunConfig, tops)]
    for name, field in RunConfig.model_fields.items():
        section = _section(field)
        if section is not None:
            heading = f"## {name}\n\n{field.description}\n\n"
            parts.append(heading + _table(f"{name}.", section, list(section.model_fields)))
    return "\n".join([*parts, _RULES])


def main() -> None:
    """Write the document."""
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(render_configuration(), encoding="utf-8")


def _table(prefix: str, section: type[Section], names: list[str]) -> str:
    rows = []
    for name in names:
        field = section.model_fields[name]
        kind: str = kind_of(section, name)
        if in_flight_meaning(section, name):
            kind += ", in flight"
        meaning = field.description or ""
        rows.append([f"`{prefix}{name}`", _values(field), _default(field), kind, meaning])
    return "\n".join(markdown_table(["key", "values", "default", "kind", "meaning"], rows)) + "\n"


def _section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    assert value is not PydanticUndefined
    if isinstance(value, Path):
        value = str(value)
    return f"`{_yaml(value)}`" if value != "" else "empty"


def _values(field: FieldInfo) -> str:
    bounds = [_bound(rule) for rule in field.metadata]
    return ", ".join([_kind(field.annotation), *filter(None, bounds)])


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in arguments if part is not type(None))
    if origin is typing.Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin is tuple:
        plurals = {"text": "names", "whole number": "whole numbers"}
        entry = _kind(arguments[0])
        return "list of " + plurals.get(entry, entry)
    names = {bool: "`true`, `false`", int: "whole number", float: "number", Path: "path"}
    return names.get(annotation, "mapping" if origin is dict else "text")


def _bound(rule: Any) -> str:
    for sign, words in (
        ("gt", "above"),
        ("ge", "at least"),
        ("lt", "below"),
        ("le", "at most"),
    ):
        bound = getattr(rule, sign, None)
        if bound is not None:
            return f"{words} {bound:,}" if isinstance(bound, int) else f"{words} {bound:g}"
    return ""


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
