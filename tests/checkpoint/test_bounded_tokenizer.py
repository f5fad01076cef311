"""A stranger's tokenizer gives the tokens that transformers gives, and goes beyond no bound of time or memory."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import bitwright
from bitwright.checkpoint import bounded_tokenizer
from bitwright.checkpoint.bounded_tokenizer import BoundedTokenizer
from bitwright.core.errors import CheckpointError
from bitwright.demo import MODEL_DIR
from bitwright.evaluation.scoring import TaskOptions, prepare_tasks

TEXTS = ["Hello world", "", "a\n\n  b\tc", "<s>é 漢字 \U0001f600</s>", "x" * 5000]
WRITES_MUCH = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 10**6}
GROWS = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 50}
BACKTRACKS = {"Regex": "(a+)+$|(x+x+)+y|(.*)*z"}
SPECIAL = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [*SPECIAL * 10**5, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 1000, "tokens": ["<s>"] * 1000}},
}
HOSTILE: dict[str, dict[str, Any]] = {
    "each character becomes a million": {"normalizer": WRITES_MUCH},
    "each step makes fifty of one": {"normalizer": {"type": "Sequence", "normalizers": [GROWS] * 8}},
    "a hundred million special tokens": {"post_processor": TEMPLATE},
    "an expression that gives up": {
        "pre_tokenizer": {"type": "Split", "pattern": BACKTRACKS, "behavior": "Isolated", "invert": False}
    },
    "an expression that takes for ever": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "(?:[\\s\\S]{60000}x|y){2}"}, "content": ""}
    },
    "no map of characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "no token for what is unknown": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}},
}
"""What tokenizers makes of these, in the process that asks: it fills the memory, panics, never ends, or raises."""


def changed(folder: Path, change: dict[str, Any]) -> Path:
    """A copy of the embedded model with another tokenizer.json."""
    shutil.copytree(MODEL_DIR, folder)
    path = folder / "tokenizer.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    return folder


def test_tokens_are_those_of_transformers() -> None:
    theirs = AutoTokenizer.from_pretrained(MODEL_DIR)
    with BoundedTokenizer(MODEL_DIR) as ours:
        for special in (True, False):
            wanted = theirs(TEXTS, add_special_tokens=special).input_ids
            assert ours(TEXTS, add_special_tokens=special).input_ids == wanted
            assert [ours(text, add_special_tokens=special).input_ids for text in TEXTS] == wanted
        assert ours.ask("eos_token_id") == theirs.eos_token_id
        assert ours.ask("convert_ids_to_tokens", [5, 6]) == theirs.convert_ids_to_tokens([5, 6])
        assert ours.ask("decode", [1, 5], skip_special_tokens=True) == theirs.decode([1, 5], skip_special_tokens=True)


def calibrate(folder: Path) -> None:
    recipe = bitwright.Recipe(folder, scheme="W4A16g32", method="gptq", calibration="builtin", samples=2, seqlen=32)
    bitwright.quantize(recipe, folder.parent / "out")


def measure(folder: Path) -> None:
    bitwright.evaluate(folder, "builtin", seqlen=32, windows=1)


def answer(folder: Path) -> None:
    prepare_tasks(TaskOptions(names=("arc_easy",)), folder)


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tokenizer_is_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_tokenizer, "TO_LOAD", 3)
    before = resource.getrusage(
        resource.RUSAGE_CHILDREN
    ).ru_maxrss  # of all children that ever were, of other tests too
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* original repository again") as refusal:
        calibrate(changed(tmp_path / "model", change))
    assert len(str(refusal.value)) < 1000
    assert ("takes more than" in str(refusal.value)) == ("{60000}" in str(change))
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert largest < max(1.3 * 2**20, before + 1), "KiB of the largest process"


@pytest.mark.parametrize("use", [measure, answer])
def test_whoever_tokenizes_refuses_it(use: Callable[[Path], None], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(CheckpointError, match="the tokenizer in"):
        use(changed(tmp_path / "model", {"normalizer": WRITES_MUCH}))
