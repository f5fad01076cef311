"""The options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from bitwright.core.engine import engines

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON (keys: docs/reference/json.md).")]
FORMATS = "compressed-tensors, bitwright, dense, gptq, awq, gguf, mlc."
ENGINES = [engine.name for engine in engines()]
MEASURED_ENGINES = [engine.name for engine in engines() if engine.bench]
Embeddings = Annotated[
    str | None,
    typer.Option(
        help="gguf: embedding and output layer in q8_0, f16, or q4_0, smaller and faster; mlc: f16, with 4 bits. "
        "[default: q8_0; mlc: quantized like the linears]"
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(
        help="gguf: a .gguf file of the same model, whose metadata and tokenizer are taken; mlc: an "
        "mlc-chat-config.json of the same architecture, or its folder, whose conversation is taken."
    ),
]
SHARDS = "Largest weight file; not of gguf and mlc."
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
