"""Run accuracy tasks with lm-eval, which defines prompts, data and metrics. This needs the extra ``tasks``."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitwright.core.errors import UserError
from bitwright.core.progress import Listener
from bitwright.evaluation import humaneval
from bitwright.evaluation.answers import Answering, Answers, new_tokens
from bitwright.evaluation.code_execution import Outcome
from bitwright.evaluation.scores import TaskScore, read_scores
from bitwright.evaluation.task_names import known_tasks, leaves

SHOTS_SEED = 1234  # lm-eval's default; with it, a question has the same examples in every run


@dataclass(frozen=True)
class Prepared:
    """The loaded tasks and groups of a name that was asked for; ``code`` is the configuration of a code task."""

    name: str
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    code: Mapping[str, Any] | None = None


def prepare(
    names: Sequence[str], files: Sequence[Path], *, shots: int | None, code_allowed: bool, context: int
) -> tuple[Prepared, ...]:
    """Load tasks and their data, for a model with ``context`` tokens. Raises UserError, before any model is loaded.

    ``shots`` None means each task's own number of examples.
    """
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # its warnings are counted by us, or are of no use to our users
    datasets.disable_progress_bars()
    manager = known_tasks(names, files)
    for name in names:
        _check_code(manager, name, code_allowed)
    with _seeded():
        prepared = tuple(_load(manager, name) for name in dict.fromkeys(names))
    for selection in prepared:
        for name, task in selection.tasks.items():
            _set_shots(task, shots)
            _check_room(name, task, context)
    return prepared


def needs_end_of_text(prepared: Sequence[Prepared]) -> bool:
    """Whether a task generates text, for which the tokenizer needs an end of text."""
    return any(task.OUTPUT_TYPE == "generate_until" for selection in prepared for task in selection.tasks.values())


def run_tasks(
    prepared: Sequence[Prepared],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Answers,
    *,
    context: int,
    limit: int | None,
    batch_size: int,
    listener: Listener,
) -> tuple[tuple[TaskScore, ...], tuple[str, ...]]:
    """Score a loaded model on ``limit`` documents per task; return scores and notes."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=context)
    scores: list[TaskScore] = []
    notes: list[str] = []
    for selection in prepared:
        name = selection.name
        answering = Answering(lm, answers, name, listener)
        results = _evaluate(selection, answering, limit)
        if selection.code is None:
            scores += read_scores(name, selection.groups, results, answering.cut)
        else:
            outcomes = humaneval.run_all(name, humaneval.programs(selection.code, results["samples"][name]), listener)
            scores.append(_code_score(name, results, outcomes, answering.cut[name]))
            if not all(outcome.isolated for outcome in outcomes):
                notes.append(
                    f"{name}: programs could reach the network and other processes; this kernel does not isolate"
                )
    return tuple(scores), tuple(notes)


def _evaluate(selection: Prepared, answering: Answering, limit: int | None) -> dict[str, Any]:
    for task in selection.tasks.values():
        task.set_fewshot_seed(seed=SHOTS_SEED)
    with _seeded():
        results: dict[str, Any] = evaluate(
            lm=answering,
            task_dict={"tasks": dict(selection.tasks), "groups": dict(selection.groups)},
            limit=limit,
            log_samples=selection.code is not None,
            confirm_run_unsafe_code=selection.code is not None,  # it only generates; see humaneval
        )
    return results


@contextmanager
def _seeded() -> Iterator[None]:
    """A context with lm-eval's default seeds, for tasks that shuffle or sample; it restores the random state."""
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        numpy.random.seed(SHOTS_SEED)
        torch.manual_seed(SHOTS_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)


def _check_code(manager: TaskManager, name: str, allowed: bool) -> None:
    """Raise UserError for generated code without permission, and for code that the sandbox cannot run."""
    for task, config in leaves(manager, name):
        if not humaneval.is_code(config):
            continue
        if not allowed:
            raise UserError(
                f"task {task} runs the code that the model writes, on this machine; give --allow-code-execution (in "
                "Python allow_code_execution=True) to permit it, in a process with limits of time and memory"
            )
        humaneval.require_known_shape(task, config)
        if task != name:
            raise UserError(f"task {task} of {name} runs generated code; name it by itself: --tasks {task}")


def _load(manager: TaskManager, name: str) -> Prepared:
    """Load a task, or a group with all of its tasks, with the data."""
    configs = dict(leaves(manager, name))
    if name in configs and humaneval.is_code(configs[name]):
        code = configs[name]
        config = humaneval.without_its_metric(code)
        return Prepared(
            name, {name: _loaded(name, configs, lambda: ConfigurableTask(config=config))}, {}, configs[name]
        )
    loaded = _loaded(name, configs, lambda: manager.load([name]))
    return Prepared(name, loaded["tasks"], loaded.get("groups", {}))


def _loaded(name: str, configs: Mapping[str, Mapping[str, Any]], load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # datasets and huggingface_hub raise many kinds, and a task's own functions any
        reason = (str(error).splitlines() or ["no message"])[0]
        data = sorted({str(config["dataset_path"]) for config in configs.values() if "dataset_path" in config})
        raise UserError(
            f"task {name} could not be prepared: its data is {', '.join(data[:3]) or 'its own'}, and "
            f"{type(error).__name__} says: {reason}. Without a network, load the dataset once with one, on this "
            "machine or into a copied HF_HOME; or describe a local copy in a task file (--task-files)"
        ) from None


def _set_shots(task: Any, shots: int | None) -> None:
    """Set the number of examples as lm-eval does: a task that fixes 0 keeps 0, and the default is 0."""
    fixed = task.get_config("num_fewshot")
    if shots is not None and fixed != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif fixed is None:
        task.set_config(key="num_fewshot", value=0)


def _check_room(name: str, task: Any, context: int) -> None:
    """Raise UserError for a task whose answers alone are longer than the model's context."""
    if task.OUTPUT_TYPE != "generate_until":
        return
    longest = new_tokens(task.get_config("generation_kwargs") or {})
    if longest >= context:
        raise UserError(
            f"task {name} lets the model write {longest} tokens, and its context is {context} tokens with the prompt; "
            "take a model with a longer one, or a task file with a smaller max_gen_toks"
        )


def _code_score(name: str, results: Mapping[str, Any], outcomes: Sequence[Outcome], cut: int) -> TaskScore:
    value, error = humaneval.pass_at_1(outcomes)
    return TaskScore(
        task=name,
        metric=humaneval.METRIC,
        filter="none",
        value=value,
        standard_error=error,
        documents=len(outcomes),
        shots=int(results["n-shot"].get(name) or 0),
        version=str(results["versions"].get(name)),
        cut=cut,
    )
