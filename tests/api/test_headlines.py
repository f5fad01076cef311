"""The summary says what the whole model takes, beside what its linears take, and what stays in full precision."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.conftest import Checkpoints
from typer.testing import CliRunner

import bitwright
from bitwright.cli.commands import app
from bitwright.core.recipe import Recipe


def test_the_whole_model_and_what_is_left_alone(tiny: Checkpoints, tmp_path: Path) -> None:
    command = ["quantize", str(tiny()), "--scheme", "W4A16g32", "--method", "rtn", "--exclude", "*.0.mlp.*"]
    shown = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "shown")])
    assert shown.exit_code == 0
    result = json.loads(CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out"), "--json"]).stdout)
    tensors = load_file(tiny() / "model.safetensors")
    matrices = {name: tensor.numel() for name, tensor in tensors.items() if tensor.dim() == 2}
    total = sum(matrices.values())
    shares = {
        "excluded by *.0.mlp.*": sum(n for name, n in matrices.items() if ".0.mlp." in name) / total,
        "embedding": matrices["model.embed_tokens.weight"] / total,
        "output layer": matrices["lm_head.weight"] / total,
    }
    assert result["left_alone"] == pytest.approx(shares) and result["full_bits"] == 16
    parameters = sum(tensor.numel() for tensor in tensors.values())
    on_disk = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert result["model_bits_per_weight"] == pytest.approx(8 * on_disk / parameters)
    assert result["model_bits_per_weight"] > result["bits_per_weight"]
    words = " ".join(shown.stdout.split())
    assert f"{result['model_bits_per_weight']:.3f} of the whole model" in words
    assert f"left alone {sum(shares.values()):.0%} of the weights of matrices stay at 16 bits" in words


def test_nothing_is_said_where_all_is_stored_in_full(tiny: Checkpoints, tmp_path: Path) -> None:
    result = bitwright.quantize(Recipe(str(tiny()), "W4A16g32", "rtn", "dense"), tmp_path / "out")
    assert not result.left_alone
