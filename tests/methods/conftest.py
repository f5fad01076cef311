"""What the tests of methods share: a block with the data that methods see, and what a written folder has lost."""

from pathlib import Path

import pytest
from tests.conftest import measured
from tests.streamed import block, streamed

import bitwright

__all__ = ["block", "streamed"]  # fixtures


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a text to learn from and to measure on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n} green bottles hanging on the wall, and {n * n} red ones; " for n in range(120)))
    return str(path)


def divergence(recipe: bitwright.Recipe, out: Path) -> float:
    """Run a recipe; the KL divergence of the written folder from the original, on the text it learned from."""
    bitwright.quantize(recipe, out)
    lost = measured(out, recipe.calibration, seqlen=recipe.seqlen, reference=recipe.model).kl_divergence
    assert lost is not None
    return lost
