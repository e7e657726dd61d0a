"""Documents and texts that others wrote, kept where they have the form that a comparison needs.

A store is shared with other programs, `report.json` is nobody's name alone, and a run may be called
anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..stages.evaluate import STUDENT, TEACHER

MAX_NUMBER = 1e300
"""MLflow keeps infinity as the largest number there is."""
_TABLES = ("metrics", "parameters", "latency_ms")
_FIGURES = ("flops_per_token", "retention")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def number(value: object) -> float | None:
    """Read a number; None for everything else, NaN and infinity included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < MAX_NUMBER else None


def numbers(content: object) -> dict[str, float]:
    """Read a mapping of numbers; other entries are left out."""
    if not isinstance(content, Mapping):
        return {}
    found = {str(name): number(value) for name, value in content.items()}
    return {name: value for name, value in found.items() if value is not None}


def clean_report(content: Mapping[str, Any]) -> dict[str, Any]:
    """Read the parts of a chain's `report.json` that are compared; empty for another document."""
    main_metric, student = content.get("main_metric"), content.get(STUDENT)
    if not isinstance(main_metric, str) or not isinstance(student, Mapping):
        return {}
    compared = content.get("comparisons")
    labels = [
        label
        for label in (compared if isinstance(compared, list) else ())
        if isinstance(label, str) and isinstance(content.get(label), Mapping)
    ]
    differences, titles = content.get("differences"), content.get("metric_titles")
    clean = {label: _entry(content[label]) for label in labels}
    return clean | {
        "main_metric": main_metric,
        # A report of an earlier version has no metric that is better the lower.
        "higher_is_better": content.get("higher_is_better") is not False,
        "metric_titles": {
            str(name): str(title)
            for name, title in (titles.items() if isinstance(titles, Mapping) else ())
        },
        TEACHER: _entry(content.get(TEACHER)),
        STUDENT: _entry(student),
        "comparisons": labels,
        "differences": {
            str(name): entry
            for name, entry in (differences.items() if isinstance(differences, Mapping) else ())
            if isinstance(entry, Mapping) and {"low", "high"} <= numbers(entry).keys()
        },
        "seconds": numbers(content.get("seconds")),
    }


def clean_loads(content: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Read each expert's share, by model and layer, of a JSON document of the stage `evaluate`."""
    details = content.get("details")
    models = details.get("expert_loads") if isinstance(details, Mapping) else None
    found: dict[str, dict[str, list[float]]] = {}
    for model, layers in models.items() if isinstance(models, Mapping) else ():
        for layer, shares in layers.items() if isinstance(layers, Mapping) else ():
            values = [number(share) for share in shares] if isinstance(shares, list) else []
            clean = [value for value in values if value is not None and value >= 0]
            if clean and len(clean) == len(values):
                found.setdefault(str(model), {})[str(layer)] = clean
    return found


def shown(text: str, *, kept: str = "") -> str:
    """Make a foreign text harmless where it is shown; control characters in `kept` may stay.

    Others (a terminal would obey them), changes of its direction and halves of characters are
    replaced.
    """
    return _HARMFUL.sub(lambda found: found[0] if found[0] in kept else _REPLACEMENT, text)


def _entry(content: object) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        return {}
    entry = {str(name): value for name, value in content.items()}
    return (
        entry
        | {name: numbers(entry[name]) for name in _TABLES if name in entry}
        | {name: number(entry[name]) for name in _FIGURES if name in entry}
    )
