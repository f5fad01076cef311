"""The consoles of a command: results go to standard output, everything else to error."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console

from bitwright.core.small_files import plain


class _Console(Console):
    """A console that leaves a closed pipe to ``entry.py``."""

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError again."""
        raise


WIDE = 1000  # characters; so wide that no path is broken into lines in a pipe or a file
out, err = _Console(width=None if Console().is_terminal else WIDE), Console(stderr=True)


def show(result: Any, screen: Callable[[Console, Any], None], as_json: bool) -> None:
    """Print a result as JSON, or with the function that shows it."""
    if as_json:
        print(
            json.dumps(plain(asdict(result)), indent=2)
        )  # ASCII, which can be printed anywhere, whatever bytes a path has
    else:
        screen(out, result)
