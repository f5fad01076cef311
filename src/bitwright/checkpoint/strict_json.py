"""JSON from files nobody has vouched for: one object, each key once, no way to crash the reader."""

import json
from collections import Counter
from typing import Any

from bitwright.core.errors import CheckpointError

SHOWN_CHARACTERS = 100


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `raw` spells in UTF-8; CheckpointError, beginning with `where`, for anything else.

    NaN and Infinity are let through: configs of real models contain them.
    """

    def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise CheckpointError(f"{where}: the key {shown(twice)} appears twice; which one holds cannot be known")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once_each)
    except RecursionError:
        raise CheckpointError(f"{where}: the JSON is nested too deeply to be what it claims to be") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise CheckpointError(f"{where}: not JSON ({error}); the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object was expected, found a {type(value).__name__}")
    return value


def shown(text: object) -> str:
    """`text` as an error message may print it: quoted, control characters escaped, cut to a line."""
    try:
        quoted = repr(text)
    except (ValueError, RecursionError):  # an integer of thousands of digits has no decimal text
        quoted = f"a huge {type(text).__name__}"
    return quoted if len(quoted) <= SHOWN_CHARACTERS else quoted[:SHOWN_CHARACTERS] + "..."
