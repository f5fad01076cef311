"""Scores of tasks: each is one value of one metric, with the facts that a comparison needs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class TaskScore:
    """The value of one metric for one task or group, as lm-eval defines them.

    ``standard_error`` is None if lm-eval has none for the metric. ``documents`` is the number of documents, ``shots``
    the number of solved examples before each. ``version`` is lm-eval's version of the task; scores of different
    versions cannot be compared. ``cut`` counts the prompts that did not fit in the model's context and lost their
    beginning. ``group`` is the group that was asked for, if the task is a part of it. With a reference, ``difference``
    is value minus reference.
    """

    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    documents: int
    shots: int
    version: str
    cut: int = 0
    group: str | None = None
    reference: float | None = None
    reference_standard_error: float | None = None
    difference: float | None = None


def read_scores(
    name: str, groups: Mapping[str, Any], results: Mapping[str, Any], cut: Mapping[str, int]
) -> Iterator[TaskScore]:
    """Read lm-eval's results: a score per metric and filter of each task, and of each group that has a mean.

    ``name`` is the task or group that was asked for; ``groups`` are lm-eval's groups by name.
    """
    for task, measured in results["results"].items():
        members = [member.task_name for member in groups[task].get_all_tasks()] if task in groups else [task]
        for key, value in measured.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            error = measured.get(f"{metric}_stderr,{filtered}")
            measured_in = [member for member in members if key in results["results"][member]]
            yield TaskScore(
                task=task,
                metric=metric,
                filter=filtered,
                value=float(value),
                standard_error=float(error) if isinstance(error, Real) else None,
                documents=sum(results["n-samples"][member]["effective"] for member in measured_in),
                shots=int(results["n-shot"].get(task) or 0),
                version=str(results["versions"].get(task)),
                cut=sum(cut[member] for member in measured_in),
                group=None if task == name else name,
            )


def side_by_side(scores: Sequence[TaskScore], originals: Sequence[TaskScore]) -> tuple[TaskScore, ...]:
    """Add the original's scores to those of a model; both ran the same tasks.

    >>> ours = TaskScore("piqa", "acc", "none", 0.75, None, 4, 0, "1")
    >>> side_by_side([ours], [replace(ours, value=0.5)])[0].difference
    0.25
    """
    known = {(score.task, score.metric, score.filter): score for score in originals}
    return tuple(_beside(score, known[score.task, score.metric, score.filter]) for score in scores)


def _beside(score: TaskScore, original: TaskScore) -> TaskScore:
    return replace(
        score,
        reference=original.value,
        reference_standard_error=original.standard_error,
        difference=score.value - original.value,
    )
