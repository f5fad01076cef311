"""A walk through a model block by block: what comes out is what transformers' own forward pass makes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import config_of, dissected

from bitwright.model.calls import hand_back, joined, mapped, split
from bitwright.model.skeleton import Skeleton
from bitwright.model.walk import Walk

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "sliding_window": 8, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "full_attention"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "gemma3: windows, two rotary tables": ("gemma3_text", SIZES | {"layer_types": SLIDING}),
    "gemma3n: shared keys, inputs of each layer, four streams": (
        "gemma3n_text",
        SIZES
        | {
            "layer_types": SLIDING, "num_kv_shared_layers": 1, "activation_sparsity_pattern": None, "laurel_rank": 32,
            "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 32, "altup_num_inputs": 2,
        },
    ),
    "gpt2: learned positions": (
        "gpt2",
        {"vocab_size": 128, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "bos_token_id": 1,
         "eos_token_id": 2},
    ),
    "mixtral: experts": ("mixtral", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "falcon_h1: a state space beside attention": (
        "falcon_h1",
        SIZES
        | {"mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16,
           "mamba_chunk_size": 8},
    ),
    "gpt_neox: attention and MLP side by side": ("gpt_neox", SIZES | {"use_parallel_residual": True}),
}  # fmt: skip
TOKENS = torch.randint(3, 128, (5, 20), generator=torch.Generator().manual_seed(1))


def pass_blocks(skeleton: Skeleton, walk: Walk, together: int) -> list[str]:
    """Let segments pass every block, so many at once; the names of the blocks."""
    names = list[str]()
    while walk.name is not None and walk.name != skeleton.head:
        names.append(walk.name)
        with skeleton.filled(walk.name) as module:
            for start in range(0, len(TOKENS), together):
                rows = range(start, min(start + together, len(TOKENS)))
                calls = [walk.calls[row] for row in rows]
                call = joined(calls)
                results = split(module(*call.args, **dict(call.kwargs)), calls)
                hand_back(call, calls)
                for row, result in zip(rows, results, strict=True):
                    walk.send(row, mapped(result, torch.Tensor.clone))
        walk.turn()
    return names


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_walk_is_transformers_own_forward_pass(name: str, together: int, tmp_path: Path) -> None:
    kind, sizes = KINDS[name]
    subject, model = dissected(config_of(kind, **sizes), tmp_path)
    inputs = list[torch.Tensor]()
    head = model.get_output_embeddings()
    assert head is not None
    head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(TOKENS)
    assert all(block.joins for block in subject.anatomy.blocks)
    with subject.skeleton.walk(TOKENS) as walk:
        names = pass_blocks(subject.skeleton, walk, together)
        assert names == [block.path for block in subject.anatomy.blocks] and len(names) > 1
        assert walk.name == subject.skeleton.head
        hidden = torch.cat([call.hidden for call in walk.calls])
        torch.testing.assert_close(hidden, inputs[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(hidden[0], hidden[1], atol=1e-2), "the segments differ"
        walk.advance([torch.zeros(1, 1, 128) for _ in TOKENS])
        assert walk.name is None and walk.calls == []


@torch.no_grad()
def test_calls_share_what_is_equal_and_no_more(tmp_path: Path) -> None:
    subject, _ = dissected(config_of("llama", **SIZES), tmp_path)
    with subject.skeleton.walk(TOKENS) as walk:
        first, second = walk.calls[:2]
        assert first.hidden is not second.hidden and not torch.equal(first.hidden, second.hidden)
        for one, other in zip(first.kwargs["position_embeddings"], second.kwargs["position_embeddings"], strict=True):
            assert one is other
        call = joined([first, second])
        assert call.hidden.shape == (2, 20, 64)
        assert call.kwargs["position_embeddings"][0] is first.kwargs["position_embeddings"][0]


def test_outside_of_a_walk_the_model_runs_as_ever(tmp_path: Path) -> None:
    """And passes that are given up end, and leave nothing in memory."""
    subject, model = dissected(config_of("llama", **SIZES), tmp_path)
    skeleton = subject.skeleton
    with pytest.raises(ZeroDivisionError), skeleton.walk(TOKENS) as walk:
        segments = list(walk._segments)
        raise ZeroDivisionError
    assert segments and all(segment.dead for segment in segments)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    hidden = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    with skeleton.filled("model.layers.0") as block, torch.no_grad():
        rotary = model.get_submodule("model.rotary_emb")(hidden, torch.arange(4)[None])
        result = block(hidden, position_embeddings=rotary)
        assert torch.equal(result, model.get_submodule("model.layers.0")(hidden, position_embeddings=rotary))
