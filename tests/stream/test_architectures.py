"""Whole runs with calibration data on architectures whose blocks are unlike Llama's, and runs that are continued."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.conftest import Killed
from tests.conftest import contents, save_tokenizer
from tests.streamed import block_of, outputs, read_by, subject_of
from tests.tiny_models import config_of, saved

import bitwright
from bitwright.core.progress import Progress
from bitwright.stream.activations import enter, statistics
from bitwright.stream.forward import Inputs

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
EXPERTS = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 256, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "bos_token_id": None,
             "eos_token_id": None},
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS,
    "bloom": SIZES,
    "gemma3n_text": SIZES | {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_hidden_layers": 3,
        "num_kv_shared_layers": 1, "activation_sparsity_pattern": None, "laurel_rank": 32, "pad_token_id": 0,
        "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 32, "altup_num_inputs": 2,
        "sliding_window": 8,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, model = saved(config_of(request.param, **KINDS[request.param]), tmp_path_factory.mktemp(request.param))
    model.bfloat16().save_pretrained(path)
    save_tokenizer(path)
    return path


def test_a_run_that_is_continued_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Finished blocks are read back: experts in stacks, weights stored transposed, keys and values that are shared."""
    recipe = bitwright.Recipe(str(folder), "W4A16g32", "awq+gptq", "bitwright", "builtin", 4, 32)
    whole = bitwright.quantize(recipe, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.stage == "quantize" and progress.done == 1:
            raise Killed

    with pytest.raises(Killed):
        bitwright.quantize(recipe, tmp_path / "continued", listener=stop)
    assert bitwright.quantize(recipe, tmp_path / "continued").resumed == 1
    assert contents(tmp_path / "continued") == contents(tmp_path / "whole")
    checked = bitwright.verify(tmp_path / "whole", folder)
    assert checked.passed, [check for check in checked.checks if not check.passed]
    assert whole.output_error is not None and 0 < whole.output_error < 0.5


@torch.no_grad()
def test_a_block_runs_with_its_own_tensors_as_ever(folder: Path) -> None:
    """Taken out of its parameters, and put in again, they are what they were; and every linear is seen once."""
    tokens = torch.randint(3, 256, (3, 20), generator=torch.Generator().manual_seed(1))
    subject = subject_of(folder)
    anatomy = subject.anatomy.blocks[0]
    with enter(subject.skeleton, tokens) as stream, block_of(subject, 0) as block:
        inputs = Inputs(stream.reference.calls, anatomy.joins)
        before = outputs(block, {}, inputs)
        same = outputs(block, {name: tensor.clone() for name, tensor in block.tensors.items()}, inputs)
        assert torch.equal(before, same)
        stats, made = statistics(block, inputs)
        assert torch.equal(torch.cat(made), before)
        assert set(stats) <= set(block.topology.linears)
        first = block.topology.groups[0].linears[0]
        assert stats[first].tokens == tokens.numel()
        for group in block.topology.groups:
            assert (group.linears[0] in stats) or group.routed, "only an expert may be reached by no token"
            if group.linears[0] in stats and not group.routed:
                x = read_by(block, [group.linears[0]], inputs)[group.linears[0]]
                torch.testing.assert_close(stats[group.linears[0]].max, x.amax(0))
        zeroed = {f"{first}.weight": torch.zeros_like(block.weight(first))}
        assert not torch.equal(outputs(block, zeroed, inputs), before)
        assert torch.equal(outputs(block, {}, inputs), before), "and nothing of it stays"
