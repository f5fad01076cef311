"""The screen of ``bitwright engines``: a row for each format of an engine, then the versions that were checked."""

from collections.abc import Sequence

from rich.console import Console

from bitwright.core.engine import Alike, Engine, Way
from bitwright.report.tables import grid, pairs

HEADER = (
    "engine",
    "format",
    "symmetric",
    "asymmetric",
    "groups",
    "channels",
    "beside that",
    "features",
    "architectures",
)


def engines(console: Console, table: Sequence[Engine]) -> None:
    """Show what each engine runs."""
    rows = [(engine.name, *_cells(way)) for engine in table for way in engine.ways]
    title = "What each engine runs: bits of weights, groups that the format holds too"
    if _width(rows) <= console.width:
        grid(console, title, HEADER, rows)
    else:  # a table would break words
        console.print(title, highlight=False, markup=False)
        for row in rows:
            console.print()
            pairs(console, f"{row[0]}, format {row[1]}", list(zip(HEADER[2:], row[2:], strict=True)))
    for engine in table:
        alike = "q, k, v and gate, up have to be quantized alike; " if engine.fused else ""
        console.print(f"\n{engine.name}: {alike}{engine.note}", highlight=False, markup=False)
        for format, how in engine.also.items():
            console.print(f"  {format} too, {how}; not asked by --engine", highlight=False, markup=False)
        for way in engine.ways:
            console.print(f"  {way.format}, checked with {way.checked}", highlight=False, markup=False)
        for format, mixing in {way.format: _mixing(way) for way in engine.ways}.items():
            console.print(f"  {format}: {mixing}", highlight=False, markup=False)


def _width(rows: Sequence[tuple[str, ...]]) -> int:
    """The width of the table in which no word is broken, in characters."""
    return sum(max(map(len, column)) + 3 for column in zip(HEADER, *rows, strict=True)) + 1


def _cells(way: Way) -> tuple[str, ...]:
    """The cells of a row after the engine's name."""
    return (
        way.format,
        _bits(way.symmetric),
        _bits(way.asymmetric),
        way.sizes,
        "yes" if way.channel else "no",
        _extras(way),
        _features(way),
        "any" if way.models is None else ", ".join(way.models),
    )


def _extras(way: Way) -> str:
    """What the engine runs besides weights in groups along the input."""
    extras = {
        "activations": way.activations,
        "KV cache": way.cache,
        "outliers": way.outliers,
        "ic groups": way.per_input,
    }
    return ", ".join(name for name, runs in extras.items() if runs) or "nothing"


def _features(way: Way) -> str:
    """The numbers of which a linear's features must be multiples, besides the format's own."""
    if way.inputs == way.outputs:
        return "any" if way.inputs == 1 else f"multiples of {way.inputs}"
    multiples = {"in": way.inputs, "out": way.outputs}
    return " and ".join(f"{side} multiples of {size}" for side, size in multiples.items() if size > 1)


def _mixing(way: Way) -> str:
    """The schemes that one model may mix."""
    mixed = {"schemes from linear to linear": way.mixes, "linears in full precision": way.leaves}
    mixes = " and ".join(name for name, may in mixed.items() if may)
    alike = {Alike.NONE: "", Alike.LAYER: "; experts of one layer alike", Alike.MODEL: "; all experts alike"}
    return (f"one model may mix {mixes}" if mixes else "all linears have one scheme") + alike[way.experts]


def _bits(bits: tuple[int, ...]) -> str:
    if not bits:
        return "none"
    return f"{bits[0]} to {bits[-1]}" if len(bits) > 4 else ", ".join(map(str, bits))
