"""The options that several commands take."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON (keys: docs/reference/json.md).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
