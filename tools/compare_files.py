"""Find what differs between two folders: files, keys of JSON, tensors; and whether a list allows it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from typing import Any

from compare_cases import Case

ACCOUNT = "bitwright.json"
PRESENT = ("bitwright-timings.json", "journal.jsonl")
"""Files of which only the presence counts: they hold seconds, and when files were written to."""


@dataclass(frozen=True)
class Difference:
    """A key of a file, or a tensor, that differs; ``<file>`` is the file itself, ``<bytes>`` all that is in it.

    ``file`` is a path in the folder of the case; the account inside a GGUF file is ``NAME.gguf/bitwright.json``.
    """

    file: str
    key: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.file}: {self.key} {_shown(self.before)} -> {_shown(self.after)}"

    def reason(self, case: Case, outputs: Path, allowed: "Iterable[Allowed]") -> str | None:
        """Return why it is allowed, None if it is not. ``outputs`` has the cases' folders of the tree AFTER."""
        for entry in allowed:
            patterns = ((self.file.rpartition("/")[2], entry.file), (self.key, entry.key), (case.name, entry.case))
            if all(fnmatchcase(text, pattern) for text, pattern in patterns) and entry.holds(self, case, outputs):
                return entry.reason
        return None


@dataclass(frozen=True)
class Allowed:
    """A difference that is meant.

    ``key``, ``file`` (its name without folders) and ``case`` are patterns. ``holds`` says whether the two values are
    as the reason says; it is given the case, and the folder with the cases' folders of the tree AFTER.
    """

    reason: str
    key: str
    holds: Callable[[Difference, Case, Path], bool]
    file: str = ACCOUNT
    case: str = "*"


class Absent:
    """The value of a key or a file that is not there."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = Absent()


def compare(before: Path, after: Path) -> list[Difference]:
    """List what differs between two folders, file by file."""
    differences: list[Difference] = []
    files = {str(path.relative_to(side)) for side in (before, after) for path in side.rglob("*") if path.is_file()}
    for name in sorted(files):
        pair = before / name, after / name
        sizes = [path.stat().st_size if path.is_file() else ABSENT for path in pair]
        if ABSENT in sizes:
            differences.append(Difference(name, "<file>", *sizes))
        elif Path(name).name not in PRESENT and digest(pair[0]) != digest(pair[1]):
            differences += _within(name, *pair)
    return differences


def _within(name: str, before: Path, after: Path) -> list[Difference]:
    """List the keys of JSON, the tensors or the parts of GGUF that differ, else the bytes.

    The account may differ in its bytes if its values are equal.
    """
    kind = GGUF if is_gguf(before) else Path(name).suffix
    bytes_differ = [Difference(name, "<bytes>", digest(before), digest(after))]
    if kind not in READERS:
        return bytes_differ
    try:
        values = READERS[kind](before), READERS[kind](after)
    except Exception as error:  # whatever the libraries raise
        return [Difference(name, "<bytes>", digest(before), f"one of them cannot be read: {error}")]
    differences: list[Difference] = []
    if kind == GGUF:
        accounts = [by_name(parts.pop(IN_GGUF, ABSENT)) for parts in values if isinstance(parts, dict)]
        differences += [Difference(f"{name}/{ACCOUNT}", *rest) for rest in unlike(accounts[0], accounts[1])]
    as_values = Path(name).name == ACCOUNT or kind == GGUF
    if Path(name).name == ACCOUNT:
        values = by_name(values[0]), by_name(values[1])
    differences += [Difference(name, *rest) for rest in unlike(*values)]
    return differences if differences or as_values else bytes_differ


def by_name(account: object) -> object:
    """Sort the linears of an account's blocks by their names; ``<order>`` has the names as they were listed."""
    if not isinstance(account, dict) or not isinstance(account.get("blocks"), list):
        return account
    listed: list[str] = []
    in_order: list[dict[str, Any]] = []
    for block in account["blocks"]:
        rows = block.get("linears", [])
        listed += [row["name"] for row in rows]
        in_order.append({**block, "linears": sorted(rows, key=lambda row: str(row["name"]))} if rows else block)
    return account | {"blocks": in_order, "<order>": listed}


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever its name."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _json(path: Path) -> object:
    value: object = json.loads(path.read_text(encoding="utf-8"))
    return value


def _tensors(path: Path) -> object:
    from safetensors import deserialize

    return dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]


def _gguf(path: Path) -> object:
    """Read every key and every tensor with its bytes, their order, and the account as JSON."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    parts: dict[str, object] = {
        key: [field.types, *(part.tobytes() for part in field.parts)] for key, field in reader.fields.items()
    }
    if IN_GGUF in reader.fields:
        parts[IN_GGUF] = json.loads(reader.fields[IN_GGUF].parts[-1].tobytes())
    parts |= {t.name: [t.tensor_type, t.shape.tolist(), t.data.tobytes()] for t in reader.tensors}
    return parts | {"<order>": [*reader.fields, *(t.name for t in reader.tensors)]}


GGUF, IN_GGUF = ".gguf", "bitwright.account"
READERS: Mapping[str, Callable[[Path], object]] = {".json": _json, ".safetensors": _tensors, GGUF: _gguf}


def unlike(before: object, after: object, key: str = "") -> Iterator[tuple[str, object, object]]:
    """Yield the keys at which two values differ, joined by dots, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            yield from unlike(before.get(name, ABSENT), after.get(name, ABSENT), f"{key}.{name}" if key else str(name))
    elif isinstance(before, list) and isinstance(after, list):
        for at, pair in enumerate(zip_longest(before, after, fillvalue=ABSENT)):
            yield from unlike(*pair, f"{key}.{at}")
    elif before != after and not (before != before and after != after):  # NaN is NaN
        yield key, before, after


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files in a folder with their names."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc")
    listed = "".join(f"{file.relative_to(path)} {digest(file)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def _shown(value: object) -> str:
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes {hashlib.sha256(value).hexdigest()[:12]}"
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
