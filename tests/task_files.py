"""Small tasks in lm-eval's own YAML, for the embedded model: choices, words to write, and code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bitwright.demo.texts import evaluation_text

TASKS = ("small_choice", "small_words", "small_code")
NEW_TOKENS = 8
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
WORDS = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{written}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CODE = {
    "output_type": "generate_until",
    "unsafe_code": True,
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{test}}\ncheck({{entry_point}})",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
}


def questions(count: int) -> list[dict[str, Any]]:
    """The beginning of a line of Python, its end, and the ends of two other lines, in turns."""
    lines = [line.strip() for line in evaluation_text().splitlines() if 40 < len(line.strip()) < 90 and "=" in line]
    chosen = [line.rpartition(" = ") for line in dict.fromkeys(lines) if " = " in line][: 3 * count]
    ends = [end for _, _, end in chosen]
    made = []
    for number in range(count):
        right = number % 3
        choices = [ends[count + number], ends[2 * count + number]]
        choices.insert(right, ends[number])
        made.append({"question": chosen[number][0] + " =", "choices": choices, "answer": right})
    return made


def write_task(folder: Path, name: str, shape: dict[str, Any], documents: Sequence[dict[str, Any]]) -> Path:
    """A YAML file and its data beside it."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task | {"test_split": "test", "metadata": {"version": 1.5}} | shape))
    return path


def problems() -> list[dict[str, str]]:
    """HumanEval's fields; the prompts are whole functions already, so that a small model can only append to them."""
    check = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0"
    bodies = ("a + b", "a - b", "a * b", "sum((a, b))")
    return [{"prompt": f"def add(a, b):\n    return {body}\n#", "test": check, "entry_point": "add"} for body in bodies]
