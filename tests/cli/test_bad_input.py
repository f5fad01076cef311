"""What bad input to ``quantize`` gets: one clear error before any long work, exit code 2, nothing written."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tests.cli.conftest import SCHEME, TOKENS, Run, change_config, change_tensors, tree
from tests.conftest import Checkpoints

from bitwright.checkpoint import output, reader

Refused = Callable[..., str]
WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def shard(tiny: Checkpoints, model: Path) -> Path:
    """Makes a model folder one of several shards; the second of them."""
    shutil.rmtree(model)
    shutil.copytree(tiny(shards=True), model)
    return next(model.glob("model-00002-of-*.safetensors"))


def change_header(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites the header of model.safetensors alone, its data staying where it was."""
    raw = (model / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (model / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.fixture
def quantize(refused: Refused, model: Path, tmp_path: Path) -> Refused:
    """``quantize(flag, value, ..., scheme=SCHEME)``: the message with which quantizing the model is refused."""

    def call(*flags: object, scheme: str = SCHEME) -> str:
        return refused("quantize", model, "--scheme", scheme, "--output", tmp_path / "out", *flags)

    return call


class TestFolder:
    def test_there_is_none(self, refused: Refused, tmp_path: Path) -> None:
        missing = tmp_path / "nothing"
        message = refused("quantize", missing, "--scheme", SCHEME, "-o", tmp_path / "out")
        assert message.startswith(f"{missing}: there is no such folder")

    def test_a_name_of_the_hub(self, refused: Refused, tmp_path: Path) -> None:
        message = refused("quantize", "meta-llama/Llama-3.2-1B", "--scheme", SCHEME, "-o", tmp_path / "out")
        assert "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B" in message

    def test_a_file(self, refused: Refused, text: Path, tmp_path: Path) -> None:
        assert "a file, no model folder" in refused("quantize", text, "--scheme", SCHEME, "-o", tmp_path / "out")

    @pytest.mark.parametrize("command", ["quantize", "export", "inspect", "evaluate", "bench"])
    def test_what_was_written_for_an_engine(self, refused: Refused, tmp_path: Path, command: str) -> None:
        how = {"quantize": ("--scheme", SCHEME), "export": ("--format", "gptq")}.get(command, ())
        out = ("-o", tmp_path / "out") if how else ()
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        (tmp_path / "mlc").mkdir()
        (tmp_path / "mlc" / "mlc-chat-config.json").write_text("{}")
        for name, what in (("m.gguf", "a .gguf file"), ("mlc", "a folder of MLC-LLM")):
            if (command, name) != ("bench", "m.gguf"):
                message = refused(command, tmp_path / name, *how, *out)
                assert f"{tmp_path / name}: is {what}, which Bitwright writes and verifies, but" in message
                assert "name the folder that it was made of" in message

    def test_links_in_a_circle(self, refused: Refused, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(link)
        assert str(link) in refused("quantize", link, "--scheme", SCHEME, "-o", tmp_path / "out")

    def test_no_config(self, quantize: Refused, model: Path) -> None:
        (model / "config.json").unlink()
        assert f"{model}: is no model folder: it has no config.json" in quantize()

    def test_no_weights(self, quantize: Refused, model: Path) -> None:
        (model / WEIGHTS).unlink()
        assert "no *.safetensors" in quantize()

    def test_pickled_weights_are_told_how_to_convert(self, quantize: Refused, model: Path) -> None:
        (model / WEIGHTS).rename(model / "pytorch_model.bin")
        message = quantize()
        assert "pytorch_model.bin" in message
        assert f"from_pretrained({str(model)!r}, use_safetensors=False)" in message
        assert "save_pretrained(" in message

    def test_quantized_already(self, quantize: Refused, model: Path) -> None:
        change_config(model, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        message = quantize()
        assert "quantized already (bitsandbytes)" in message and "full-precision" in message

    def test_quantized_only_by_its_own_account(self, quantize: Refused, model: Path) -> None:
        change_config(model, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
        assert "quantized already (gptq), and no weight is" in quantize()

    def test_our_own_result(self, run: Run, model: Path, tmp_path: Path) -> None:
        """It is read, and the summary says what that costs."""
        assert run("quantize", model, "--scheme", SCHEME, "-o", tmp_path / "once").code == 0
        ran = run("quantize", tmp_path / "once", "--scheme", SCHEME, "-o", tmp_path / "twice")
        assert ran.code == 0 and "quantized already (compressed-tensors pack-quantized, 4 bits)" in ran.out
        assert "lose twice" in " ".join(ran.out.split())

    def test_a_quantization_config_of_null_is_none(self, run: Run, model: Path, tmp_path: Path) -> None:
        change_config(model, quantization_config=None)
        assert run("quantize", model, "--scheme", SCHEME, "-o", tmp_path / "out").code == 0


class TestWeightFiles:
    def test_missing_shard(self, quantize: Refused, tiny: Checkpoints, model: Path) -> None:
        gone = shard(tiny, model)
        gone.unlink()
        assert gone.name in quantize()

    def test_truncated_folder_in_verify(self, tiny: Checkpoints, tmp_path: Path, run: Run) -> None:
        assert (
            run("quantize", str(tiny()), "--scheme", SCHEME, "--method", "rtn", "-o", str(tmp_path / "out")).code == 0
        )
        weights = tmp_path / "out" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        ran = run("verify", str(tmp_path / "out"), "--json")
        assert (ran.code, ran.out) == (2, "") and f"{weights}: truncated" in ran.error

    def test_truncated_shard(self, quantize: Refused, tiny: Checkpoints, model: Path) -> None:
        cut = shard(tiny, model)
        raw = cut.read_bytes()
        cut.write_bytes(raw[:-7])
        message = quantize()
        assert f"{cut}: truncated" in message
        assert str(len(raw)) in message and str(len(raw) - 7) in message

    @pytest.mark.parametrize("raw", [b"", b"\x10\0\0\0\0\0\0\0{", b"\xff" * 8 + b"{}"], ids=["empty", "cut", "absurd"])
    def test_no_header(self, quantize: Refused, model: Path, raw: bytes) -> None:
        (model / WEIGHTS).write_bytes(raw)
        assert str(model / WEIGHTS) in quantize()

    @pytest.mark.parametrize(
        "claim",
        [
            {"data_offsets": [0, 10**12]},
            {"data_offsets": [-32768, 0]},
            {"data_offsets": [32768, 0]},
            {"data_offsets": [64, 32832]},
            {"dtype": "F32"},
            {"dtype": "F33"},
            {"shape": [256, 65]},
            {"shape": [-256, -64]},
        ],
        ids=["past the end", "negative", "reversed", "overlapping", "dtype size", "unknown dtype", "size", "shape"],
    )
    def test_header_that_lies(self, quantize: Refused, model: Path, claim: dict[str, Any]) -> None:
        change_header(model, lambda header: header["lm_head.weight"].update(claim))
        message = quantize()
        assert str(model / WEIGHTS) in message and "'lm_head.weight'" in message

    @pytest.mark.parametrize(("value", "count"), [("nan", "1 NaN"), ("-inf", "1 infinite")])
    def test_weights_that_are_no_numbers(self, quantize: Refused, model: Path, value: str, count: str) -> None:
        """With text hours follow, and they are found before."""
        change_tensors(model, lambda tensors: tensors[UP][3].__setitem__(5, float(value)))
        message = quantize("--method", "gptq", "--calibration", "builtin", "--seqlen", 32, "--samples", 2)
        assert f"'{UP}'" in message and count in message

    @pytest.mark.parametrize("name", [UP, "model.norm.weight"])
    def test_they_are_found_when_they_are_read(self, run: Run, model: Path, tmp_path: Path, name: str) -> None:
        change_tensors(model, lambda tensors: tensors[name].view(-1).__setitem__(5, float("nan")))
        ran = run("quantize", model, "--scheme", SCHEME, "--method", "easyquant", "-o", tmp_path / "out")
        assert ran.code == 2 and f"'{name}'" in ran.error and "1 NaN" in ran.error
        assert not (tmp_path / "out").exists()

    def test_missing_tensor(self, quantize: Refused, model: Path) -> None:
        change_tensors(model, lambda tensors: tensors.pop(UP))
        assert f"no tensor '{UP}'" in quantize()

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn], ids=str)
    def test_dtype_that_is_not_quantized(self, quantize: Refused, model: Path, dtype: torch.dtype) -> None:
        change_tensors(model, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
        message = quantize()
        assert UP in message and str(dtype).removeprefix("torch.") in message and "bfloat16" in message

    def test_no_floating_weights_at_all(self, quantize: Refused, model: Path) -> None:
        change_tensors(model, lambda t: t.update({name: value.to(torch.int8) for name, value in t.items()}))
        assert "quantized already" in quantize()


class TestConfig:
    @pytest.mark.parametrize(
        "raw", [b"{", b"[]", b"\xff\xfe", b"", b"[" * 10**5], ids=["cut", "list", "bytes", "", "deep"]
    )
    def test_broken(self, quantize: Refused, model: Path, raw: bytes) -> None:
        (model / "config.json").write_bytes(raw)
        assert str(model / "config.json") in quantize()

    def test_unknown_architecture(self, quantize: Refused, model: Path) -> None:
        """With text; without, any architecture will do."""
        change_config(model, model_type="lama")
        message = quantize("--method", "gptq", "--calibration", "builtin")
        assert "has no architecture 'lama'" in message
        assert "did you mean llama?" in message

    @pytest.mark.parametrize("found", [..., None, "", 3, ["llama"]])
    def test_no_architecture(self, quantize: Refused, model: Path, found: Any) -> None:
        change_config(model, model_type=found)
        assert "does not say which architecture" in quantize()

    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_size": 128},
            {"hidden_size": -64},
            {"hidden_size": "64"},
            {"hidden_size": 10**12},
            {"intermediate_size": 1},
            {"vocab_size": 255},
            {"num_attention_heads": 0},
            {"num_attention_heads": 3},
            {"num_key_value_heads": 0},
            {"num_key_value_heads": 1},
            {"head_dim": 0},
            {"num_hidden_layers": 3},
            {"num_hidden_layers": 0},
            {"num_hidden_layers": -1},
            {"num_hidden_layers": 10**9},
            {"hidden_act": "nonsense"},
            {"rope_parameters": 5},
            {"pad_token_id": 10**6},
            {"attention_bias": True},
            {"text_config": {}},
            {"dtype": "float99"},
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore")
    def test_values_that_cannot_be(self, quantize: Refused, model: Path, changes: dict[str, Any]) -> None:
        change_config(model, **changes)
        assert str(model) in quantize()

    @pytest.mark.parametrize("named", [..., None, [], {}, 5, "LlamaForCausalLM"], ids=str)
    def test_a_class_that_is_not_named_is_not_needed(self, run: Run, model: Path, tmp_path: Path, named: Any) -> None:
        change_config(model, architectures=named)
        ran = run("quantize", model, "--scheme", SCHEME, "-o", tmp_path / "out", "--dry-run", "--json")
        assert ran.json["architecture"] == "?"
        assert run("inspect", model, "--json").json["architecture"] == "?"

    @pytest.mark.parametrize("longest", [0, -1])
    def test_no_maximum_length(self, run: Run, model: Path, text: Path, tmp_path: Path, longest: int) -> None:
        change_config(model, max_position_embeddings=longest)
        flags = ("--calibration", text, "--samples", 1, "--dry-run", "--json")
        ran = run("quantize", model, "--scheme", SCHEME, "-o", tmp_path / "out", *flags)
        assert ran.json["calibration_tokens"] == 2048


class TestTokenizer:
    def test_missing(self, quantize: Refused, model: Path) -> None:
        (model / "tokenizer.json").unlink()
        message = quantize()
        assert f"{model} has no tokenizer" in message and "Copy the tokenizer's files" in message

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe"], ids=["empty", "cut", "list", "bytes"])
    def test_broken(self, quantize: Refused, model: Path, name: str, raw: bytes) -> None:
        (model / name).write_bytes(raw)
        assert str(model / name) in quantize()

    def test_of_another_kind(self, quantize: Refused, model: Path) -> None:
        (model / "tokenizer.json").write_text("{}")
        assert "no key 'model'" in quantize()

    def test_that_transformers_cannot_read(self, quantize: Refused, model: Path, text: Path) -> None:
        (model / "tokenizer.json").write_text('{"model": {}}')
        assert f"the tokenizer in {model} cannot be read" in quantize("--calibration", text)

    def test_of_another_model(self, quantize: Refused, model: Path, text: Path) -> None:
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {letter: 256 + row for letter, row in vocabulary.items()}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        message = quantize("--calibration", text, "--samples", 1)
        assert "256 rows" in message and "another model" in message


class TestFlags:
    @pytest.mark.parametrize(
        ("scheme", "says"),
        [
            ("W1A16", "weights of 1 bits: weights take 2 to 8 bits"),
            ("W9A16", "weights of 9 bits: weights take 2 to 8 bits"),
            ("W4A12", "activations of 12 bits"),
            ("W4A16KV9", "a KV cache of 9 bits"),
            ("W4A16g1", "groups of 1"),
            ("W4A16g0", "groups of 0"),
            ("4bit", "'4bit' is no scheme"),
            ("", "'' is no scheme"),
        ],
    )
    def test_scheme(self, quantize: Refused, scheme: str, says: str) -> None:
        message = quantize(scheme=scheme)
        assert says in message and "W4A16g128" in message

    def test_group_that_does_not_divide(self, quantize: Refused, text: Path) -> None:
        message = quantize("--calibration", text, "--samples", 10**6, scheme="W4A16g48")
        assert "model.layers.0.self_attn.q_proj" in message
        assert "64 input features do not divide into groups of 48" in message
        assert "what divides them: 32, 64, 16" in message

    @pytest.mark.parametrize(
        ("flag", "value", "says"),
        [
            ("--method", "rtm", "no method 'rtm'; did you mean rtn? Known: "),
            ("--method", "", "no method ''"),
            ("--method", "rtn+rtn", "both decide"),
            ("--format", "dence", "no format 'dence'; did you mean dense? Known: "),
            ("--format", "", "no format ''"),
            ("--device", "cudaa", "no device 'cudaa'; did you mean cuda? Known: auto, cpu"),
            ("--device", "", "no device ''"),
            ("--device", "meta", "device 'meta' cannot be used here"),
            ("--shard-size", "5XB", "'5XB' is no size; write a number and a unit: 500MB, 5GB"),
            ("--shard-size", "0GB", "'0GB' is no size"),
            ("--shard-size", "-1GB", "'-1GB' is no size"),
            ("--samples", 0, "samples is 0; it must be at least 1"),
            ("--samples", -1, "samples is -1"),
            ("--seqlen", 0, "seqlen is 0; it must be at least 1"),
            ("--seqlen", 129, "longer than the model's own maximum of 128 tokens"),
            ("--seed", -1, "seed is -1; it must be at least 0"),
        ],
    )
    def test_value(self, quantize: Refused, flag: str, value: object, says: str) -> None:
        assert says in quantize(flag, value)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self, quantize: Refused) -> None:
        assert "device 'cuda' cannot be used here" in quantize("--device", "cuda")

    def test_activations_in_a_format_without_them(self, quantize: Refused) -> None:
        message = quantize("--format", "dense", scheme="W4A4")
        assert "dense" in message and "compressed-tensors" in message

    def test_groups_along_the_output_in_a_format_without_them(self, quantize: Refused, text: Path) -> None:
        message = quantize("--format", "compressed-tensors", "--calibration", text, scheme="W3A16g16ic")
        assert "format compressed-tensors cannot hold groups along the output, which scheme W3A16g16ic" in message
        assert all(way in message for way in ("Leave --format out", "--format bitwright", "--format dense"))

    def test_groups_along_the_output_that_do_not_divide(self, quantize: Refused) -> None:
        message = quantize(scheme="W3A16g48ic")
        assert "model.layers.0.self_attn.q_proj [64, 64] under scheme W3A16g48ic" in message
        assert "64 output features do not divide into groups of 48; what divides them: 32, 64, 16" in message

    def test_groups_along_the_output_without_a_size(self, quantize: Refused) -> None:
        assert "The nearest valid scheme is W3A16g128ic." in quantize(scheme="W3A16ic")


class TestText:
    def test_too_short(self, quantize: Refused, text: Path) -> None:
        message = quantize("--calibration", text)
        assert f"128 segments of 128 tokens need {128 * 128} tokens, but '{text}' has {TOKENS}" in message
        assert f"--samples {TOKENS // 128}" in message

    def test_more_samples_than_can_be_counted(self, quantize: Refused, text: Path) -> None:
        assert f"has {TOKENS}" in quantize("--calibration", text, "--samples", 10**30)

    def test_seed_that_no_generator_takes(self, quantize: Refused, text: Path) -> None:
        assert str(2**64) in quantize("--calibration", text, "--samples", 1, "--seed", 2**64)

    @pytest.mark.parametrize(
        ("name", "raw", "says"),
        [
            ("empty.txt", b"", "holds no text"),
            ("blank.txt", b" \n\t ", "holds no text"),
            ("latin.txt", "é".encode("latin-1") * 999, "not UTF-8 text"),
            ("wide.txt", "text".encode("utf-16"), "not UTF-8 text"),
            ("a.jsonl", b'{"txt": "x"}', "found: the fields are txt; name one with --text-field"),
            ("b.jsonl", b'{"text": 5}', "line 1 has no text in the field 'text'; found: 'text' is of type int"),
            ("c.jsonl", b'{"text": "x"}\n{', "line 2 is not JSON"),
            ("d.jsonl", b"[" * 10**5, "line 1 is not JSON"),
            ("e.jsonl", b'{"text": "\\ud800"}', "line 1 has half of a surrogate pair"),
            ("f.parquet", b"PAR1", "f.parquet"),
        ],
    )
    def test_file(self, quantize: Refused, tmp_path: Path, name: str, raw: bytes, says: str) -> None:
        (tmp_path / name).write_bytes(raw)
        message = quantize("--calibration", tmp_path / name, "--samples", 1)
        assert name in message and says in message

    @pytest.mark.parametrize(
        ("named", "says"),
        [
            ("", "calibration is empty"),
            ("builtn", "did you mean builtin?"),
            ("./nothing.txt", "there is no text file or folder"),
            ("The quick brown fox. " * 99, "File name too long"),
        ],
        ids=["nothing", "misspelled", "missing", "the text itself"],
    )
    def test_name(self, quantize: Refused, named: str, says: str) -> None:
        assert says in quantize("--calibration", named)

    def test_folder_without_text(self, quantize: Refused, tmp_path: Path) -> None:
        (tmp_path / "none").mkdir()
        assert "holds no text" in quantize("--calibration", tmp_path / "none")


class TestOutput:
    def test_none(self, refused: Refused, model: Path) -> None:
        assert "--output" in refused("quantize", model, "--scheme", SCHEME)

    def test_exists(self, quantize: Refused, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("kept")
        message = quantize()
        assert f"{tmp_path / 'out'}: exists and is kept as it is" in message and "--overwrite" in message

    def test_a_file(self, quantize: Refused, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        assert "is a file" in quantize("--overwrite")

    def test_under_a_file(self, quantize: Refused, text: Path) -> None:
        assert f"{text} is a file" in quantize("-o", text / "out")

    @pytest.mark.parametrize("place", ["small", "deep/er", "link/small"])
    def test_in_the_model(self, quantize: Refused, model: Path, place: str) -> None:
        (model.parent / "link").symlink_to(model)
        place = place.replace("link", "../link")
        assert f"lies in {model}, which is read" in quantize("-o", model / place, "--overwrite")

    @pytest.mark.parametrize("place", [".", "..", "../model", "sub/..", "link"])
    def test_the_model_or_around_it(self, quantize: Refused, model: Path, place: str) -> None:
        (model / "sub").mkdir()
        (model / "link").symlink_to(model)
        assert "the model that is read" in quantize("-o", model / place, "--overwrite")

    def test_the_root(self, quantize: Refused) -> None:
        assert "/: cannot be written" in quantize("-o", "/", "--overwrite")

    def test_the_folder_one_is_in(self, quantize: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        assert "--overwrite would remove" in quantize("-o", ".", "--overwrite")

    def test_links_in_a_circle(self, quantize: Refused, tmp_path: Path) -> None:
        (tmp_path / "out").symlink_to(tmp_path / "out")
        assert str(tmp_path / "out") in quantize()

    @pytest.mark.parametrize("length", [250, 300], ids=["with .partial", "itself"])
    def test_name_too_long(self, quantize: Refused, tmp_path: Path, length: int) -> None:
        assert "cannot be written" in quantize("-o", tmp_path / ("x" * length))

    def test_folder_of_another_program_where_the_work_is_done(self, quantize: Refused, tmp_path: Path) -> None:
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "mine").write_text("kept")
        assert f"{tmp_path / 'out.partial'}: is in the way" in quantize()

    def test_another_run(self, quantize: Refused, tmp_path: Path) -> None:
        (tmp_path / "out.partial").mkdir()
        with FileLock(tmp_path / "out.partial" / ".lock"):
            assert "another run is working on it" in quantize()

    def test_no_permission(self, quantize: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        allowed = os.access  # root may do everything, so that folder's mode alone would prove nothing
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and allowed(path, mode))
        assert f"{tmp_path} may not be written to" in quantize()

    def test_no_room(self, quantize: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(output, "free_bytes", lambda _: 1000)
        monkeypatch.setattr(reader.Checkpoint, "check_finite", lambda *_: pytest.fail("weights were read first"))
        message = quantize()
        assert "1000 are free" in message and "make room" in message


def test_an_existing_output_survives_a_failure(run: Run, model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "out"
    assert run("quantize", model, "--scheme", SCHEME, "-o", kept).code == 0
    before = tree(kept)
    change_tensors(model, lambda tensors: tensors[UP].fill_(float("nan")))
    assert run("quantize", model, "--scheme", "W3A16", "-o", kept, "--overwrite").code == 2
    assert tree(kept) == before
