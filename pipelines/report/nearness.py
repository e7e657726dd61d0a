"""How near students are to their teacher: what `evaluate` measures, keeps and reads again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_dist.errors import CheckpointError
from moe_dist.whole_files import whole_file

from ..console import signed

if TYPE_CHECKING:
    from moe_dist.data.loaders import Encoded
    from moe_dist.jobs.job_data import AnyJobData
    from moe_dist.measure.bootstrap import Interval
    from moe_dist.measure.evaluation import Predictions

HIDDEN, PREDICTION = "hidden_error", "prediction_error"
MEASURES = (HIDDEN, PREDICTION)
FILE_NAME = "imitation.npz"
MAX_SAMPLES = 2048
"""Of each task's dev rows so many are looked at: the spread of a mean is small by then."""

Errors = Mapping[str, Mapping[str, Any]]
"""By measure, and then by model's name: an error for each sample, (N,) float32."""


@dataclass(frozen=True)
class Imitation:
    """How near each student is to the teacher.

    Attributes:
        tasks: the errors of each task; the one name "" where there is one task.
    """

    tasks: Mapping[str, Errors]

    def mean(self, measure: str, name: str) -> float | None:
        """Average a student's error over samples, then tasks; None where it was not measured."""
        parts = [errors[measure][name] for errors in self.tasks.values() if name in errors[measure]]
        if len(parts) < len(self.tasks):
            return None
        return float(np.mean([np.mean(part, dtype=np.float64) for part in parts]))

    def difference(self, measure: str, first: str, second: str, seed: int) -> Interval | None:
        """Compare two students' errors on the same samples; None where one was not measured.

        Returns the difference of the mean errors, the first's minus the second's, and its
        bootstrap interval.
        """
        from moe_dist.measure.bootstrap import mean_over_tasks, resample_mean_differences

        if any(not {first, second} <= set(errors[measure]) for errors in self.tasks.values()):
            return None
        drawn = [
            resample_mean_differences(
                [errors[measure][first]], [errors[measure][second]], seed=seed + number
            )
            for number, errors in enumerate(self.tasks.values())
        ]
        return mean_over_tasks(drawn).interval()


def measure_imitation(
    loaded: Mapping[str, Any],
    data: AnyJobData,
    *,
    teacher: str,
    batch_size: int,
    advance: Callable[[], None],
) -> tuple[Imitation, dict[str, dict[str, Predictions]]]:
    """Compare all students with the teacher on the first dev rows of each task.

    Args:
        loaded: model by name, the teacher among them.
        data: holds the dev rows.
        teacher: its name.
        batch_size: samples for one forward.
        advance: called after each batch.

    Returns:
        The errors; and by task what each model answered, where all dev rows were looked at as
        `moe_dist.measure.evaluation.predict` does, so that nobody need ask again.
    """
    from moe_dist.measure.nearness import measure_errors
    from moe_dist.moe.routing import use_task

    first: dict[int, str] = {}
    # A student that was not trained has two names.
    alike = {name: first.setdefault(id(model), name) for name, model in loaded.items()}
    del alike[teacher]
    students = {name: loaded[name] for name in dict.fromkeys(alike.values())}
    tasks: dict[str, Errors] = {}
    answers: dict[str, dict[str, Predictions]] = {}
    # A GPU answers in less than float32, in which models are compared.
    answers_alike = next(loaded[teacher].parameters()).device.type == "cpu"
    for number, (task, part) in enumerate(data.parts.items()):
        encoded = part.dev.subset(range(min(len(part.dev), MAX_SAMPLES)))
        with use_task(number if task else None):
            found = measure_errors(
                loaded[teacher],
                students,
                encoded,
                batch_size=batch_size,
                pad_token_id=part.pad_token_id,
                advance=advance,
            )
        tasks[task] = {
            measure: {
                name: _by_row(errors[own].numpy(), encoded)
                for name, own in alike.items()
                if own in errors  # Of hidden states those of the teacher's shape alone.
            }
            for measure, errors in ((HIDDEN, found.hidden), (PREDICTION, found.predicted))
        }
        if found.teacher is not None and answers_alike and len(encoded) == len(part.dev):
            answers[task] = {teacher: found.teacher}
            answers[task] |= {name: found.students[own] for name, own in alike.items()}
    return Imitation(tasks), answers


def _by_row(errors_N: NDArray[Any], encoded: Encoded) -> NDArray[Any]:
    """Average the errors of samples that were made of one row, as an interval is to resample rows.

    They count by what their losses are sums over. Rows are in the order of their first samples.
    """
    _, first, row_N = np.unique(encoded.sample_ids, return_index=True, return_inverse=True)
    if len(first) == len(errors_N):
        return errors_N
    counts_N = encoded.num_targets
    weights_N = np.ones(len(errors_N)) if counts_N is None else counts_N.astype(np.float64)
    means = np.bincount(row_N, errors_N * weights_N) / np.bincount(row_N, weights_N).clip(min=1)
    return means[np.argsort(first)].astype(errors_N.dtype)


def count_batches(data: AnyJobData, batch_size: int) -> int:
    """Say how often `measure_imitation` calls `advance`."""
    return sum(-(-min(len(part.dev), MAX_SAMPLES) // batch_size) for part in data.parts.values())


def describe_imitation(
    imitation: Imitation, student: str, before: str
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Sum up what was measured.

    Args:
        imitation: of all students.
        student: the main one's name.
        before: what follows a student's name and a slash before its distillation.

    Returns:
        For each student `imitation` and `imitation_before_distillation`, with a value for each
        measure, and `imitation_change`, after minus before; and for each comparison the main
        student's errors minus its own.
    """
    names = [name for name in next(iter(imitation.tasks.values()))[PREDICTION] if "/" not in name]
    entries = {
        name: {
            key: {measure: imitation.mean(measure, own) for measure in MEASURES}
            for key, own in (
                ("imitation", name),
                (f"imitation_{before}", f"{name}/{before}"),
            )
        }
        | {"imitation_change": _differences(imitation, name, f"{name}/{before}")}
        for name in names
    }
    others = [name for name in names if name != student]
    return entries, {name: _differences(imitation, student, name) for name in others}


def _differences(imitation: Imitation, first: str, second: str) -> dict[str, Any]:
    found = {measure: imitation.difference(measure, first, second, seed=0) for measure in MEASURES}
    return {measure: asdict(interval) for measure, interval in found.items() if interval}


def save_imitation(imitation: Imitation, directory: Path) -> None:
    """Write the errors of each task beside its predictions."""
    for task, errors in imitation.tasks.items():
        arrays = {
            f"{measure}/{name}": values
            for measure, own in errors.items()
            for name, values in own.items()
        }
        with whole_file(directory / task / FILE_NAME) as beside, beside.open("wb") as stream:
            np.savez(stream, **arrays)


def load_imitation(path: Path) -> dict[str, dict[str, Any]]:
    """Read one task's errors by measure and model; none where the run was measured before them.

    A CheckpointError if the file is damaged.
    """
    found: dict[str, dict[str, Any]] = {measure: {} for measure in MEASURES}
    if not path.exists():
        return found
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                measure, _, name = key.partition("/")
                found[measure][name] = arrays[key]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(
            f"imitation errors {path} cannot be read: {error}",
            remedy="delete the stage's directory and run evaluate again",
        ) from error
    return found


def imitation_lines(differences: Mapping[str, Mapping[str, Any]], student: str) -> Sequence[str]:
    """Say for each comparison which student is nearer: by hidden error where both have one."""
    lines = []
    for name, found in differences.items():
        measure = next(one for one in MEASURES if one in found)
        entry = found[measure]
        if entry["high"] < 0:
            claim = f"{student} is nearer to the teacher than {name}"
        elif entry["low"] > 0:
            claim = f"{name} is nearer to the teacher than {student}"
        else:
            claim = f"{student} and {name} are equally near to the teacher"
        lines.append(f"{claim} ({_told(measure, entry, f' of {student} minus {name}:')})")
    return lines


def drift_lines(entries: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Warn of students that their distillation led away from the teacher.

    One error rose, its whole interval above 0, and none fell. Entries of an earlier version
    hold no change.
    """
    lines = []
    for name, entry in entries.items():
        change = entry.get("imitation_change", {})
        has_risen = any(found["low"] > 0 for found in change.values())
        if has_risen and not any(found["high"] < 0 for found in change.values()):
            figures = "; ".join(_told(measure, found) for measure, found in change.items())
            lines.append(
                f"distillation led {name} away from its teacher ({figures}); what to look at is "
                "train.learning_rate, distill.task_weight and distill.dropout"
            )
    return lines


def _told(measure: str, entry: Mapping[str, float], of_what: str = "") -> str:
    difference, low, high = signed(entry["difference"], entry["low"], entry["high"])
    return f"{measure.replace('_', ' ')}{of_what} {difference}, 95 % interval {low} to {high}"
