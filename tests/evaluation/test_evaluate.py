"""The numbers of evaluate(), against ten lines of plain transformers."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints, measured
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitwright
from bitwright.core.errors import CalibrationError, CheckpointError, RecipeError, UserError
from bitwright.core.progress import Progress
from bitwright.core.recipe import Recipe

SEQLEN, WINDOWS = 32, 5


@dataclass(frozen=True)
class Expected:
    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    agreement: float


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(32 + (n * n + 7 * n) % 90) for n in range(WINDOWS * SEQLEN + 9)))
    return path


@torch.no_grad()
def by_hand(folder: Path, reference: Path, text: Path, dtype: torch.dtype, windows: int = WINDOWS) -> Expected:
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), return_tensors="pt").input_ids[0]
    batch = torch.stack([ids[n * SEQLEN : (n + 1) * SEQLEN] for n in range(windows)])
    one, other = (
        AutoModelForCausalLM.from_pretrained(f, dtype=dtype)(batch).logits.double() for f in (folder, reference)
    )
    losses = [cross_entropy(each[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).item() for each in (one, other)]
    log_q, log_p = one.log_softmax(-1), other.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    agreement = (one.argmax(-1) == other.argmax(-1)).double().mean().item()
    return Expected(math.exp(losses[0]), math.exp(losses[1]), divergence, agreement)


@pytest.fixture(scope="module", params=["W2A16g32", "W4A4", "W3A16 head"])
def quantized(request: pytest.FixtureRequest, tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    scheme, _, head = request.param.partition(" ")
    out = tmp_path_factory.mktemp("quantized") / "out"
    bitwright.quantize(Recipe(str(tiny()), scheme, quantize_lm_head=bool(head)), out)
    return out


def test_a_quantized_folder_against_its_original(quantized: Path, tiny: Checkpoints, text: Path) -> None:
    found = bitwright.evaluate(quantized, str(text), seqlen=SEQLEN, windows=WINDOWS, reference=tiny())
    expected, measurement = by_hand(quantized, tiny(), text, torch.float32), found.measurement
    assert measurement is not None
    assert (measurement.windows, measurement.seqlen, found.dtype) == (WINDOWS, SEQLEN, "float32")
    assert measurement.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert measurement.reference_perplexity == pytest.approx(expected.reference_perplexity, rel=1e-5)
    assert measurement.kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-4)
    assert measurement.top1_agreement == pytest.approx(expected.agreement)
    assert expected.kl_divergence > 0.01 and expected.agreement < 1, "there is something to measure"
    assert measurement.perplexity != pytest.approx(expected.reference_perplexity, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_original_against_itself(dtype: str, tied: bool, tiny: Checkpoints, text: Path) -> None:
    folder = tiny(dtype, tied=tied)
    measurement = measured(folder, text, seqlen=SEQLEN, reference=folder)
    assert measurement.windows == WINDOWS, "the whole text, without the rest that fills no window"
    assert measurement.perplexity == measurement.reference_perplexity
    assert measurement.perplexity == pytest.approx(by_hand(folder, folder, text, torch.float32).perplexity, rel=1e-5)
    assert measurement.kl_divergence == pytest.approx(0, abs=1e-9) and measurement.top1_agreement == 1


def test_without_a_reference_there_is_no_divergence(tiny: Checkpoints, text: Path) -> None:
    found = bitwright.evaluate(tiny(), str(text), seqlen=SEQLEN, windows=2)
    alone = found.measurement
    assert alone is not None
    assert (alone.kl_divergence, alone.top1_agreement, alone.reference_perplexity) == (None, None, None)
    assert alone.perplexity == pytest.approx(by_hand(tiny(), tiny(), text, torch.float32, 2).perplexity, rel=1e-5)
    assert (found.reference, found.text, found.folder) == (None, str(text), str(tiny()))


def test_the_arithmetic_is_the_one_asked_for(tiny: Checkpoints, text: Path) -> None:
    found = bitwright.evaluate(tiny(), str(text), seqlen=SEQLEN, dtype="bfloat16")
    assert found.dtype == "bfloat16" and found.measurement is not None
    expected = by_hand(tiny(), tiny(), text, torch.bfloat16).perplexity
    assert found.measurement.perplexity == pytest.approx(expected, rel=2e-2)
    assert found.measurement.perplexity != measured(tiny(), text, seqlen=SEQLEN).perplexity


def test_it_runs_without_saying_so_twice(tiny: Checkpoints, text: Path) -> None:
    heard: list[Progress] = []
    bitwright.evaluate(tiny(), str(text), seqlen=SEQLEN, windows=3, listener=heard.append)
    assert [(p.stage, p.done, p.total) for p in heard] == [("evaluate", n, 3) for n in range(4)]


def test_numbers_do_not_depend_on_the_day(quantized: Path, tiny: Checkpoints, text: Path) -> None:
    one, other = (bitwright.evaluate(quantized, str(text), seqlen=SEQLEN, reference=tiny()) for _ in range(2))
    assert one == other


def test_another_vocabulary_is_no_reference(tiny: Checkpoints, text: Path) -> None:
    with pytest.raises(UserError, match="has a vocabulary of 300, the model one of 256"):
        bitwright.evaluate(tiny(), str(text), seqlen=SEQLEN, reference=tiny(vocab_size=300))


@pytest.mark.parametrize(
    ("kind", "how", "says"),
    [
        (RecipeError, {"seqlen": 129}, "129 is longer than the model's own maximum of 128 tokens"),
        (CalibrationError, {"seqlen": 64, "windows": 3}, "3 windows of 64 tokens need 192 tokens, but .* has 169"),
        (CalibrationError, {"seqlen": 1}, "windows of 1 tokens predict nothing"),
        (CalibrationError, {"seqlen": 32, "windows": 0}, "0 windows asked for"),
        (CalibrationError, {"text": "missing.txt"}, r"no text file or folder missing\.txt"),
        (UserError, {"dtype": "int8"}, "there is no dtype 'int8'"),
        (UserError, {"device": "tpu:0"}, "device 'tpu:0'"),
        (CheckpointError, {"folder": "/missing"}, "/missing"),
        (CheckpointError, {"reference": "/missing"}, "/missing"),
    ],
)
def test_refusals(kind: type[UserError], how: dict[str, Any], says: str, tiny: Checkpoints, text: Path) -> None:
    asked: dict[str, Any] = {"folder": tiny(), "text": str(text), "seqlen": SEQLEN}
    with pytest.raises(kind, match=says):
        bitwright.evaluate(**(asked | how))


def test_without_a_length_it_is_the_models_own(tiny: Checkpoints, text: Path) -> None:
    measurement = measured(tiny(), text)
    assert (measurement.seqlen, measurement.windows) == (128, 1)
