"""Parameters and the tensors behind them: held to what transformers itself loads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import loaded
from tests.tiny_models import config_of, saved

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError
from bitwright.model.skeleton import Skeleton
from bitwright.model.source import Source
from bitwright.model.sources import Sources

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = 12
"""More than ten: they are put in the order of their numbers, not of their names."""
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"tie_word_embeddings": True},
    "mixtral": SIZES | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "gpt_oss": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "gpt_neox": SIZES,
    "qwen2_moe": SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt2": {"vocab_size": 128, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2},
}  # fmt: skip


def sources_of(folder: Path) -> tuple[Skeleton, Sources]:
    source = Source.open(folder, tokenizer=False)
    skeleton = Skeleton(source.checkpoint, source.to_build(), torch.float32, torch.device("cpu"))
    return skeleton, skeleton.sources


def require_equal_parameters(folder: Path) -> None:
    skeleton, sources = sources_of(folder)
    theirs = dict(loaded(folder).named_parameters(remove_duplicate=False))
    together = sources.read_all(theirs)
    assert theirs.keys() == dict(skeleton.model.named_parameters(remove_duplicate=False)).keys() == together.keys()
    for name, parameter in theirs.items():
        assert torch.equal(sources.read(name), parameter) and torch.equal(together[name], parameter), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    require_equal_parameters(saved(config_of(kind, **KINDS[kind]), tmp_path)[0])


def renamed(folder: Path, prefix: str) -> None:
    """Leave a prefix of all names out, as old checkpoints do."""
    tensors = {name.removeprefix(prefix): each for name, each in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_names_without_the_models_own_prefix(tmp_path: Path) -> None:
    """As in the GPT-2 that everybody downloads."""
    folder, _ = saved(config_of("gpt2", **KINDS["gpt2"]), tmp_path)
    renamed(folder, "transformer.")
    assert "h.0.attn.c_attn.weight" in Checkpoint.open(folder)
    require_equal_parameters(folder)
    assert sources_of(folder)[1].whole("transformer.h.0.attn.c_attn.weight") == "h.0.attn.c_attn.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_is_found_again_row_by_row(kind: str, tmp_path: Path) -> None:
    folder, _ = saved(config_of(kind, **KINDS[kind]), tmp_path)
    skeleton, sources = sources_of(folder)
    found = set[tuple[str, int | None]]()
    for name, parameter in skeleton.model.named_parameters():
        if name in sources.conversions and parameter.dim() in (2, 3):
            values = sources.read(name)
            for (tensor, expert), places in sources.places(name).items():
                stored = sources.checkpoint.read(tensor)
                rows = [
                    place.of(values if place.parameter == name else sources.read(place.parameter)) for place in places
                ]
                assert torch.equal(torch.cat(rows), stored if expert is None else stored[expert]), tensor
                found.add((tensor, expert))
    shapes = {name: sources.checkpoint.entry(name).shape for name in sources.checkpoint.names}
    stacks = {name: range(shape[0]) for name, shape in shapes.items() if len(shape) == 3}
    matrices = {(name, None) for name, shape in shapes.items() if len(shape) == 2}
    assert found == matrices | {(name, expert) for name, experts in stacks.items() for expert in experts}


def test_where_mixtrals_experts_are(tmp_path: Path) -> None:
    folder, model = saved(config_of("mixtral", **KINDS["mixtral"]), tmp_path)
    _, sources = sources_of(folder)
    fused, block = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.block_sparse_moe.experts"
    assert model.get_parameter(fused).shape == (EXPERTS, 2 * 48, 64)
    assert sources.whole(fused) is None and len(sources.tensors(fused)) == 2 * EXPERTS
    for expert in range(EXPERTS):
        for leaf, start in (("w1", 0), ("w3", 48)):
            (place,) = sources.places(fused)[f"{block}.{expert}.{leaf}.weight", None]
            assert (place.parameter, place.index, place.rows) == (fused, expert, (start, start + 48, 1))
            assert not place.transposed


def test_a_tied_output_layer_is_read_as_the_embedding(tmp_path: Path) -> None:
    _, sources = sources_of(saved(config_of("llama", **KINDS["llama"]), tmp_path)[0])
    assert (
        sources.tensors("lm_head.weight")
        == ("model.embed_tokens.weight",)
        == sources.tensors("model.embed_tokens.weight")
    )
    assert sources.whole("lm_head.weight") is None, "it is no tensor of its own"


def test_what_is_missing_or_does_not_go_together_is_said(tmp_path: Path) -> None:
    folder, _ = saved(config_of("mixtral", **KINDS["mixtral"]), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.input_layernorm.weight"]
    odd = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    tensors[odd] = tensors[odd][:40].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, sources = sources_of(folder)
    assert sources.tensors("model.layers.0.input_layernorm.weight") == ()
    with pytest.raises(CheckpointError, match=r"no tensor for 'model\.layers\.0\.input_layernorm\.weight'"):
        sources.read("model.layers.0.input_layernorm.weight")
    with pytest.raises(CheckpointError, match=r"the tensors of model\.layers\.0\.mlp\.experts\.gate_up_proj do not go"):
        sources.read("model.layers.0.mlp.experts.gate_up_proj")
