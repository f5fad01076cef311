"""HumanEval and similar tasks: Bitwright's sandbox runs the generated code, not lm-eval's metric.

Evaluating Large Language Models Trained on Code, arXiv 2107.03374. lm-eval's metric is fetched from the network and
runs programs in copies of its own process, so here lm-eval only generates. A program is a document's ``prompt``, then
the answer, then the result of ``doc_to_target``: the tests and the call of them. pass@1 is the share of documents whose
program comes to its end, with one greedy answer each.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitwright.core.errors import UserError
from bitwright.core.progress import Listener, Progress
from bitwright.evaluation.code_execution import Outcome, run_program

METRIC = "pass@1"
FENCE = "```"


def is_code(config: Mapping[str, Any]) -> bool:
    """Whether a task runs what the model writes."""
    return bool(config.get("unsafe_code", False))


def require_known_shape(name: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for a task that runs code in another way than HumanEval."""
    generates = config.get("output_type") == "generate_until" and isinstance(config.get("doc_to_target"), str)
    ours = all(Path(function).parent.name == "humaneval" for function in _functions(config))
    if not generates or not ours or config.get("repeats", 1) != 1:
        raise UserError(
            f"task {name} runs generated code in a way of its own, which Bitwright's sandbox cannot; it runs "
            "humaneval, humaneval_plus, humaneval_instruct, and local tasks of their shape"
        )


def without_its_metric(config: Mapping[str, Any]) -> dict[str, Any]:
    """The task's configuration as lm-eval may load it: answers are generated and passed through."""
    kept = {key: value for key, value in config.items() if key not in ("metric_list", "filter_list", "tag")}
    return kept | {"metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}]}


def programs(config: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """One program per document, from lm-eval's logged samples."""
    cuts = any(function.endswith(".build_predictions_instruct") for function in _functions(config))
    return [_program(sample, cuts) for sample in samples]


def run_all(name: str, sources: Sequence[str], listener: Listener) -> list[Outcome]:
    """Run the programs one after the other."""
    outcomes = []
    for done, program in enumerate(sources):
        listener(Progress(f"{name} tests", done, len(sources), "programs"))
        outcomes.append(run_program(program))
    listener(Progress(f"{name} tests", len(sources), len(sources), "programs"))
    return outcomes


def pass_at_1(outcomes: Sequence[Outcome]) -> tuple[float, float | None]:
    """The share that passed, and its standard error.

    The error is that of the sample, as lm-eval computes it for a mean; it is None for a single document.

    >>> pass_at_1([Outcome("passed", True)] * 3 + [Outcome("failed", True)])
    (0.75, 0.25)
    """
    count = len(outcomes)
    share = sum(outcome.passed for outcome in outcomes) / count
    return share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def _program(sample: Mapping[str, Any], cuts: bool) -> str:
    document, answer = sample["doc"], str(sample["resps"][0][0])
    if cuts and FENCE in answer:
        answer = answer[: answer.index(FENCE)]
    return f"{document['prompt']}{answer}\n{sample['target']}\n"


def _functions(config: Mapping[str, Any]) -> list[str]:
    """The functions that the task names for its metric and its filters, each as file path, dot, name."""
    steps = [step for pipeline in config.get("filter_list") or () for step in pipeline.get("filter", ())]
    functions = [step.get("filter_fn", "") for step in steps]
    functions += [metric["metric"] for metric in config.get("metric_list") or ()]
    return [str(function) for function in functions if "/" in str(function)]
