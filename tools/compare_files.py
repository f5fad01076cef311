"""What differs between two folders: which files, of JSON which keys, and whether that is listed."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from math import isclose
from pathlib import Path
from typing import Any

ACCOUNT, TIMINGS = "bitwright.json", "bitwright-timings.json"
ANY, NEW, CLOSE = "any value", "a key that is new", "the same within 1e-6"


@dataclass(frozen=True)
class Allowed:
    """A difference that may be. ``key`` and ``file`` (its name without folders) and ``case`` are patterns."""

    reason: str
    key: str
    how: str = ANY
    file: str = ACCOUNT
    case: str = "*"


@dataclass(frozen=True)
class Difference:
    """Of a file, the key or the tensor that differs; ``<file>`` is that it is there, ``<bytes>`` all that is in it."""

    file: str
    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.file}: {self.key} {_shown(self.before)} -> {_shown(self.after)}"

    def reason(self, case: str, allowed: Iterable[Allowed]) -> str | None:
        """Return why this may be, None where it may not."""
        for one in allowed:
            patterns = ((self.file.rpartition("/")[2], one.file), (self.key, one.key), (case, one.case))
            if all(fnmatchcase(text, pattern) for text, pattern in patterns) and self._is(one.how):
                return one.reason
        return None

    def _is(self, how: str) -> bool:
        if how == CLOSE:
            numbers = isinstance(self.before, float) and isinstance(self.after, float)
            return numbers and isclose(self.before, self.after, rel_tol=1e-6)
        return how == ANY or self.before is ABSENT


class Absent:
    """What stands for a value where there is none."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = Absent()


def compare(before: Path, after: Path) -> list[Difference]:
    """List what differs between two folders, file by file. Of timings only the presence counts."""
    found: list[Difference] = []
    files = {str(path.relative_to(side)) for side in (before, after) for path in side.rglob("*") if path.is_file()}
    for name in sorted(files):
        pair, base = (before / name, after / name), Path(name).name
        there = [path.is_file() for path in pair]
        if not all(there):
            sizes = [path.stat().st_size if path.is_file() else ABSENT for path in pair]
            found.append(Difference(name, "<file>", *sizes))
        elif base != TIMINGS and digest(pair[0]) != digest(pair[1]):
            found += _within(name, *pair)
    return found


def _within(name: str, before: Path, after: Path) -> list[Difference]:
    """What differs in a file: keys of JSON, tensors, parts of GGUF, else its bytes. Of the account the values count."""
    kind = GGUF if before.read_bytes()[:4] == b"GGUF" else Path(name).suffix
    if kind not in READERS:
        return [Difference(name, "<bytes>", digest(before), digest(after))]
    try:
        one, other = READERS[kind](before), READERS[kind](after)
    except Exception as error:  # whatever the libraries raise
        return [Difference(name, "<bytes>", digest(before), f"one of them cannot be read: {error}")]
    found: list[Difference] = []
    if kind == GGUF:
        inside = unlike(one.pop(IN_GGUF, None), other.pop(IN_GGUF, None))
        found += [Difference(f"{name}/{ACCOUNT}", *rest) for rest in inside]
    found += [Difference(name, *rest) for rest in unlike(one, other)]
    as_read = Path(name).name == ACCOUNT or kind == GGUF
    return found if found or as_read else [Difference(name, "<bytes>", digest(before), digest(after))]


def _tensors(path: Path) -> Any:
    from safetensors import deserialize

    return dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]


def _gguf(path: Path) -> Any:
    """Every key and tensor with its bytes, their order, the account as JSON."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    keys: dict[str, Any] = {k: [one.types, *(part.tobytes() for part in one.parts)] for k, one in reader.fields.items()}
    account = {IN_GGUF: json.loads(keys.pop(IN_GGUF)[-1])} if IN_GGUF in keys else {}
    tensors = {t.name: [t.tensor_type, t.shape.tolist(), t.data.tobytes()] for t in reader.tensors}
    return account | keys | tensors | {"<order>": [*reader.fields, *tensors]}


GGUF, IN_GGUF = ".gguf", "bitwright.account"
READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")), ".safetensors": _tensors, GGUF: _gguf,
}  # fmt: skip


def unlike(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys at which two values differ, joined by dots, and what is there."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            yield from unlike(before.get(name, ABSENT), after.get(name, ABSENT), f"{key}.{name}" if key else str(name))
    elif isinstance(before, list) and isinstance(after, list):
        for at, (one, other) in enumerate(zip_longest(before, after, fillvalue=ABSENT)):
            yield from unlike(one, other, f"{key}.{at}")
    elif before != after and not (before != before and after != after):  # NaN is NaN
        yield key, before, after


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files in a folder with their names."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(one for one in path.rglob("*") if one.is_file() and one.suffix != ".pyc")
    listed = "".join(f"{one.relative_to(path)} {digest(one)}\n" for one in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def _shown(value: Any) -> str:
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes {hashlib.sha256(value).hexdigest()[:12]}"
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
