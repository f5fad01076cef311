"""Speed and memory of tiny models: what is measured adds up, and what cannot be measured is refused."""

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Checkpoints

import bitwright
import bitwright.demo
from bitwright import api
from bitwright.api import benching
from bitwright.core.errors import UserError
from bitwright.core.recipe import Recipe
from bitwright.evaluation import contenders
from bitwright.evaluation.llamacpp_speed import peak_resident
from bitwright.evaluation.speed import Contender, Speed, held_bytes, measure_in_turn

MIB = 2**20


@pytest.fixture(scope="module")
def packed(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "out"
    bitwright.quantize(Recipe(str(tiny()), "W4A16g32", "rtn", "bitwright"), folder)
    return folder


def test_transformers(packed: Path, tiny: Checkpoints) -> None:
    found = api.bench(packed, tiny(), tokens=4, prompt=8, threads=1, rounds=2, device="cpu")
    model, original = found.rows
    assert (found.engine, found.dtype, found.tokens, found.prompt, found.threads) == (
        "transformers",
        "bfloat16",
        4,
        8,
        1,
    )
    assert (model.role, original.role) == ("model", "original")
    parameters = bitwright.load(tiny(), device="cpu", dtype="bfloat16")
    assert original.weight_bytes == held_bytes(parameters) > 2 * parameters.num_parameters()
    assert found.weight_ratio == model.weight_bytes / original.weight_bytes < 0.7
    assert original.peak_bytes > 50 * MIB
    for row in found.rows:
        assert len(row.tokens_per_second_each) == len(row.prompt_tokens_per_second_each) == 2
        assert min(row.tokens_per_second_each) <= row.tokens_per_second <= max(row.tokens_per_second_each)
        assert row.prompt_tokens_per_second > 0
    assert found.speedup == model.tokens_per_second / original.tokens_per_second


def test_tied_weights_are_counted_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert held_bytes(model) == 64


def test_memory_of_this_process() -> None:
    before = peak_resident()
    held = bytearray(b"x") * (before + 64 * MIB)
    assert peak_resident() >= len(held)


def test_in_turn() -> None:
    write = "import sys; open(sys.argv[2], 'w').write(open(sys.argv[1]).read())"

    def contender(name: str, speed: float) -> Contender:
        said = {"weight_bytes": 1, "peak_bytes": 2, "version": "v"}
        rates = {"tokens_per_second": speed, "prompt_tokens_per_second": 2 * speed}
        return Contender(name, name, (sys.executable, "-c", write), said | rates)

    order: list[str] = []
    rows, version = measure_in_turn([contender("a", 3), contender("b", 4)], 2, lambda p: order.append(p.detail))
    assert order == ["a", "b", "a", "b"] and version == "v"
    assert [row.tokens_per_second_each for row in rows] == [(3, 3), (4, 4)]


def test_a_process_that_fails_says_why() -> None:
    broken = Contender("model", "M", (sys.executable, "-c", "raise SystemExit('no room')"), {})
    with pytest.raises(UserError, match=r"M could not be measured: its process ended with 1\. It said:\nno room$"):
        measure_in_turn([broken], 1, lambda _: None)


def test_a_process_that_is_killed_was_most_likely_out_of_memory() -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    killed = Contender("model", "M", (sys.executable, "-c", kill), {})
    with pytest.raises(
        UserError, match=r"its process was ended by signal 9\. .*\nnothing\nIt was most likely out of mem"
    ):
        measure_in_turn([killed], 1, lambda _: None)


def test_what_a_process_refuses_is_all_that_is_said() -> None:
    refuse = "import sys; sys.stderr.write('M takes 9 tokens at most'); raise SystemExit(3)"
    with pytest.raises(UserError, match=r"^M takes 9 tokens at most$"):
        measure_in_turn([Contender("model", "M", (sys.executable, "-c", refuse), {})], 1, lambda _: None)


@pytest.mark.parametrize("original", ["file", "folder"])
def test_llama_cpp(original: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    folder = Path(bitwright.demo.__file__).parent / "model"
    bitwright.quantize(Recipe(str(folder), "W4A16g32sym", "rtn", "gguf"), tmp_path / "q4.gguf")
    against = folder
    if original == "file":
        against = tmp_path / "f16.gguf"
        api.export(folder, against, format="gguf", embeddings="f16")
    found = api.bench(tmp_path / "q4.gguf", against, tokens=4, prompt=8, threads=1, rounds=1)
    assert found.engine == "llama.cpp" and found.version.startswith("xllamacpp ")
    assert found.weight_ratio is not None and 0.25 < found.weight_ratio < 0.4
    assert all(row.tokens_per_second > 0 and row.prompt_tokens_per_second > 0 for row in found.rows)
    assert found.rows[1].model == str(against)


def test_more_tokens_than_a_file_takes(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    folder = Path(bitwright.demo.__file__).parent / "model"
    bitwright.quantize(Recipe(str(folder), "W4A16g32sym", "rtn", "gguf"), tmp_path / "q4.gguf")
    with pytest.raises(UserError, match=r"^\S+q4\.gguf takes \d+ tokens at most, and 50000 were asked for; give --pro"):
        api.bench(tmp_path / "q4.gguf", tokens=50000, threads=1, rounds=1)


def test_llama_cpp_and_a_folder(packed: Path) -> None:
    with pytest.raises(UserError, match=f"bitwright export {packed} --format gguf --output out.gguf"):
        api.bench(packed, engine="llama.cpp")


def test_transformers_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"--engine llama\.cpp runs it"):
        api.bench(tmp_path / "m.gguf", engine="transformers")


@pytest.mark.skipif(find_spec("xllamacpp") is not None, reason="xllamacpp is installed")
def test_no_xllamacpp(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"pip install 'bitwright\[llamacpp\]'"):
        api.bench(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("python", "says"), [("nowhere/python", "cannot be run"), ("false", "cannot import xllamacpp")]
)
def test_another_interpreter(python: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=f"--python {python} {says}"):
        api.bench(tmp_path / "m.gguf", python=python)


def test_a_library_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "libllama.so").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"--library .*libllama\.so is no llama\.cpp that can be measured: "):
        api.bench(tmp_path / "m.gguf", library=tmp_path / "libllama.so")
    with pytest.raises(UserError, match="leave --python other out"):
        api.bench(tmp_path / "m.gguf", library=tmp_path / "libllama.so", python="other")
    other = next(path for path in Path(torch.__file__).parent.rglob("libc10.*"))
    with pytest.raises(UserError, match="llama_backend_init"):
        api.bench(tmp_path / "m.gguf", library=other)


@pytest.mark.parametrize("asked", [{"python": sys.executable}, {"library": "libllama.so"}])
def test_what_transformers_has_no_use_for(asked: dict[str, Any], packed: Path) -> None:
    ((name, value),) = asked.items()
    with pytest.raises(UserError, match=rf"engine transformers has no use for --{name} {value}; leave it out$"):
        api.bench(packed, tokens=4, prompt=4, **asked)


@pytest.mark.parametrize(("asked", "says"), [
    ({"device": "cuda"}, "--device cuda; leave it out; llama.cpp runs where it was built for: --library takes"),
    ({"device": "cpu"}, "--device cpu; leave it out; llama.cpp runs where it was built for: --library takes"),
    ({"dtype": "float16"}, "--dtype float16; leave it out$"),
])  # fmt: skip
def test_what_llama_cpp_has_no_use_for(asked: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=f"engine llama.cpp has no use for {says}"):
        api.bench(tmp_path / "m.gguf", **asked)


@pytest.mark.parametrize(("change", "says"), [
    ({"num_hidden_layers": 3}, "num_hidden_layers 3 there and 2 here"),
    ({"vocab_size": 128, "hidden_size": 128}, "vocab_size 128 there and 256 here, hidden_size 128 there and 64 here"),
    ({"num_key_value_heads": 4}, "num_key_value_heads 4 there and 2 here"),
])  # fmt: skip
def test_another_model_s_original(
    change: dict[str, int], says: str, packed: Path, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching, "measure_in_turn", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(UserError, match=rf"--against {tiny(**change)} is another model than {packed}: {says}\. Name"):
        api.bench(packed, tiny(**change), tokens=4, prompt=4)


@pytest.fixture(scope="module")
def gguf(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``gguf(**config)``: the tiny model as a .gguf file."""
    made: dict[str, Path] = {}

    def of(**config: int) -> Path:
        if (key := repr(config)) not in made:
            made[key] = tmp_path_factory.mktemp("gguf") / "m.gguf"
            api.export(tiny(eos_token_id=0, **config), made[key], format="gguf")
        return made[key]

    return of


def test_another_model_s_original_in_llama_cpp(
    gguf: Callable[..., Path], tiny: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = list[Sequence[Contender]]()

    def measure(contenders: Sequence[Contender], *_: object) -> tuple[list[Speed], str]:
        measured.append(contenders)
        return [], "v"

    monkeypatch.setattr(contenders, "_with_xllamacpp", lambda _: sys.executable)
    monkeypatch.setattr(benching, "measure_in_turn", measure)
    says = "num_hidden_layers 3 there and 2 here"
    for other in (gguf(num_hidden_layers=3), tiny(eos_token_id=0, num_hidden_layers=3)):
        with pytest.raises(UserError, match=rf"--against {other} is another model than {gguf()}: {says}\. Name"):
            api.bench(gguf(), other)
    raw = gguf().read_bytes()
    key = b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00llama"
    (tmp_path / "m.gguf").write_bytes(raw.replace(key, key[:-5] + b"phi99"))
    with pytest.raises(UserError, match="model_type phi99 there and llama here"):
        api.bench(gguf(), tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=r"m\.gguf.* is cut short"):
        api.bench(gguf(), tmp_path / "m.gguf")
    assert not measured
    for same in (gguf(), tiny(eos_token_id=0)):
        api.bench(gguf(), same)
    assert len(measured) == 2


def test_neither(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"junk")
    with pytest.raises(UserError, match="neither the folder of a model nor a GGUF file"):
        api.bench(tmp_path / "m.bin")
    with pytest.raises(UserError, match=r"there is no .*none; bench takes a folder"):
        api.bench(tmp_path / "none")


def test_what_is_asked(tiny: Checkpoints) -> None:
    with pytest.raises(UserError, match="--tokens is 0; it must be at least 1"):
        api.bench(tiny(), tokens=0)
    with pytest.raises(UserError, match="takes 128 tokens at most, and 512 were asked for"):
        api.bench(tiny())
    with pytest.raises(UserError, match=r"bench measures in llama\.cpp and transformers, not in vllm"):
        api.bench(tiny(), engine="vllm")
    with pytest.raises(UserError, match=r"bench knows no engine .lama\.cpp.; did you mean llama\.cpp"):
        api.bench(tiny(), engine="lama.cpp")
