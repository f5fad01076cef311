"""The shapes of JSON values: what fits passes, and what does not is named with the keys that lead to it."""

from typing import Any

import pytest

from bitwright.core.errors import CheckpointError
from bitwright.core.json_shape import FLAG, NUMBER, TEXT, WHOLE, Either, Items, Keys, require_shape

SHAPE = Keys(
    {
        "name": TEXT,
        "count": WHOLE,
        "share": NUMBER,
        "on": FLAG,
        "pairs": Items(Items(TEXT, 2)),
        "either": Either((TEXT, Keys({"content": TEXT}, needs=("content",)))),
        "by_name": Keys(others=WHOLE),
    }
)


@pytest.mark.parametrize(
    "value",
    [
        {"name": "x", "count": 0, "share": 1.5, "on": False, "pairs": [["a", "b"]], "either": "x", "by_name": {"é": 1}},
        {"name": None, "either": {"content": "x"}, "unknown": {"key": 3}},
        {},
    ],
)
def test_what_fits(value: Any) -> None:
    require_shape(value, SHAPE, "file", "mend it")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"file is \[\], and an object was expected; mend it"),
        ({"name": 3}, "file: name is 3, and a text was expected; mend it"),
        ({"name": "\ud800"}, "file: name is '.ud800', and a text was expected"),
        ({"count": True}, "count is True, and a whole number, 0 or more was expected"),
        ({"count": -1}, "count is -1"),
        ({"count": 2**64}, "count is 18446744073709551616"),
        ({"share": float("nan")}, "share is nan, and a number was expected"),
        ({"pairs": [["a", "b"], ["c"]]}, r"pairs\[1\] is \['c'\], and a list of 2 values was expected"),
        ({"pairs": [None]}, r"pairs\[0\] is None"),
        ({"either": 3}, "either is 3, and a text or an object was expected"),
        ({"either": {}}, "either has no key 'content'"),
        ({"by_name": {"\udc80": 1}}, "by_name has the key '.udc80', which is no text"),
    ],
)
def test_what_does_not(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        require_shape(value, SHAPE, "file", "mend it")


def test_no_recursion_error() -> None:
    keys: dict[str, Any] = {}
    endless = Keys(keys)
    keys["next"] = endless
    value: dict[str, Any] = {}
    for _ in range(900):
        value = {"next": value}
    with pytest.raises(CheckpointError, match="nested too deeply"):
        require_shape(value, endless, "file", "mend it")
