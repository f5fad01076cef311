"""Rows of a measurement: how they are named, kept while a run goes on, and shown.

A row is ``[implementation/]method:scheme[:seed[:key=value,key=value]]``; without an implementation it is Bitwright's.
"""

import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("bitwright", "torch", "transformers", "compressed-tensors")
OURS = "bitwright"
Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """The request of a row. ``settings`` are the implementation's own, or those of a recipe if it is Bitwright."""

    who: str
    method: str
    scheme: str
    seed: int
    settings: Row

    @classmethod
    def parse(cls, key: str) -> "Asked":
        """The row that a text names. Raises ValueError for one that is no row."""
        name, _, rest = key.partition(":")
        grid = f"{rest.partition(':')[0]}:" if re.match("mlc:", rest) else ""  # a scheme with a colon in it
        scheme, seed, settings = [*rest.removeprefix(grid).split(":", 2), "", ""][:3]
        scheme = grid + scheme if scheme else ""
        who, _, method = name.rpartition("/")
        if not method or not scheme or not (seed or "0").isdecimal():
            raise ValueError(f"'{key}' is no row; one reads [implementation/]method:scheme[:seed[:key=value,...]]")
        pairs = [pair.split("=", 1) for pair in settings.split(",") if pair]
        if not all(len(pair) == 2 for pair in pairs):
            raise ValueError(f"'{key}': settings read key=value,key=value, and found is '{settings}'")
        return cls(who or OURS, method, scheme, int(seed or 0), {k: yaml.safe_load(v) for k, v in pairs})

    @property
    def shown(self) -> str:
        """Method, seed and settings in words."""
        seed = [f"seed {self.seed}"] if self.seed else []
        return ", ".join([self.method, *seed, *(f"{name} {value}" for name, value in self.settings.items())])


@dataclass(frozen=True)
class Kept:
    """The rows of one file of results. A row that was measured under the same protocol is not measured again.

    ``libraries`` are those whose versions are written down.
    """

    name: str
    protocol: Row
    libraries: tuple[str, ...] = LIBRARIES

    def row(self, identity: Row, measured: Callable[[], Row]) -> Row:
        """The row of this identity: from the file, or measured now and written down at once."""
        wanted = identity | {"protocol": self.protocol}
        for row_on_file in self._rows():
            if all(row_on_file.get(key) == value for key, value in wanted.items()):
                return row_on_file
        row = wanted | measured() | machine(self.libraries)
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{self.name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        return row

    def write_table(self, title: str, text: str, columns: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
        """Write NAME.md anew."""
        lines = [columns, *cells]
        header, *table = ("| " + " | ".join(line) + " |" for line in lines)
        rule = "|" + "---|" * len(columns)
        text = "\n".join([f"# {title or self.name}", "", text, "", header, rule, *table])
        (RESULTS / f"{self.name}.md").write_text(f"{text}\n")

    def _rows(self) -> list[Row]:
        path = RESULTS / f"{self.name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def machine(libraries: Iterable[str] = LIBRARIES) -> Row:
    """The date, hardware and versions with which a row is measured."""
    return {
        "date": date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, torch threads {torch.get_num_threads()}",
        "versions": {name: version(name) for name in libraries},
    }


def measured_on(rows: Sequence[Row]) -> str:
    """The sentence that says when and on what; the newest row speaks for all."""
    newest = max(rows, key=lambda row: row["date"])
    return f"Measured {newest['date']} on {newest['hardware']}; {listed(newest['versions'])}."


def listed(versions: Row) -> str:
    """Versions in words."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())
