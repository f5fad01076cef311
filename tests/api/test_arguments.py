"""An argument of a wrong type is one clear error of ours, for every public function."""

from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
from bitwright import api
from bitwright.core.errors import UserError
from bitwright.demo import MODEL_DIR


def recipe() -> bitwright.Recipe:
    return bitwright.Recipe(MODEL_DIR, scheme="W4A16g32", method="rtn")


@pytest.mark.parametrize(
    ("name", "positional", "named", "says"),
    [
        ("load", [5], {}, "load(folder=5): a path or a text was expected"),
        ("load", [MODEL_DIR], {"device": 5}, "load(device=5): a text"),
        ("inspect", [None], {}, "inspect(path=None): a path or a text"),
        ("verify", [5], {}, "verify(folder=5)"),
        ("verify", ["x"], {"against": 5}, "verify(against=5): a path or a text or None"),
        ("evaluate", [MODEL_DIR, 5], {}, "evaluate(text=5): a text or None"),
        ("evaluate", [MODEL_DIR], {"seqlen": "x"}, "evaluate(seqlen='x'): a whole number or None"),
        ("evaluate", [MODEL_DIR], {"seqlen": 8.5}, "evaluate(seqlen=8.5)"),
        ("evaluate", [MODEL_DIR], {"tasks": 5}, "evaluate(tasks=5): a list, each a text"),
        ("evaluate", [MODEL_DIR], {"task_files": [5]}, "evaluate(task_files=[5])"),
        ("evaluate", [MODEL_DIR], {"listener": 5}, "evaluate(listener=5): a function"),
        ("export", ["x", "y"], {"format": 5}, "export(format=5): a text"),
        ("bench", [MODEL_DIR], {"threads": 10**6}, "--threads is 1000000; 64 are the most"),
        ("bench", [MODEL_DIR], {"python": 5}, "bench(python=5)"),
        ("plan", [recipe], {"workers": "x"}, "plan(workers='x')"),
        ("quantize", [recipe, None], {}, "quantize(output=None): a path or a text"),
        ("quantize", [recipe, b"x"], {}, "quantize(output=b'x')"),
        ("quantize", [5, 5], {}, "quantize(output=5)"),
        ("quantize", [5, "x"], {}, "a Recipe was expected, found 5"),
        ("quantize", [recipe, "x" * 9999], {"max_memory": b"y" * 10**6}, "quantize(max_memory=b'yyy"),
    ],
)
def test_arguments_of_a_wrong_type(name: str, positional: list[Any], named: dict[str, Any], says: str) -> None:
    made = [item() if item is recipe else item for item in positional]
    with pytest.raises(UserError) as error:
        getattr(api, name)(*made, **named)
    assert says in str(error.value) and len(str(error.value)) < 300


def test_those_of_the_right_type(tmp_path: Path) -> None:
    assert bitwright.inspect(str(MODEL_DIR)).blocks == bitwright.inspect(path=MODEL_DIR).blocks
    assert bitwright.load(MODEL_DIR, device=torch.device("cpu")).dtype == torch.float32  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected"):
        bitwright.inspect(MODEL_DIR, x=1)  # type: ignore[call-arg]
