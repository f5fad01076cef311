"""The options that several commands take."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON (keys: docs/reference/json.md).")]
BESIDE = ("output", "save_parameters", "workers", "max_memory")
"""Keys of ``quantize`` that are no part of the recipe, because they do not change what the result is."""
FORMATS, ENGINES, MEASURED_ENGINES = "{formats}", "{engines}", "{measured_engines}"
"""Placeholders in help texts for lists that ``Described`` fills in."""
Embeddings = Annotated[
    str | None,
    typer.Option(
        help="How the embedding and the output layer are stored. gguf: q8_0, f16, or q4_0 (smaller and faster); mlc: "
        "f16 (at 4 bits only). [default: gguf: q8_0; mlc: like the linears]"
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(
        help="File to copy settings from. gguf: a .gguf file of the same model, for metadata and tokenizer; mlc: an "
        "mlc-chat-config.json of the same architecture, or its folder, for the conversation template."
    ),
]
Download = Annotated[
    bool,
    typer.Option(
        "--download", help="Fetch the model from the Hugging Face hub if it is named so and is not in the local cache."
    ),
]
SHARDS = "Size limit of a weight file; not for gguf and mlc."
Device = Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda, cuda:1 ...")]


EXAMPLES = {
    "verify": "bitwright verify OUTPUT --against MODEL",
    "export": "bitwright export OUTPUT --format gguf --output OTHER.gguf",
}
"""Examples for the errors of commands that need more than one argument."""
UsageError: Any = typer.BadParameter.__base__
"""What click raises for arguments that it cannot take; newer versions of typer bring a click of their own."""


class Described(TyperCommand):
    """A command whose help lists formats and engines, which are looked up only if this command is called."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; what is said of wrong ones ends with an example."""
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            if example := EXAMPLES.get(str(self.name)):
                begin = f"{error.message.rstrip('.')}. " if error.message else ""
                error.message = f"{begin}For example: {example}"
            raise

    def get_params(self, ctx: Any) -> list[Any]:
        """All options, with the lists in their help texts."""
        params: list[Any] = super().get_params(ctx)
        for option in params:
            help = getattr(option, "help", None) or ""
            if "{" in help:
                option.help = help.format(**_lists())
        return params


def _lists() -> dict[str, str]:
    from bitwright.core.engine import engines
    from bitwright.core.registry import names

    return {
        "formats": ", ".join(names("formats")),
        "engines": ", ".join(engine.name for engine in engines()),
        "measured_engines": " or ".join(engine.name for engine in engines() if engine.bench),
    }
