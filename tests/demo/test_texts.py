import math
import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from bitwright.core.errors import UserError
from bitwright.demo import MODEL_DIR, texts

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 512


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@cache
def trained() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16).eval()


@cache
def evaluation_ids() -> list[int]:
    ids: list[int] = tokenizer().encode(texts.evaluation_text())
    return ids


def write_library(folder: Path, *, without: str = "") -> Path:
    """A miniature standard library: every held-out module, one that trains, and what is to be left out."""
    files = {f"{module}.py" for module in texts.EVALUATION_MODULES | texts.CALIBRATION_MODULES} - {"json.py"}
    files |= {"json/__init__.py", "json/tests/test_json.py", "os.py", "xml/dom/pulldom.py", "test/test_os.py"}
    files |= {"site-packages/torch/nn.py", "_sysconfigdata__linux.py"}
    for name in files - {without}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n", encoding="utf-8")
    return folder


def test_sets_are_disjoint() -> None:
    assert not texts.EVALUATION_MODULES & texts.CALIBRATION_MODULES
    training = {texts.module_of(path) for path in texts.training_files()}
    assert not training & (texts.EVALUATION_MODULES | texts.CALIBRATION_MODULES)
    assert {"asyncio", "os", "typing"} <= training


def test_no_held_out_source_is_in_the_training_text() -> None:
    folder, training = texts.stdlib_folder(), texts.training_text()
    for module in ("argparse.py", "tarfile.py", "dataclasses.py", "logging/__init__.py"):
        source = texts.read_source(folder, Path(module))
        assert len(source) > 10_000
        assert source[-2000:] not in training


def test_what_is_no_part_of_the_library_does_not_train(tmp_path: Path) -> None:
    files = [path.as_posix() for path in texts.training_files(write_library(tmp_path))]
    assert files == ["os.py", "xml/dom/pulldom.py"]


def test_files_are_sorted_by_name_and_joined_by_a_newline(tmp_path: Path) -> None:
    write_library(tmp_path)
    assert texts.training_text(tmp_path) == "# os.py\n\n# xml/dom/pulldom.py\n"
    expected = "\n".join(f"# {module}.py\n" for module in sorted(texts.EVALUATION_MODULES))
    assert texts.evaluation_text(tmp_path) == expected
    assert "json/__init__.py" in texts.calibration_text(tmp_path)
    assert "json/tests" not in texts.calibration_text(tmp_path)


def test_order_of_the_file_system_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_library(tmp_path)
    before = texts.evaluation_text(tmp_path), texts.calibration_text(tmp_path), texts.training_text(tmp_path)
    for name in ("glob", "rglob"):
        forwards = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda self, *how, find=forwards, **more: reversed([*find(self, *how, **more)]))
    assert before == (texts.evaluation_text(tmp_path), texts.calibration_text(tmp_path), texts.training_text(tmp_path))


def test_bytes_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    assert texts.training_text(tmp_path) == "# caf�\n"


def test_missing_module_is_named(tmp_path: Path) -> None:
    write_library(tmp_path, without="tarfile.py")
    with pytest.raises(UserError, match="tarfile") as caught:
        texts.evaluation_text(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "--text FILE" in str(caught.value)
    assert texts.calibration_text(tmp_path)


@pytest.mark.parametrize("read", [texts.training_text, texts.calibration_text, texts.evaluation_text])
def test_library_without_sources_says_so(read: Any, tmp_path: Path) -> None:
    (tmp_path / "argparse.pyc").write_bytes(b"")
    with pytest.raises(UserError, match="standard library"):
        read(tmp_path)


def test_texts_are_large_enough() -> None:
    assert len(evaluation_ids()) >= 100 * WINDOW
    assert len(tokenizer().encode(texts.calibration_text())) >= 150_000


def test_tokenizer_adds_nothing() -> None:
    ids = tokenizer()("import os\n")["input_ids"]
    assert not set(ids) & set(tokenizer().all_special_ids)
    assert tokenizer().all_special_tokens == ["<s>", "</s>", "<pad>"]


@settings(deadline=None)  # the first example loads the tokenizer
@given(st.text())
def test_tokenizer_round_trip(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text)) == text


@pytest.mark.parametrize("text", ["  leading", "a ,b . c !\t\n\n\n", "naïve 数据 🦀\r\n", "x </s> <s>y", " '  s n't"])
def test_tokenizer_round_trip_where_others_tidy(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_indentation_is_cheap() -> None:
    assert len(tokenizer().encode("\n" + " " * 12 + "return")) == 2


def test_files_are_small_and_bfloat16() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 8_000_000
    weights = load_file(MODEL_DIR / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(width % 128 == 0 for weight in weights.values() for width in weight.shape)
    assert 2_000_000 <= sum(weight.numel() for weight in weights.values()) <= 4_000_000


@torch.no_grad()
def perplexity(model: Any) -> float:
    windows = torch.tensor(evaluation_ids()[: 10 * WINDOW]).view(10, WINDOW)
    logits = model(input_ids=windows).logits[:, :-1].float()
    return math.exp(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())


def test_model_has_learned() -> None:
    torch.manual_seed(0)
    untrained = LlamaForCausalLM(trained().config).eval()
    assert perplexity(trained()) < 30
    assert perplexity(untrained) > 1000


@pytest.mark.parametrize(
    ("prompt", "continuation"),
    [
        ("    def __init__(", "self"),
        ("    def __init__(self, name):\n        self.name =", " name"),
        ("    except KeyError", ":"),
        ("    if value is not", " None"),
    ],
)
def test_model_completes_python(prompt: str, continuation: str) -> None:
    inputs = tokenizer()(prompt, return_tensors="pt")
    output = trained().generate(**inputs, max_new_tokens=1, do_sample=False)[0]
    assert tokenizer().decode(output) == prompt + continuation


def test_special_tokens_agree() -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        number = getattr(tokenizer(), name)
        assert getattr(trained().config, name) == getattr(trained().generation_config, name) == number


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    path = ROOT / "tools" / "train_demo_model.py"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")


def test_script_trains_a_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "model"
    run_script(monkeypatch, "--smoke", "--threads", str(torch.get_num_threads()), "--output", str(output))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name for path in output.iterdir()} == {path.name for path in MODEL_DIR.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == 2048
    assert "| 3 |" in (output / "TRAINING.md").read_text(encoding="utf-8")


def test_smoke_never_replaces_the_embedded_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, "--smoke")
    assert ended.value.code == 2
    assert "--output" in capsys.readouterr().err
