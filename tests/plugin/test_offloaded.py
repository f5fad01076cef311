"""A folder in the bitwright format, partly on disk while it runs, and what its page says first."""

from pathlib import Path
from typing import Any

import torch
from tests.conftest import Checkpoints
from transformers import AutoModelForCausalLM

import bitwright
from bitwright.core.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "bitwright.md"


def test_blocks_may_lie_on_disk_and_the_model_is_saved_packed(tiny: Checkpoints, tmp_path: Path) -> None:
    """From compressed-tensors, asymmetric weights do not load so, and ``save_pretrained`` writes ordinary weights."""
    folder = tmp_path / "out"
    bitwright.quantize(Recipe(str(tiny()), "W4A16g32", method="rtn", format="bitwright"), folder)
    places = {"model.layers.0": "disk", **dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm"), "cpu")}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    kind: Any = AutoModelForCausalLM
    whole = kind.from_pretrained(folder)
    parts = kind.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        assert torch.equal(parts(torch.arange(16)[None]).logits, whole(torch.arange(16)[None]).logits)
    whole.save_pretrained(tmp_path / "again")
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, tmp_path / "again")]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]


def test_the_page_warns_first_of_what_happens_without_the_plugin() -> None:
    """transformers goes on with random weights."""
    _, first, *_ = PAGE.read_text(encoding="utf-8").split("\n\n")
    assert "Import `bitwright` before" in first and "Unknown quantization type" in first and "random" in first
