from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.client_cases import CASES, OUTSIDE, Case, bytes_of_weights, make
from gguf import GGUFReader, dequantize
from tests.golden import mlc_page

from bitwright.core.scheme import Scheme
from bitwright.demo import MODEL_DIR


def test_every_case_names_a_worker_and_a_scheme() -> None:
    workers = Path(__file__).parents[2] / "benchmarks/clients"
    assert CASES
    for case in CASES:
        assert (workers / f"{case.client}_worker.py").exists()
        Scheme.parse(case.scheme)
    assert len({tuple(case.identity.values()) for case in CASES}) == len(CASES)


def test_what_is_expected_of_gguf_is_what_its_own_library_reads(tmp_path: Path) -> None:
    made = make(Case("llamacpp", "gguf", "W4A16g32sym", "bitwright"), MODEL_DIR, tmp_path)
    stored = {tensor.name: tensor for tensor in GGUFReader(made.output).tensors}
    model = made.load()
    for theirs, ours in (("token_embd", "model.embed_tokens"), ("blk.1.ffn_down", "model.layers.1.mlp.down_proj")):
        tensor = stored[f"{theirs}.weight"]
        read = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(read, model.get_parameter(f"{ours}.weight").detach().numpy())
    assert made.bits_per_weight == 4.5
    assert made.true_bytes < made.bytes_on_disk < 1.05 * made.true_bytes


def test_what_is_expected_of_mlc_is_what_its_page_says(tmp_path: Path) -> None:
    made = make(Case("tvm", "mlc", "mlc:q3f16_1", "bitwright"), MODEL_DIR, tmp_path)
    embedding = made.load().get_parameter(OUTSIDE[0]).detach()
    read = mlc_page.weight(mlc_page.tensors(made.output), "model.embed_tokens", "q3f16_1", embedding.shape[1])
    torch.testing.assert_close(torch.from_numpy(np.array(read)).float(), embedding, rtol=2**-11, atol=0)


@pytest.mark.parametrize(("scheme", "settings"), [("mlc:q4f16_1", {"embeddings": "f16"}), ("W4A16g128", {})])
def test_nothing_is_expected_of_an_embedding_that_mlc_leaves_alone(
    scheme: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    made = make(Case("tvm", "mlc", scheme, "bitwright", settings=settings), MODEL_DIR, tmp_path)
    assert not made.changed
    assert made.true_bytes <= made.bytes_on_disk < 1.01 * made.true_bytes


def test_settings_go_to_the_recipe_or_to_the_client(tmp_path: Path) -> None:
    case = Case("gptqmodel", "gptq", "W4A16sym", settings={"exclude": "*.o_proj.weight", "backend": "gptq_torch"})
    assert case.options == {"backend": "gptq_torch"}
    assert case.identity["settings"] == "exclude *.o_proj.weight, backend gptq_torch"
    made = make(case, MODEL_DIR, tmp_path)
    assert "model.layers.0.self_attn.o_proj.weight" in made.reference.passed


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_an_export_is_compared_with_the_folder_that_it_comes_from(format: str, tmp_path: Path) -> None:
    scheme = "W4A16g128sym" if format == "gptq" else "W4A16g128"
    made = make(Case("gptqmodel", format, scheme, "compressed-tensors"), MODEL_DIR, tmp_path)
    assert made.reference.format_name == "compressed-tensors"
    assert made.bytes_on_disk == bytes_of_weights(made.output) > made.true_bytes
