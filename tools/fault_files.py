"""The types of files that Bitwright reads from a stranger: a valid one of each, and the calls that read it.

``faults.py`` changes the valid file and makes the calls, which may refuse it, and nothing else.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from compare_cases import make_models
from fault_changes import Change, byte_changes, changed_bytes, changed_document, document_changes

MODEL, SCHEME = "small", "W4A16g32"
GROUP: dict[str, Any] = {"samples": 2, "seqlen": 32}
FORMATS = {
    "compressed-tensors": "W4A16g32sym", "bitwright": "W3A16g32", "gptq": "W4A16g32", "awq": "W4A16g32",
}  # fmt: skip
"""The formats with a quantization_config of their own, each with a scheme."""
Read = Callable[[Path], object]
"""A call that reads the changed file; it gets the folder of the case."""


@dataclass(frozen=True)
class Kind:
    """A type of file.

    ``source`` is what is copied for each case, ``file`` the one in it that changes. ``document`` is its content as
    plain data, None for a file of bytes alone; ``written`` turns it into bytes. ``first`` is the length of what is
    worth changing in bytes. ``reads`` are the calls.
    """

    name: str
    source: Path
    file: str
    reads: tuple[Read, ...]
    document: Any = None
    written: Callable[[Any], bytes] = lambda value: json.dumps(value).encode()
    first: int | None = None

    @property
    def raw(self) -> bytes:
        """The bytes of the valid file."""
        return (self.source / self.file).read_bytes()

    def changes(self) -> st.SearchStrategy[list[Change]]:
        """Draw changes of the file: mostly of the document, if it is one."""
        in_bytes = byte_changes(len(self.raw), self.first)
        if self.document is None:
            return in_bytes
        in_document = document_changes(self.document)
        return st.integers(0, 5).flatmap(lambda n: in_bytes if n == 0 else in_document)

    def place(self, folder: Path, changes: list[Change]) -> None:
        """Copy the source to a folder, with the file changed; the other files are linked."""
        shutil.copytree(self.source, folder, copy_function=os.link)
        raw = self.raw
        if self.document is not None and not any({"at", "cut", "insert"} & change.keys() for change in changes):
            raw = self.written(changed_document(self.document, changes))
        (folder / self.file).unlink()
        (folder / self.file).write_bytes(changed_bytes(raw, changes))


def kinds(work: Path) -> tuple[Kind, ...]:
    """Every type of file; the valid files are made in ``work`` if they are not there."""
    _make_valid_files(work)
    model, gguf, mlc, beside = work / MODEL, work / "gguf", work / "mlc", work / "beside"
    open_model = (_inspect, _plan, partial(_plan, format="gguf"))
    tokenizer = (
        partial(_quantize, format="gguf"),
        partial(_quantize, format="mlc", scheme="mlc:q4f16_1"),
        partial(_plan, method="gptq", calibration="builtin", samples=2, seqlen=32),
    )
    quantized = (_inspect, _verify, _export)
    index = "model.safetensors.index.json"
    shard = next(iter(sorted(path.name for path in model.glob("*.safetensors"))))
    in_formats = [
        Kind(
            f"quantization_config of {name}", work / name, "config.json", quantized, _json(work / name / "config.json")
        )
        for name in FORMATS
    ]
    header = json.loads((model / shard).read_bytes()[8:][: _header_bytes(model / shard)])
    return (
        Kind("config.json", model, "config.json", (*open_model, *tokenizer[2:]), _json(model / "config.json")),
        Kind("index of shards", model, index, open_model, _json(model / index)),
        Kind("header of safetensors", model, shard, open_model, header, partial(_safetensors, model / shard),
             _header_bytes(model / shard)),
        Kind("tokenizer.json", model, "tokenizer.json", tokenizer, _json(model / "tokenizer.json")),
        Kind("tokenizer.json with bytes", work / "pieces", "tokenizer.json", tokenizer[:2],
             _json(work / "pieces" / "tokenizer.json")),
        Kind("tokenizer_config.json", model, "tokenizer_config.json", tokenizer,
             _json(model / "tokenizer_config.json")),
        Kind("generation_config.json", model, "generation_config.json", tokenizer[1:2],
             _json(model / "generation_config.json")),
        *in_formats,
        Kind("bitwright.json", work / "bitwright", "bitwright.json", quantized,
             _json(work / "bitwright/bitwright.json")),
        Kind("allocation.json", beside, "allocation.json", (partial(_with, model, "allocation", "allocation.json"),),
             _json(beside / "allocation.json")),
        Kind("recipe", beside, "recipe.yaml", (_recipe,), _json(beside / "recipe.yaml")),
        Kind("learned parameters", beside, "learned.safetensors",
             (partial(_with, model, "load_parameters", "learned.safetensors", scheme="W4A16g32", method="lwc",
                      calibration="builtin", epochs=1, samples=2, seqlen=32),), first=3000),
        Kind("GGUF", gguf, "model.gguf", (_verify_gguf,), first=6000),
        Kind("MLC's index", mlc, "tensor-cache.json", (_verify,), _json(mlc / "tensor-cache.json")),
        Kind("MLC's config", mlc, "mlc-chat-config.json", (_verify, partial(_based, model)),
             _json(mlc / "mlc-chat-config.json")),
        Kind("text", beside, "text.txt", (partial(_text, "text.txt"),)),
        Kind("lines of JSON", beside, "text.jsonl", (partial(_text, "text.jsonl"),),
             [json.loads(line) for line in (beside / "text.jsonl").read_text().splitlines()], _lines),
        Kind("Parquet", beside, "text.parquet", (partial(_text, "text.parquet"),)),
    )  # fmt: skip


def _inspect(folder: Path) -> None:
    import bitwright

    bitwright.inspect(folder)


def _plan(folder: Path, **how: Any) -> None:
    import bitwright

    bitwright.plan(bitwright.Recipe(folder, **({"scheme": SCHEME, "method": "rtn"} | how)))


def _quantize(folder: Path, **how: Any) -> None:
    import bitwright

    recipe = bitwright.Recipe(folder, **({"scheme": SCHEME, "method": "rtn"} | how))
    bitwright.quantize(recipe, folder.parent / "out", workers=1)


def _with(model: Path, key: str, file: str, folder: Path, **how: Any) -> None:
    _plan(model, **(how | {key: folder / file}))


def _verify(folder: Path) -> None:
    import bitwright

    bitwright.verify(folder, logits=False)


def _verify_gguf(folder: Path) -> None:
    _verify(folder / "model.gguf")


def _export(folder: Path) -> None:
    import bitwright

    bitwright.export(folder, folder.parent / "out", format="dense")


def _based(model: Path, folder: Path) -> None:
    _plan(model, format="mlc", scheme="mlc:q4f16_1", base=folder)


def _recipe(folder: Path) -> None:
    from bitwright.cli.recipe_file import read_recipe
    from bitwright.core.recipe import Recipe

    asked = read_recipe(folder / "recipe.yaml")
    Recipe.from_mapping({key: value for key, value in asked.items() if key != "output"})


def _text(file: str, folder: Path) -> None:
    from bitwright.calibration.texts import text_of

    text_of(str(folder / file), "calibration").encode("utf-8")


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _lines(value: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in value).encode()


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return int(struct.unpack("<Q", file.read(8))[0])


def _safetensors(path: Path, header: Any) -> bytes:
    """A safetensors file with another header before the same data."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + path.read_bytes()[8 + _header_bytes(path) :]


def _make_valid_files(work: Path) -> None:
    """Make a small random model, its quantized folders and files, and texts."""
    import bitwright

    work.mkdir(parents=True, exist_ok=True)
    list(make_models(work, [MODEL]))
    for output, how in _outputs(work):
        if not output.exists():
            output.parent.mkdir(exist_ok=True)
            saved = work / "beside" / "learned.safetensors" if output.name == "lwc" else None
            recipe = bitwright.Recipe(work / MODEL, **how)
            bitwright.quantize(recipe, output, save_parameters=saved)
    _save_beside(work)


def _outputs(work: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    (work / "beside").mkdir(exist_ok=True)
    for format, scheme in FORMATS.items():
        yield work / format, {"scheme": scheme, "method": "rtn", "format": format}
    yield work / "gguf" / "model.gguf", {"scheme": SCHEME, "method": "rtn", "format": "gguf"}
    yield work / "mlc", {"scheme": "mlc:q4f16_1", "method": "rtn", "format": "mlc"}
    yield work / "lwc", {"scheme": SCHEME, "method": "lwc", "calibration": "builtin", "epochs": 1, **GROUP}


def _save_beside(work: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    beside, rows = work / "beside", [{"text": f"row {n}, with some words", "n": n} for n in range(20)]
    shutil.copy(work / "bitwright" / "allocation.json", beside)
    recipe = {"model": "m", "scheme": SCHEME, "method": "gptq", "calibration": "builtin", "samples": 4, "seqlen": 64,
              "seed": 1, "shard_size": "1GB", "exclude": ["*.down_proj"], "scheme_for": {"*.up_proj": "W8A16g32"},
              "damping": 0.01, "act_order": True, "engines": "vllm", "output": "out"}  # fmt: skip
    (beside / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML too
    (beside / "text.txt").write_text("Some words, é and ü.\n" * 20, encoding="utf-8")
    (beside / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), beside / "text.parquet")
    if not (work / "pieces").exists():
        _save_pieces(work)


def _save_pieces(work: Path) -> None:
    """The model with the tokenizer of a BPE that falls back to bytes."""
    shutil.copytree(work / MODEL, work / "pieces.new", dirs_exist_ok=True)
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", *(f"<0x{n:02X}>" for n in range(200))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": n, "content": tokens[n], "special": True} for n in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>",
                  "vocab": {token: n for n, token in enumerate(tokens)}, "merges": [["a", "b"]]},
    }  # fmt: skip
    (work / "pieces.new" / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": {"1": {"content": "<s>"}}}
    (work / "pieces.new" / "tokenizer_config.json").write_text(json.dumps(settings))
    (work / "pieces.new").rename(work / "pieces")
