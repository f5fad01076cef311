"""BOS in front of every window and segment, of a model whose tokenizer puts one in front of a text."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tests.calibration.conftest import TEMPLATE
from tests.conftest import Checkpoints, byte_tokenizer, measured
from transformers import AutoModelForCausalLM

import bitwright
from bitwright.core.errors import CalibrationError, OutputError, UserError
from bitwright.core.recipe import Recipe

BOS, SEQLEN, WINDOWS = 256, 32, 4
CHAT = {"messages": [{"role": "user", "content": "how are you"}, {"role": "assistant", "content": "quite well"}]}


@pytest.fixture(scope="module")
def model(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts ``<s>`` in front of a text, with a chat template."""
    folder = Path(shutil.copytree(tiny(vocab_size=258), tmp_path_factory.mktemp("beginning") / "model"))
    tokenizer = byte_tokenizer("<s> $A")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chat.jsonl"
    path.write_text((json.dumps(CHAT) + "\n") * 40)
    return path


@torch.no_grad()
def by_hand(folder: Path, windows: list[list[int]]) -> float:
    """The perplexity of every token but the BOS, one token at a time."""
    model, loss, predicted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0, 0
    for window in windows:
        log_p = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        for at, token in enumerate(window[1:]):
            if token != BOS:
                loss -= float(log_p[at, token])
                predicted += 1
    return math.exp(loss / predicted)


def test_every_window_begins_with_it(model: Path, text: Path) -> None:
    tokens, body = byte_tokenizer("$A")(text.read_text()).input_ids, SEQLEN - 1
    windows = [[BOS, *tokens[n * body : (n + 1) * body]] for n in range(WINDOWS)]
    found = measured(model, text, seqlen=SEQLEN, windows=WINDOWS)
    assert found.perplexity == pytest.approx(by_hand(model, windows), rel=1e-5)
    assert (found.begins_with, found.protocol) == ("<s>", "model")


def test_the_papers_have_one_stream(model: Path, text: Path) -> None:
    tokens = byte_tokenizer("<s> $A")(text.read_text()).input_ids
    windows = [tokens[n * SEQLEN : (n + 1) * SEQLEN] for n in range(WINDOWS)]
    found = bitwright.evaluate(model, str(text), seqlen=SEQLEN, windows=WINDOWS, protocol="papers").measurement
    assert found is not None and found.perplexity == pytest.approx(by_hand(model, windows), rel=1e-5)
    assert (found.begins_with, found.protocol) == (None, "papers")


def test_the_two_protocols_are_one_without_it(tiny: Checkpoints, text: Path) -> None:
    """Tokenizers that put nothing in front of a text give the same windows, to the last bit."""
    found = [bitwright.evaluate(tiny(), str(text), seqlen=SEQLEN, protocol=name) for name in ("model", "papers")]
    one, other = (each.measurement for each in found)
    assert one is not None and other is not None
    assert one.perplexity == other.perplexity and one.windows == other.windows


def test_the_divergence_is_over_the_same_windows(model: Path, text: Path, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(model), "W3A16g32"), tmp_path / "out")
    found = measured(tmp_path / "out", text, seqlen=SEQLEN, windows=WINDOWS, reference=model)
    assert found.kl_divergence is not None and found.kl_divergence > 0.001
    assert found.reference_perplexity == measured(model, text, seqlen=SEQLEN, windows=WINDOWS).perplexity


def test_documents_within_a_window_begin_so_too(model: Path, chats: Path) -> None:
    row = byte_tokenizer("$A")("<s><user>how are you<assistant>quite well</s>").input_ids
    stream, body = row * 40, []
    found = measured(model, chats, seqlen=SEQLEN * 3, windows=2)
    assert found.begins_with == "<s>"
    body = [stream[: 2 * len(row)] + row[: SEQLEN * 3 - 2 * len(row)]]
    second = [BOS, *row[len(body[0]) - 2 * len(row) :], *row]
    second += row[: SEQLEN * 3 - len(second)]
    assert found.perplexity == pytest.approx(by_hand(model, [*body, second]), rel=1e-5)


def test_several_texts_share_the_windows(model: Path, text: Path, chats: Path) -> None:
    both = bitwright.evaluate(model, f"{text}:3,{chats}", seqlen=SEQLEN, windows=4).measurement
    one, other = measured(model, text, seqlen=SEQLEN, windows=3), measured(model, chats, seqlen=SEQLEN, windows=1)
    assert both is not None and min(one.perplexity, other.perplexity) < both.perplexity
    with pytest.raises(CalibrationError, match="names 2 texts; say with --windows how many windows they share"):
        bitwright.evaluate(model, f"{text}:3,{chats}", seqlen=SEQLEN)
    with pytest.raises(CalibrationError, match=r"--protocol papers measures on one text, and .* names 2"):
        bitwright.evaluate(model, f"{text},{chats}", seqlen=SEQLEN, protocol="papers")


def test_refusals(model: Path, text: Path, chats: Path) -> None:
    with pytest.raises(UserError, match="there is no protocol 'paper'; did you mean papers"):
        bitwright.evaluate(model, str(text), protocol="paper")
    with pytest.raises(CalibrationError, match=r"line 1 is a chat .* one stream of plain text was asked for"):
        bitwright.evaluate(model, str(chats), protocol="papers")
    with pytest.raises(CalibrationError, match="need 3100 tokens beside the <s> with which each begins, but"):
        bitwright.evaluate(model, str(chats), seqlen=SEQLEN, windows=100)
    with pytest.raises(UserError, match="--protocol are about a text, and only tasks were asked for"):
        bitwright.evaluate(model, tasks=["piqa"], protocol="papers")


def test_quantize_says_what_each_segment_begins_with(model: Path, chats: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(model), "W4A16g32", "gptq", calibration=str(chats), samples=4, seqlen=64)
    assert bitwright.plan(recipe).begins_with == "<s>"
    result = bitwright.quantize(recipe, tmp_path / "out")
    assert result.calibration is not None and result.calibration.begins_with == "<s>"
    account = json.loads((tmp_path / "out" / "bitwright.json").read_text())
    assert account["calibration"]["begins_with"] == "<s>" and account["calibration"]["segments"] == 4


def test_a_run_with_other_tokens_is_not_continued(model: Path, text: Path, tmp_path: Path) -> None:
    """As after an update of Bitwright, or of the tokenizer, that puts a BOS in front."""
    recipe = Recipe(str(model), "W4A16g32", "gptq", calibration=str(text), samples=4, seqlen=64)
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        if list(out.parent.glob("out.partial/part-*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bitwright.quantize(recipe, out, listener=stop)
    byte_tokenizer("$A").save_pretrained(model)
    try:
        with pytest.raises(OutputError, match=r"calibration\.tokens_sha256"):
            bitwright.quantize(recipe, out)
    finally:
        tokenizer = byte_tokenizer("<s> $A")
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(model)
