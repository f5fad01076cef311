"""Accuracy on tasks: lm-eval's numbers against the logits, resuming, and what is refused before a model is loaded."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.task_files import CHOICES, CODE, NEW_TOKENS, WORDS, problems, questions, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitwright
from bitwright.core.errors import OutputError, UserError
from bitwright.core.progress import Progress
from bitwright.core.recipe import Recipe
from bitwright.demo import MODEL_DIR
from bitwright.evaluation import humaneval

COUNT = 12


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is written to the user's own caches."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    bitwright.quantize(Recipe(str(MODEL_DIR), "W2A16g128"), out)
    return out


@pytest.fixture(scope="module", params=["original", "quantized"])
def folder(request: pytest.FixtureRequest) -> Path:
    return MODEL_DIR if request.param == "original" else request.getfixturevalue("quantized")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the three tasks; what is to be written is what the original writes for every other question."""
    place, documents = tmp_path_factory.mktemp("tasks"), questions(COUNT)
    by_hand = ByHand(MODEL_DIR)
    written = [by_hand.writes(each["question"]) if n % 2 else "nothing" for n, each in enumerate(documents)]
    write_task(place, "small_choice", CHOICES, documents)
    write_task(place, "small_words", WORDS, [each | {"written": w} for each, w in zip(documents, written, strict=True)])
    write_task(place, "small_code", CODE, problems())
    return place


class ByHand:
    """The same questions in a few lines of transformers."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def likelihood(self, question: str, choice: str) -> float:
        ids = self.tokenizer(f"{question} {choice}", return_tensors="pt").input_ids
        start = len(self.tokenizer(question).input_ids)
        log_p = self.model(ids).logits[0].log_softmax(-1)
        return sum(float(log_p[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))

    @torch.no_grad()
    def writes(self, question: str) -> str:
        ids = self.tokenizer(question, return_tensors="pt").input_ids
        start = ids.shape[1]
        for _ in range(NEW_TOKENS):
            best = self.model(ids).logits[0, -1].argmax()
            if best == self.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, best.view(1, 1)], dim=1)
        return str(self.tokenizer.decode(ids[0, start:])).split("\n")[0]


def right(likelihoods: list[float], lengths: list[int], answer: int) -> tuple[bool, bool]:
    normed = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
    return likelihoods.index(max(likelihoods)) == answer, normed.index(max(normed)) == answer


def test_choices_against_the_logits(folder: Path, files: Path) -> None:
    by_hand = ByHand(folder)
    expected = []
    for each in questions(COUNT):
        values = [by_hand.likelihood(each["question"], choice) for choice in each["choices"]]
        expected.append(right(values, [len(choice) for choice in each["choices"]], each["answer"]))
    shares = [sum(column) / COUNT for column in zip(*expected, strict=True)]
    found = bitwright.evaluate(folder, tasks=["small_choice"], task_files=[files])
    assert [(s.task, s.metric, s.filter) for s in found.tasks] == [
        ("small_choice", "acc", "none"),
        ("small_choice", "acc_norm", "none"),
    ]
    assert [score.value for score in found.tasks] == pytest.approx(shares)
    assert 0 < shares[0] < 1, "there is something to measure"
    assert {(s.documents, s.shots, s.version, s.cut, s.group, s.reference) for s in found.tasks} == {
        (COUNT, 0, "1.5", 0, None, None)
    }
    spread = (shares[0] * (1 - shares[0]) / (COUNT - 1)) ** 0.5
    assert found.tasks[0].standard_error == pytest.approx(spread)
    assert (found.text, found.measurement) == (None, None)


def test_what_is_written_against_a_greedy_loop(folder: Path, files: Path) -> None:
    original, by_hand = ByHand(MODEL_DIR), ByHand(folder)
    asked = [each["question"] for each in questions(COUNT)]
    expected = sum(by_hand.writes(q) == original.writes(q) for q in asked[1::2]) / COUNT
    (score,) = bitwright.evaluate(folder, tasks=["small_words"], task_files=[files / "small_words.yaml"]).tasks
    assert score.metric == "exact_match" and score.value == pytest.approx(expected)
    assert expected == 0.5 if folder == MODEL_DIR else expected < 0.5


def test_the_original_beside_the_quantized(quantized: Path, files: Path) -> None:
    asked: dict[str, Any] = {"tasks": ["small_words"], "task_files": [files]}
    found = bitwright.evaluate(quantized, "builtin", windows=1, reference=MODEL_DIR, **asked)
    (alone,) = bitwright.evaluate(quantized, **asked).tasks
    (score,) = found.tasks
    assert found.measurement is not None and found.measurement.windows == 1
    assert (score.value, score.reference, score.difference) == (alone.value, 0.5, alone.value - 0.5)


def test_limit_shots_and_batches(files: Path) -> None:
    asked: dict[str, Any] = {"tasks": ["small_choice"], "task_files": [files]}
    with_examples = bitwright.evaluate(MODEL_DIR, limit=4, shots=2, **asked).tasks
    assert {(score.documents, score.shots) for score in with_examples} == {(4, 2)}
    assert bitwright.evaluate(MODEL_DIR, batch_size=5, **asked).tasks == bitwright.evaluate(MODEL_DIR, **asked).tasks


def test_prompts_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    long = [{"question": "x = 1\n" * 600 + "y =", "choices": ["1", "2"], "answer": 0}] * 2
    write_task(tmp_path / "tasks", "long_choice", CHOICES, [*questions(3), *long])
    found = bitwright.evaluate(MODEL_DIR, tasks=["long_choice"], task_files=[tmp_path / "tasks"])
    assert {score.cut for score in found.tasks} == {4}


def test_code_passes_or_does_not(files: Path) -> None:
    heard: list[Progress] = []
    found = bitwright.evaluate(
        MODEL_DIR, tasks=["small_code"], task_files=[files], allow_code_execution=True, listener=heard.append
    )
    (score,) = found.tasks
    assert (score.metric, score.value, score.documents) == ("pass@1", 0.5, 4)
    assert score.standard_error == pytest.approx((0.25 / 3) ** 0.5)
    assert heard[-1] == Progress("small_code tests", 4, 4, "programs")


def test_lm_evals_own_humaneval_on_local_problems(tmp_path: Path) -> None:
    import lm_eval.tasks

    shape = {
        "include": str(Path(lm_eval.tasks.__file__).parent / "humaneval" / "humaneval.yaml"),
        "generation_kwargs": CODE["generation_kwargs"],
    }
    file = write_task(tmp_path / "tasks", "my_humaneval", shape, problems())
    asked: dict[str, Any] = {"tasks": ["my_humaneval"], "task_files": [file], "limit": 3}
    (score,) = bitwright.evaluate(MODEL_DIR, allow_code_execution=True, **asked).tasks
    assert (score.metric, score.documents) == ("pass@1", 3) and score.value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("builder", "kept"), [("build_predictions", "b```\nmore"), ("build_predictions_instruct", "b")]
)
def test_an_instructed_answer_ends_with_its_fence(builder: str, kept: str) -> None:
    steps = [{"function": "custom", "filter_fn": f"/anywhere/humaneval/utils.{builder}"}]
    config = {"filter_list": [{"name": "create_test", "filter": steps}]}
    sample = {"doc": {"prompt": "a = "}, "resps": [["b```\nmore"]], "target": "check(a)"}
    assert humaneval.programs(config, [sample]) == [f"a = {kept}\ncheck(a)\n"]


def test_code_is_not_run_without_permission(files: Path, unloaded: None) -> None:
    with pytest.raises(UserError, match=r"task small_code runs the code .* give --allow-code-execution"):
        bitwright.evaluate(MODEL_DIR, tasks=["small_choice", "small_code"], task_files=[files])


KILLED = """
import os, signal, sys
import bitwright
from bitwright.demo import MODEL_DIR

def listener(progress):
    if progress.stage == "small_choice" and progress.done == 20:
        os.kill(os.getpid(), signal.SIGKILL)

bitwright.evaluate(MODEL_DIR, tasks=["small_words", "small_choice"], task_files=[sys.argv[1]], listener=listener)
"""


def test_killed_it_goes_on(files: Path, tmp_path: Path, caches: Path) -> None:
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "XDG_CACHE_HOME": str(caches)}
    ran = subprocess.run([sys.executable, "-c", KILLED, str(files)], env=environment, capture_output=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    (kept,) = (caches / "bitwright" / "answers").iterdir()
    with kept.open("a") as file:
        file.write('{"key": "torn')
    heard: list[Progress] = []
    asked: dict[str, Any] = {"tasks": ["small_words", "small_choice"], "task_files": [files]}
    found = bitwright.evaluate(MODEL_DIR, listener=heard.append, **asked)
    assert {(p.stage, p.total) for p in heard} == {("small_choice", 3 * COUNT - 20)}, "nothing is asked again"
    assert not kept.exists(), "what is done leaves nothing behind"
    assert found == bitwright.evaluate(MODEL_DIR, **asked)


def test_answers_can_be_kept_and_belong_to_one_model(quantized: Path, files: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"tasks": ["small_choice"], "task_files": [files], "answers": tmp_path / "kept" / "answers"}
    heard: list[Progress] = []
    first = bitwright.evaluate(MODEL_DIR, **asked)
    assert bitwright.evaluate(MODEL_DIR, listener=heard.append, **asked) == first
    assert heard == [], "all answers were there"
    bitwright.evaluate(quantized, listener=heard.append, **asked)
    assert heard[-1] == Progress("small_choice", 3 * COUNT, 3 * COUNT, "answers"), "another model answers for itself"


def test_a_file_that_holds_something_else_is_left_alone(files: Path, tmp_path: Path, unloaded: None) -> None:
    (tmp_path / "mine").write_text("dear diary")
    with pytest.raises(OutputError, match="mine is no file of answers"):
        bitwright.evaluate(MODEL_DIR, tasks=["small_choice"], task_files=[files], answers=tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "dear diary"


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No model may be loaded."""
    monkeypatch.setattr("bitwright.api.evaluating.load_with_loader", lambda *_, **__: pytest.fail("a model was loaded"))
    yield


@pytest.mark.usefixtures("unloaded")
class TestRefusals:
    def test_lm_evals_own_tasks(self, files: Path) -> None:
        """In one test: lm-eval reads its thousands of files once."""
        for name, nearest in (("pica", "piqa"), ("small_choise", "small_choice"), ("gms8k", "gsm8k")):
            with pytest.raises(UserError, match=rf"lm-eval knows no task '{name}'; did you mean .*{nearest}"):
                bitwright.evaluate(MODEL_DIR, tasks=["arc_easy", name], task_files=[files])
        for asked in ("humaneval", "mmlu,humaneval", "humaneval_instruct", "mbpp"):
            with pytest.raises(UserError, match="give --allow-code-execution"):
                bitwright.evaluate(MODEL_DIR, tasks=asked.split(","))
        for name in ("mbpp", "humaneval_64", "humaneval_multi_line_infilling"):
            with pytest.raises(UserError, match=f"task {name} runs generated code in a way of its own"):
                bitwright.evaluate(MODEL_DIR, tasks=[name], allow_code_execution=True)
        names = "mmlu,piqa,arc_easy,arc_challenge,boolq,hellaswag,winogrande,gsm8k,humaneval"
        with pytest.raises(UserError, match="task mmlu could not be prepared: its data is cais/mmlu"):
            bitwright.evaluate(MODEL_DIR, tasks=names.split(","), allow_code_execution=True)
        for name in ("humaneval", "humaneval_instruct"):
            with pytest.raises(UserError, match=f"task {name} could not .*its data is openai/openai_humaneval"):
                bitwright.evaluate(MODEL_DIR, tasks=[name], allow_code_execution=True)

    @pytest.mark.parametrize("library", ["lm_eval", "accelerate"])
    def test_the_extra_is_missing(self, library: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "bitwright.evaluation.scoring.find_spec", lambda name: None if name == library else object()
        )
        with pytest.raises(UserError, match=rf"{library}.*pip install 'bitwright\[tasks\]'"):
            bitwright.evaluate(MODEL_DIR, tasks=["small_choice"], task_files=[files])

    def test_data_that_is_not_there(self, tmp_path: Path) -> None:
        file = write_task(tmp_path / "tasks", "lost", CHOICES, questions(2))
        (tmp_path / "tasks" / "lost.jsonl").unlink()
        with pytest.raises(UserError, match=r"task lost could not be prepared: its data is json.*lost\.jsonl"):
            bitwright.evaluate(MODEL_DIR, tasks=["lost"], task_files=[file])

    def test_answers_longer_than_the_context(self, tmp_path: Path) -> None:
        shape = WORDS | {"generation_kwargs": {"max_gen_toks": 4000}}
        file = write_task(tmp_path / "tasks", "novel", shape, [{"question": "x", "written": "y"}])
        with pytest.raises(UserError, match="task novel lets the model write 4000 tokens, and its context is"):
            bitwright.evaluate(MODEL_DIR, tasks=["novel"], task_files=[file])

    @pytest.mark.parametrize(
        ("how", "says"),
        [
            ({"tasks": (), "limit": 3}, "which tasks"),
            ({"tasks": (), "allow_code_execution": True}, "which tasks"),
            ({"tasks": ()}, "which tasks"),  # but task files
            ({"limit": 0}, "--limit 0 was asked for"),
            ({"shots": -1}, "--shots -1 was asked for"),
            ({"batch_size": 0}, "--batch-size 0 was asked for"),
            ({"seqlen": 64}, "only tasks were asked for; add --text FILE"),
            ({"windows": 1}, "only tasks were asked for; add --text FILE"),
            ({"reference": "/missing"}, "/missing"),
            ({"task_files": ["/missing.yaml"]}, "/missing.yaml: no task file"),
        ],
    )
    def test_options(self, how: dict[str, Any], says: str, files: Path) -> None:
        asked: dict[str, Any] = {"tasks": ["small_choice"], "task_files": [files]}
        with pytest.raises(UserError, match=says):
            bitwright.evaluate(MODEL_DIR, **(asked | how))

    @pytest.mark.parametrize(
        ("text", "says"),
        [("task: [", "cannot be read as a task"), ("- 1", "cannot be read as a task"), ("a: 1", "neither the key")],
    )
    def test_files_that_are_no_tasks(self, text: str, says: str, tmp_path: Path) -> None:
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(UserError, match=says):
            bitwright.evaluate(MODEL_DIR, tasks=["x"], task_files=[tmp_path])
