"""Written by Bitwright, loaded by plain transformers: the weights are what the formula says, bit for bit."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import Checkpoints
from tests.formats.conftest import LINEARS, Case, Quantized, expected, tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import bitwright

CASES = [
    Case("W2A16g32", bits=2, group=32),
    Case("W2A16sym", "float16", tied=True, format="dense", bits=2, symmetric=True),
    Case("W3A16", "float16", bits=3, quantize_lm_head=True),
    Case("W3A16g64sym", tied=True, bits=3, group=64, symmetric=True, quantize_lm_head=True),
    Case("W4A16g64", tied=True, shards=True, bits=4, group=64),
    Case("W4A16g64", tied=True, format="dense", bits=4, group=64, quantize_lm_head=True),
    Case("W4A16", "float32", bits=4),
    Case("W4A16g32sym", "float32", tied=True, bits=4, group=32, symmetric=True, quantize_lm_head=True),
    Case("W5A16g16", bits=5, group=16),
    Case("W5A16", shards=True, format="dense", bits=5, quantize_lm_head=True),
    Case("W6A16sym", shards=True, bits=6, symmetric=True, quantize_lm_head=True),
    Case("W7A16", "float32", bits=7),
    Case("W7A16g32", "float32", format="dense", bits=7, group=32),
    Case("W8A16", "float16", tied=True, bits=8),
    Case("W8A16g32sym", bits=8, group=32, symmetric=True),
]
UNTOUCHED = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    *(f"model.layers.{n}.{norm}_layernorm.weight" for n in (0, 1) for norm in ("input", "post_attention")),
)
TOKENS = torch.arange(0, 250, 7)[None]


def load(folder: Path, dtype: str) -> PreTrainedModel:
    """As a user does, and one forward pass, when some versions decompress."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    with torch.inference_mode():
        assert model(TOKENS).logits.isfinite().all()
    return model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_bit_for_bit(case: Case, tiny: Checkpoints, quantized: Quantized) -> None:
    original, out = tensors_of(case.model(tiny)), case.run(quantized)
    # A dense folder holds no scales; only the last digit of those in float32 is taken from a file at all.
    packed = tensors_of(replace(case, format="compressed-tensors").run(quantized)) if case.dtype == "float32" else {}
    model = load(out, case.dtype)
    sources = {name: original[f"{name}.weight"] for name in LINEARS}
    if case.quantize_lm_head:
        sources["lm_head"] = original["model.embed_tokens.weight" if case.tied else "lm_head.weight"]
    for name, source in sources.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        assert weight.dtype == source.dtype
        assert torch.equal(weight, expected(source, case, packed.get(f"{name}.weight_scale"))), name
        assert not torch.equal(weight, source), f"{name} was not quantized at all"
    others = UNTOUCHED + (() if case.tied or case.quantize_lm_head else ("lm_head.weight",))
    for name in others:
        assert model.get_parameter(name).dtype == original[name].dtype
        assert torch.equal(model.get_parameter(name), original[name]), name
    weights = {name for name, _ in model.named_parameters() if name.endswith(".weight")}
    assert weights == {*others, *(f"{name}.weight" for name in sources)}
    head, embedding = model.get_submodule("lm_head").weight, model.get_parameter("model.embed_tokens.weight")
    assert (head is embedding) == (case.tied and not case.quantize_lm_head)


def test_what_is_in_no_block_is_copied(tiny: Checkpoints, quantized: Quantized) -> None:
    case = Case("W4A16g64", shards=True)
    original, written = tensors_of(case.model(tiny)), tensors_of(case.run(quantized))
    for name in (*UNTOUCHED, "lm_head.weight"):
        assert torch.equal(written[name], original[name]), name
    rest = {name.rpartition(".")[0] for name in written} - {name.rpartition(".")[0] for name in UNTOUCHED}
    assert rest == {*LINEARS, "lm_head"}


@pytest.mark.parametrize("scheme", ["W4A16", "W4A4"])
def test_biases_are_kept(scheme: str, tiny: Checkpoints, tmp_path: Path) -> None:
    source = tiny(attention_bias=True, mlp_bias=True)
    bitwright.quantize(bitwright.Recipe(str(source), scheme), tmp_path / "out")
    original, model = tensors_of(source), load(tmp_path / "out", "bfloat16")
    for name in LINEARS:
        bias = model.get_submodule(name).bias
        assert isinstance(bias, torch.Tensor)
        assert torch.equal(bias, original[f"{name}.bias"]), name


def test_the_files_of_the_original_go_along(tiny: Checkpoints, quantized: Quantized) -> None:
    case = Case("W4A16g64", tied=True, format="dense", quantize_lm_head=True)
    source, out = case.model(tiny), case.run(quantized)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert before["tie_word_embeddings"]
    assert after == before | {"tie_word_embeddings": False}
    assert AutoTokenizer.from_pretrained(out)("ab").input_ids == AutoTokenizer.from_pretrained(source)("ab").input_ids


def test_a_result_is_split_as_asked(tiny: Checkpoints, quantized: Quantized) -> None:
    whole, split = quantized("W8A16", shards=True), quantized("W8A16", shards=True, shard_size="40KB")
    assert [path.name for path in whole.glob("model*")] == ["model.safetensors"]
    files = sorted(path.name for path in split.glob("model*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, other = load(whole, "bfloat16"), load(split, "bfloat16")
    assert torch.equal(one(TOKENS).logits, other(TOKENS).logits)


WITHOUT_BITWRIGHT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitwright":
            raise ModuleNotFoundError("bitwright is not installed here", name=name)

sys.meta_path.insert(0, Blocked())
try:
    import bitwright
    sys.exit("bitwright could be imported")
except ModuleNotFoundError:
    pass

import hashlib, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.inference_mode():
        written = model.generate(ids, max_new_tokens=12, do_sample=False)
    weights = model.get_submodule("model.layers.1.mlp.down_proj").weight
    digest = hashlib.sha256(weights.detach().float().numpy().tobytes()).hexdigest()
    found[folder] = [written[0].tolist(), tokenizer.decode(written[0]), digest]
assert not [name for name in sys.modules if name.startswith("bitwright")]
print(json.dumps(found))
"""


def test_where_bitwright_is_not_installed(quantized: Quantized) -> None:
    folders = [
        quantized("W2A16g32"),
        quantized("W4A4"),
        quantized("W5A16", shards=True, format="dense", quantize_lm_head=True),
    ]
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_BITWRIGHT, *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    for folder in folders:
        ids, text, digest = found[str(folder)]
        assert text.startswith("Once upon a time")
        assert len(ids) == len("Once upon a time") + 12
        model = load(folder, "bfloat16")
        weight = model.get_submodule("model.layers.1.mlp.down_proj").weight
        assert isinstance(weight, torch.Tensor)
        assert hashlib.sha256(weight.detach().float().numpy().tobytes()).hexdigest() == digest
