"""Perplexity and KL divergence against a ten-line loop in plain transformers."""

import math
from pathlib import Path

import pytest
import torch
from tests.conftest import Checkpoints, measured
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitwright
from bitwright.core.errors import CheckpointError

TEXT = "".join(f"line {n}: the quick brown fox jumps over {n * n} lazy dogs\n" for n in range(60))
SEQLEN, WINDOWS = 48, 12


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def quantized(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "out"
    bitwright.quantize(bitwright.Recipe(model=str(tiny()), scheme="W3A16g32", method="rtn"), output)
    return output


def loop(folder: Path, reference: Path) -> tuple[float, float, float]:
    """Perplexity, KL and agreement, one token at a time, in plain transformers and float64 sums."""
    p, q = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (reference, folder))
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids[0]
    loss, divergence, agree, predicted, positions = 0.0, 0.0, 0, 0, 0
    for start in range(0, WINDOWS * SEQLEN, SEQLEN):
        window = ids[start : start + SEQLEN]
        with torch.no_grad():
            log_p, log_q = (m(window[None]).logits[0].double().log_softmax(-1) for m in (p, q))
        for at in range(SEQLEN):
            divergence += float((log_p[at].exp() * (log_p[at] - log_q[at])).sum())
            agree += int(log_p[at].argmax() == log_q[at].argmax())
            positions += 1
            if at + 1 < SEQLEN:
                loss -= float(log_q[at, window[at + 1]])
                predicted += 1
    return math.exp(loss / predicted), divergence / positions, agree / positions


def test_the_numbers_are_those_of_a_plain_loop(tiny: Checkpoints, quantized: Path, text: str) -> None:
    perplexity, divergence, agreement = loop(quantized, tiny())
    found = measured(quantized, text, seqlen=SEQLEN, windows=WINDOWS, reference=tiny())
    assert (found.windows, found.seqlen) == (WINDOWS, SEQLEN)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreement)
    assert divergence > 0.01  # a quantized model that says the same would prove nothing


def test_missing_weights_are_refused_not_made_up(tiny: Checkpoints, tmp_path: Path, text: str) -> None:
    """transformers itself would go on with random weights."""
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny() / name).read_bytes())
    tensors = load_file(tiny() / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        bitwright.evaluate(tmp_path, text, seqlen=SEQLEN, windows=1)


def test_the_known_figure_of_en_llama(shared: Path) -> None:
    found = measured(shared / "models/en-llama", shared / "data/wikitext2/test.txt", seqlen=512, windows=60)
    assert found.perplexity == pytest.approx(76.83, abs=0.005)
