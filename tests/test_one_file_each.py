"""A method with a setting, an architecture, a format of tensors, a format of files and an engine, each one new file.

Everything that Bitwright does takes them as if they had always been there.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.conftest import save_tokenizer
from transformers import HeliumConfig, HeliumForCausalLM, StableLmConfig, StableLmForCausalLM

import bitwright
from bitwright import api, cli
from bitwright.core.errors import RecipeError
from bitwright.core.registry import architecture_of
from bitwright.formats import QuantizedFolder

METHOD = '''
"""A method that halves its ranges so many times."""
from dataclasses import dataclass, replace
from bitwright.core.decisions import Decision
from bitwright.core.method import DataFree
from bitwright.core.settings import Settings, setting
from bitwright.steps.ranges import minmax

@dataclass(frozen=True)
class TighterSettings(Settings):
    tightness: float = setting(0.95, "share of a range that is kept", above=0, most=1)

def decide(weight, context, decided):
    low, high = minmax(decided.inside(weight), decided.tile or context.scheme.tile)
    return replace(decided, low=low * context.settings.tightness, high=high * context.settings.tightness)

METHOD = DataFree(
    summary="keep a share of each range", settings=TighterSettings, decides=frozenset({Decision.RANGE}), decide=decide
)
'''

FAMILY = '''
"""Helium: what formats ask about its attention."""
from bitwright.core.block import Architecture, Family

def family(config):
    return Family("HeliumAttention", config["head_dim"])

ARCHITECTURE = Architecture(family=family)
'''

TENSORS = '''
"""One byte per code."""
import torch
from bitwright.core.format import Reader, TensorFormat
from bitwright.core.grid import Grid, Tile, Zero
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described

LEAVES = ("byte_codes", "byte_scales", "byte_zeros")

def holds(grid, tile, outliers):
    return not outliers and tile.out == 1 and grid.zero in (Zero.NONE, Zero.CODE)

def encode(name, weight):
    codes = weight.codes - weight.grid.qmin
    tensors = {f"{name}.byte_codes": codes.to(torch.uint8), f"{name}.byte_scales": weight.scale}
    return tensors if weight.zero is None else tensors | {f"{name}.byte_zeros": weight.zero.to(torch.uint8)}

def read(tensors, name, described):
    grid = described.grid_of(name)
    codes, scale = tensors[f"{name}.byte_codes"], tensors[f"{name}.byte_scales"]
    zero = None if grid.symmetric else tensors[f"{name}.byte_zeros"]
    return QTensor((codes.to(torch.int16) + grid.qmin).to(torch.int8 if grid.symmetric else torch.uint8),
                   scale, zero, grid, Tile(1, codes.shape[1] // scale.shape[1]))

def decode(tensors, name, grid):
    return read(tensors, name, Described(grid)).dequantize()

def config(model):
    own = {name: said(scheme) for name, scheme in model.schemes.items()}
    return {"quant_method": "bytes", **said(model.scheme), "own": own, "kept": list(model.kept)}

def said(scheme):
    return {"bits": scheme.weight.bits, "symmetric": scheme.weight.symmetric, "group": scheme.tile.in_}

def grid_of(said):
    return Grid.integers(said["bits"], said["symmetric"])

def described(config):
    own = config["own"]
    return Described(
        grid_of(config), kept=tuple(config["kept"]), tile=Tile(1, config["group"]),
        grids={name: grid_of(said) for name, said in own.items()},
        named_tiles={name: Tile(1, said["group"]) for name, said in own.items()},
    )

def stored_bytes(shape, scheme, dtype):
    rows, columns = scheme.tile.counts(shape[-2:])
    return shape[-2] * shape[-1] + rows * columns * (dtype.itemsize + (not scheme.weight.symmetric))

FORMAT = TensorFormat(
    name="bytes", summary="one byte per code", holds=holds, holds_what="weights in groups along the input, no outliers",
    stored_bytes=stored_bytes, leaves=LEAVES, codes="byte_codes", encode=encode,
    decode=decode, config=config, weights_only=True,
    reader=Reader(
        described=described, shape=lambda shapes, tensors, grid: shapes("byte_codes"), read=read,
        codes_may_be_weight=lambda described: False,
    ),
)
'''

FILE = '''
"""One safetensors file with everything in it, dequantized."""
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from bitwright.core.engine_file import EngineTensor
from bitwright.core.format import FileFormat
from bitwright.core.quantized import Difference

class Lump:
    wanted, unknown, misfiled = None, "a lump does not say", None

    def __init__(self, path):
        self.path = path
        with safe_open(path, "pt") as file:
            self.stored = {name: file.get_tensor(name) for name in file.keys()}
        self.tensors = {
            name: EngineTensor(name, tuple(each.shape), "F32", each.nbytes) for name, each in self.stored.items()
        }
        self.names = tuple(self.stored)

    def numbers(self, name):
        return None if self.stored[name].isfinite().all() else "not finite"

    def is_read(self, name):
        return True

    def checksums(self):
        return None

    def bits(self):
        count = sum(each.numel() for each in self.stored.values())
        return 32 * count, count

    def unlike(self, config):
        return []

    def shape(self, name):
        return tuple(self.stored[name].shape)

    def values(self, name):
        yield slice(None), self.stored[name]

    def levels(self, name):
        return iter(())

def write(model, path, options, listener):
    linears = {f"{name}.weight": model.read(name).dequantize(torch.float32) for name in model.linears}
    others = {name: model.tensor(name).float() for name in model.passed}
    save_file({name: each.contiguous() for name, each in (linears | others).items()}, path)
    return [Difference(name, True, 0.0) for name in model.linears]

FORMAT = FileFormat(
    name="lump", summary="one file", holds=lambda grid, tile, outliers: not outliers, holds_what="all but outliers",
    stored_bytes=lambda shape, scheme, dtype: 4 * shape[-1] * shape[-2], single=True, suffix=".lump", what="a lump",
    recognizes=lambda path: path.suffix == ".lump", check=lambda *_: None, write=write, open=Lump,
)
'''

ENGINE = '''
"""An engine that loads bytes and lumps."""
from bitwright.core.engine import Engine, Way

def way(format):
    return Way(format=format, symmetric=(4,), asymmetric=(4,), groups=(32,), channel=False, models=("helium",),
               checked="made up for a test")

ENGINE = Engine(name="byte.cpp", ways=(way("bytes"), way("lump")), note="made up for a test")
'''

FILES = {
    "methods/tighter.py": METHOD, "families/helium.py": FAMILY, "formats/bytes.py": TENSORS, "formats/lump.py": FILE,
    "engines/byte_cpp.py": ENGINE,
}  # fmt: skip


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One file in each room."""
    folder = tmp_path_factory.mktemp("added")
    with pytest.MonkeyPatch.context() as patch:
        for path, source in FILES.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(source)
        for room in {path.partition("/")[0] for path in FILES}:
            package = importlib.import_module(f"bitwright.{room}")
            patch.setattr(package, "__path__", [*package.__path__, str(folder / room)])
        yield
    for path in FILES:
        sys.modules.pop("bitwright." + path.removesuffix(".py").replace("/", "."), None)


@pytest.fixture(scope="module")
def model(added: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("helium") / "model"
    torch.manual_seed(0)
    config = HeliumConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    HeliumForCausalLM(config).bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize(("method", "calibration"), [
    ("tighter", None), ("tighter", "builtin"), ("tighter+gptq", "builtin"), ("smoothquant+tighter", "builtin"),
])  # fmt: skip
def test_all_of_them_together(method: str, calibration: str | None, model: Path, tmp_path: Path) -> None:
    recipe = bitwright.Recipe(
        str(model), "W4A16g32", method, None, calibration, 2, 32, engines="byte.cpp", tightness=0.9
    )
    assert bitwright.plan(recipe).settings["tightness"] == 0.9
    result = bitwright.quantize(recipe, tmp_path / "out")
    assert (result.format, result.linears) == ("bytes", 14)
    assert result.bits_per_weight == 8 + (16 + 8) / 32, "what the format stores"
    seen = bitwright.inspect(tmp_path / "out")
    assert seen.bits_per_weight == result.bits_per_weight and seen.quantization == "bytes"
    assert {row.tile for row in seen.linears if row.dtype == "packed"} == {(1, 32)}
    checked = bitwright.verify(tmp_path / "out", model)
    assert checked.passed and checked.linears == 14, [check for check in checked.checks if not check.passed]
    measured = bitwright.evaluate(tmp_path / "out", "builtin", reference=model, seqlen=32, windows=2)
    assert measured.loader == "bitwright" and measured.measurement is not None
    assert 0 < (measured.measurement.kl_divergence or 0) < 0.1
    for format, name in (("bitwright", "ours"), ("compressed-tensors", "theirs"), ("lump", "file.lump")):
        exported = bitwright.export(tmp_path / "out", tmp_path / name, format=format)
        assert exported.codes_kept == exported.linears == 14
    back = bitwright.export(tmp_path / "ours", tmp_path / "back", format="bytes")
    assert back.exact == 14
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    file = bitwright.verify(tmp_path / "file.lump", tmp_path / "out")
    assert file.passed and file.largest_error == 0.0, file


@pytest.mark.parametrize("calibration", [None, "builtin"])
def test_schemes_of_their_own(calibration: str | None, model: Path, tmp_path: Path) -> None:
    """What the config of the new format is told, and what is read of it again, linear by linear."""
    down, up, q = "mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"
    recipe = bitwright.Recipe(
        str(model), "W4A16g32", "smoothquant+tighter" if calibration else "tighter", "bytes", calibration, 2, 32,
        scheme_for={f"*.{down}": "W8A16g16", f"*.0.{up}": "W3A16g32sym"}, exclude=f"*.1.{q}",
    )  # fmt: skip
    result = bitwright.quantize(recipe, tmp_path / "out")
    assert (result.scheme, result.linears) == ("W4A16g32", 13)
    blocks = ("model.layers.0", "model.layers.1")
    own = {
        f"{blocks[0]}.{down}": ("W8A16g16", 8, False, 16),
        f"{blocks[0]}.{up}": ("W3A16g32sym", 3, True, 32),
        f"{blocks[1]}.{down}": ("W8A16g16", 8, False, 16),
    }
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["own"] == {
        name: {"bits": bits, "symmetric": symmetric, "group": group}
        for name, (_, bits, symmetric, group) in own.items()
    }
    assert set(config["kept"]) == {f"{blocks[1]}.{q}", "lm_head"}
    written = QuantizedFolder.open(tmp_path / "out")
    rows = {row.name: row for row in bitwright.inspect(tmp_path / "out").linears}
    for name in written.linears:
        _, bits, symmetric, group = own.get(name, ("", 4, False, 32))
        weight, row = written.read(name), rows[name]
        assert (weight.grid.bits, weight.grid.symmetric) == (bits, symmetric)
        assert (row.dtype, row.tile) == ("packed", (1, group))
        assert row.bits_per_weight == 8 + (16 if symmetric else 24) / group
    assert rows[f"{blocks[1]}.{q}"].dtype == "bfloat16"
    account = json.loads((tmp_path / "out/bitwright.json").read_text())
    linears = [linear for block in account["blocks"] for linear in block["linears"]]
    schemes = {linear["name"]: linear["scheme"] for linear in linears if "scheme" in linear}
    assert schemes == {name: scheme for name, (scheme, *_) in own.items()}
    assert bitwright.verify(tmp_path / "out", model).passed
    there = bitwright.export(tmp_path / "out", tmp_path / "ours", format="bitwright")
    back = bitwright.export(tmp_path / "ours", tmp_path / "back", format="bytes")
    assert there.exact == back.exact == 13
    assert json.loads((tmp_path / "back/config.json").read_text())["quantization_config"]["own"] == config["own"]
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_activations_of_the_new_architecture(model: Path, tmp_path: Path) -> None:
    """Its file says what formats ask, so that a method that needs no calibration data does not build the model."""
    result = bitwright.quantize(bitwright.Recipe(str(model), "W4A8KV8", "tighter"), tmp_path / "out")
    assert result.linears == 14
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert "HeliumAttention" in json.dumps(config)
    assert bitwright.verify(tmp_path / "out", model).passed


def test_an_architecture_needs_no_file(tmp_path: Path) -> None:
    """Its blocks, linears and sites are found in transformers' own code."""
    assert architecture_of("stablelm") is None
    model, out = tmp_path / "model", tmp_path / "out"
    config = StableLmConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    StableLmForCausalLM(config).bfloat16().save_pretrained(model)
    save_tokenizer(model)
    for number, (scheme, method) in enumerate((("W4A16g32", "awq+gptq"), ("W8A8", "smoothquant"))):
        result = bitwright.quantize(
            bitwright.Recipe(str(model), scheme, method, None, "builtin", 4, 32), out / str(number)
        )
        assert result.linears == 14
        checked = bitwright.verify(out / str(number), model)
        assert checked.passed, [check for check in checked.checks if not check.passed]


def test_the_file_format_at_once(model: Path, tmp_path: Path) -> None:
    result = bitwright.quantize(bitwright.Recipe(str(model), "W4A16g32", "tighter", "lump"), tmp_path / "out.lump")
    assert result.format == "lump" and bitwright.verify(tmp_path / "out.lump", model).passed


def test_they_are_in_the_help_and_in_the_tables(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "byte.cpp" in {engine.name for engine in api.engines()}
    monkeypatch.setattr(sys, "argv", ["bitwright", "quantize", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "tighter: share of a range that is kept. [default: 0.95]" in shown
    assert "tighter: keep a share of each range" in shown
    with pytest.raises(RecipeError, match=r"tightness is 2\.0; it is more than 0 and at most 1"):
        bitwright.plan(bitwright.Recipe(str(model), "W4A16g32", "tighter", tightness=2.0))
    with pytest.raises(RecipeError, match=r"byte\.cpp cannot run scheme W3A16g32.*nearest scheme .* W4A16g32"):
        bitwright.plan(bitwright.Recipe(str(model), "W3A16g32", "tighter", engines="byte.cpp"))
    with pytest.raises(RecipeError, match="format bytes cannot hold outliers"):
        bitwright.plan(bitwright.Recipe(str(model), "W4A16g32", "easyquant", "bytes"))
