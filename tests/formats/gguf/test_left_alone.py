"""What stays at 16 bits in a GGUF file, as the result says it."""

from pathlib import Path
from typing import Any

import pytest
from tests.formats.gguf.conftest import Models

import bitwright
from bitwright.core.recipe import Recipe


@pytest.mark.parametrize("data", [{}, {"calibration": "builtin", "samples": 2, "seqlen": 32}])
@pytest.mark.parametrize("embeddings", [None, "f16"])
def test_a_file_quantizes_the_embedding_too_unless_it_is_told_not_to(
    model: Models, tmp_path: Path, data: dict[str, Any], embeddings: str | None
) -> None:
    method = "gptq" if data else "rtn"
    recipe = Recipe(str(model("llama")), "W4A16g32sym", method, "gguf", embeddings=embeddings, **data)
    result = bitwright.quantize(recipe, tmp_path / "out.gguf")
    assert result.left_alone.keys() == ({"embedding", "output layer"} if embeddings else set())
