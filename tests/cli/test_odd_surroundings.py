"""Paths of any bytes, clocks that are wrong, streams that are closed: no command ends in a traceback for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tests.cli.conftest import SCHEME, Run, change_tensors

from bitwright.calibration.texts import read_text
from bitwright.checkpoint import reader
from bitwright.checkpoint.header import Header, read_header
from bitwright.core.errors import CalibrationError, CheckpointError

FORMATS = {
    "gguf": SCHEME,
    "mlc": "mlc:q4f16_1",
    "gptq": SCHEME,
    "compressed-tensors": "W4A16g32sym",
    "bitwright": SCHEME,
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_path_with_a_byte_that_is_no_utf8(run: Run, model: Path, tmp_path: Path, format: str) -> None:
    odd, output = Path(os.fsdecode(bytes(tmp_path) + b"/m\xff")), Path(os.fsdecode(bytes(tmp_path) + b"/out\xff"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    model.rename(odd)
    ran = run("quantize", odd, "--scheme", FORMATS[format], "--format", format, "--method", "rtn", "-o", output)
    assert ran.code == 0, ran.err
    assert run("verify", output, "--no-logits").code == 0
    if format == "bitwright":
        assert run("export", output, "--format", "dense", "-o", tmp_path / "dense").code == 0


def test_a_file_written_to_in_the_year_10_000() -> None:
    header = Header(Path("x"), {}, {}, 0, 0, 253402300800 * 10**9)
    assert reader._time_written(header) == "253402300800 seconds after 1970.000000000"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(closed: str, model: Path) -> None:
    command = f'"{sys.executable}" -m bitwright inspect "{model}" --json {closed}'
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "bug" not in ran.stderr


def test_half_of_a_surrogate_pair_in_the_name_of_a_tensor(model: Path) -> None:
    path = model / "model.safetensors"
    change_tensors(model, lambda tensors: tensors.update(xxxxxx=tensors["model.norm.weight"].clone()))
    path.write_bytes(path.read_bytes().replace(b'"xxxxxx"', b'"\\ud800"'))
    with pytest.raises(CheckpointError, match=r"its name has half of a surrogate pair"):
        read_header(path)


def test_parquet_whose_text_is_no_utf8(tmp_path: Path) -> None:
    raw = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary()).buffers()
    column = pyarrow.StringArray.from_buffers(2, raw[1], raw[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "t.parquet")
    with pytest.raises(CalibrationError, match=r"t\.parquet, row 1 .* is not UTF-8 text"):
        read_text(str(tmp_path / "t.parquet"))


@pytest.mark.parametrize("key", ["eos_token", "chat_template", "added_tokens_decoder", "model_max_length"])
@pytest.mark.parametrize("format", ["gguf", "mlc", "gptq"])
def test_settings_of_a_tokenizer_of_a_wrong_type(run: Run, model: Path, tmp_path: Path, key: str, format: str) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: True}))
    ran = run(
        "quantize", model, "--scheme", FORMATS[format], "--format", format, "--method", "rtn", "-o", tmp_path / "o"
    )
    assert ran.code == 2 and f"{path}: {key} is True, and " in ran.error


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("post_processor",), 3),
        (("post_processor",), {"type": "TemplateProcessing", "single": 3}),
        (("added_tokens",), {"x": 1}),
        (("added_tokens",), [{"id": 1}]),
        (("model", "vocab"), 3),
        (("model", "vocab"), {"\ud800": 1}),
        (("model", "merges"), [3]),
        (("model", "merges"), [["a"]]),
        (("decoder",), [3]),
        (("normalizer",), "x"),
    ],
)
@pytest.mark.parametrize("format", ["gguf", "mlc"])
def test_a_tokenizer_of_wrong_types(
    run: Run, model: Path, tmp_path: Path, keys: tuple[str, ...], value: object, format: str
) -> None:
    path = model / "tokenizer.json"
    content = place = json.loads(path.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    ran = run(
        "quantize", model, "--scheme", FORMATS[format], "--format", format, "--method", "rtn", "-o", tmp_path / "o"
    )
    assert ran.code == 2 and f"{path}: {'.'.join(keys)}" in ran.error
