"""What is looked at before a student is compacted: nothing starts that cannot end well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_dist.errors import ConfigError

if TYPE_CHECKING:
    from .compact_settings import CompactSettings


def check_compaction(student: Any, settings: CompactSettings, *, compares_attention: bool) -> None:
    """See that all that is asked for can be done.

    Args:
        student: the loaded model.
        settings: what is asked for.
        compares_attention: whether the recipe's losses do.

    Raises:
        ConversionError: if the student has too few experts or neurons.
        ConfigError: if the output would take an input's place, or the teacher is of another kind.
    """
    from moe_dist.inference.compact import check_reduction
    from moe_dist.inference.prune import check_expert_size

    if settings.num_experts is not None:
        check_reduction(student, settings.num_experts)
    if settings.expert_size is not None:
        check_expert_size(student, settings.expert_size)
    faults = _place_faults(settings)
    if settings.teacher is not None:
        faults += _teacher_faults(student, settings, compares_attention=compares_attention)
    if faults:
        raise ConfigError(faults, source="compact")


def _place_faults(settings: CompactSettings) -> list[str]:
    output = settings.output.resolve()
    faults = []
    for name, given in (("the student", settings.directory), ("--teacher", settings.teacher)):
        if given is not None and output in (given.resolve(), *given.resolve().parents):
            faults.append(
                f"{name} lies in --output={settings.output}, which is cleared first; choose "
                "another directory."
            )
    return faults


def _teacher_faults(
    student: Any, settings: CompactSettings, *, compares_attention: bool
) -> list[str]:
    from moe_dist.conversion.heads import read_heads
    from moe_dist.inference import load_model, load_tokenizer

    assert settings.teacher is not None
    teacher = load_model(settings.teacher)
    own, other = _facts(student), _facts(teacher)
    if not compares_attention:
        del own["attention heads"], other["attention heads"]
    own["tasks"], other["tasks"] = ([*map(str, read_heads(model))] for model in (student, teacher))
    vocabularies = [
        load_tokenizer(path).get_vocab() for path in (settings.directory, settings.teacher)
    ]
    faults = [
        f"--teacher and the student differ in {what} ({_short(other[what])} and "
        f"{_short(own[what])}); leave it out, and the student as it was repairs."
        for what in own
        if own[what] != other[what]
    ]
    if vocabularies[0] != vocabularies[1]:
        faults.append(
            "--teacher and the student have different vocabularies, so the same ids are other "
            "words; leave it out, and the student as it was repairs."
        )
    return faults


def _facts(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "kind": type(model).__name__.removeprefix("Moe"),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "attention heads": config.num_attention_heads,
        "labels": list(config.id2label.values()),
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
