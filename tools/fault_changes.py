"""Changes that make a valid file a hostile one: drawn by hypothesis, plain data, so that what failed can be kept.

A change is a dict, and JSON can hold it:

    {"set": [keys...], "to": value}    another value at a place of the document
    {"remove": [keys...]}              the value goes
    {"rename": [keys...], "as": key}   the same value under another key
    {"at": n, "bytes": "ff00"}         other bytes (in hex), from byte n on
    {"cut": n}                         the file ends at byte n
    {"insert": n, "bytes": "ff00"}     more bytes before byte n

Places belong to documents (JSON, YAML, metadata), bytes to what the document was written as.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

Change = dict[str, Any]
Keys = tuple[str | int, ...]

NESTED: list[Any] = []
for _ in range(200):
    NESTED = [NESTED]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64 + 1, 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf")),
    *("", "x", "0", "\ud800", "\x00", "../x", "a" * 5000, "re:(", "%s{}", "2026-12-01"),
    *([], {}, [None], [[]], [1, 2], ["x"], [{}], {"": None}, {"x": {}}, {"\udfff": 1}, {"type": 3}, NESTED),
)
"""Values that stand where another type, or another size, belongs."""
KEYS = ("", "x", "\ud800", "0", "-1", "a" * 3000, "type", "content", "\x00")
WORDS = (
    "00",
    "ff",
    "0000000000000000",
    "ffffffffffffffff",
    "ffffff7f",
    "00000080",
    "0100000000000000",
    "7b",
    "22",
    "80",
)
"""Bytes in hex: small and huge numbers, and what begins or ends texts."""
MOST_PLACES = 300


def document_changes(document: Any) -> st.SearchStrategy[list[Change]]:
    """Draw one or two changes of a document."""
    places = _spread([keys for keys in _places(document) if keys], MOST_PLACES)
    place = st.sampled_from(places or [("x",)])
    twisted = [(keys, value) for keys in places for value in _twisted(_at(document, keys))]
    changes = [
        st.builds(lambda keys, value: {"set": list(keys), "to": value}, place, st.sampled_from(VALUES)),
        st.builds(lambda keys: {"remove": list(keys)}, place),
        st.builds(lambda keys, key: {"rename": list(keys), "as": key}, place, st.sampled_from(KEYS)),
    ]
    if twisted:
        changes.append(
            st.builds(lambda pair: {"set": list(pair[0]), "to": pair[1]}, st.sampled_from(_spread(twisted, 3000)))
        )
    return st.lists(st.one_of(changes), min_size=1, max_size=2)


def byte_changes(length: int, first: int | None = None) -> st.SearchStrategy[list[Change]]:
    """Draw up to three changes of the bytes of a file of this length, most of them in its ``first`` bytes."""
    last = max(0, (length if first is None else min(first, length)) - 1)
    at = st.integers(0, last) | st.integers(0, max(0, length - 1))
    raw = st.sampled_from(WORDS) | st.binary(min_size=1, max_size=9).map(bytes.hex)
    return st.lists(
        st.one_of(
            st.builds(lambda at, raw: {"at": at, "bytes": raw}, at, raw),
            st.builds(lambda at: {"cut": at}, at),
            st.builds(lambda at, raw: {"insert": at, "bytes": raw}, at, raw),
        ),
        min_size=1,
        max_size=3,
    )


def changed_document(document: Any, changes: Sequence[Change]) -> Any:
    """Make the changes of a document; what does not apply any more is passed over."""
    changed = copy.deepcopy(document)
    for change in changes:
        keys = change.get("set") or change.get("remove") or change.get("rename")
        if keys is None:
            continue
        try:
            parent, last = _at(changed, keys[:-1]), keys[-1]
            if "set" in change:
                parent[last] = copy.deepcopy(change["to"])
            elif "remove" in change:
                del parent[last]
            else:
                parent[change["as"] if isinstance(parent, dict) else 0] = parent.pop(last)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue
    return changed


def changed_bytes(raw: bytes, changes: Sequence[Change]) -> bytes:
    """Make the changes of bytes."""
    for change in changes:
        if "cut" in change:
            raw = raw[: change["cut"]]
        elif "at" in change:
            new = bytes.fromhex(change["bytes"])
            raw = raw[: change["at"]] + new + raw[change["at"] + len(new) :]
        elif "insert" in change:
            raw = raw[: change["insert"]] + bytes.fromhex(change["bytes"]) + raw[change["insert"] :]
    return raw


def _places(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    yield keys
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*keys, key))


def _at(document: Any, keys: Sequence[str | int]) -> Any:
    for key in keys:
        document = document[key]
    return document


def _twisted(value: Any) -> list[Any]:
    """Values of the same type as this one, and near it."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, -value, value * 2, value * 10**6, float(value), str(value)]
    if isinstance(value, float):
        return [-value, value * 1e30, str(value)]
    if isinstance(value, str):
        return [value + "x", value[:-1], value.upper(), [value], {"content": value}]
    if isinstance(value, list):
        return [value + value[:1], value[:-1], value[::-1], {str(n): item for n, item in enumerate(value[:9])}]
    return [list(value)[:9], list(value.values())[:9]] if isinstance(value, dict) else []


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many items: the first half of them, and others evenly from the rest, since a vocabulary is long."""
    if len(items) <= most:
        return list(items)
    head, rest = items[: most // 2], items[most // 2 :]
    step = -(-len(rest) // (most - len(head)))
    return [*head, *rest[::step]]
