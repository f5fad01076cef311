"""Results as JSON may hold them."""

from math import isfinite
from typing import Any


def plain(value: Any) -> Any:
    """Dicts, lists and numbers with null in the place of NaN and infinity, which JSON has no word for.

    >>> plain({"perplexity": float("inf"), "windows": (1, 2.5)})
    {'perplexity': None, 'windows': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
