"""The screen of ``bitwright engines``: a line per way to an engine, then what each was checked with."""

from typing import Any

from rich.console import Console

from bitwright.report.tables import grid


def engines(console: Console, found: Any) -> None:
    """``engines``."""
    rows = [
        (
            engine.name,
            way.format,
            _bits(way.symmetric),
            _bits(way.asymmetric),
            way.sizes,
            "yes" if way.channel else "no",
            ", ".join(what for has, what in _beyond(way) if has) or "nothing",
            _features(way),
            "any" if way.models is None else ", ".join(way.models),
        )
        for engine in found
        for way in engine.ways
    ]
    header = (
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
    grid(console, "What each engine runs: bits of weights, groups that the format holds too", header, rows)
    for engine in found:
        alike = "q, k, v and gate, up have to be quantized alike; " if engine.fused else ""
        console.print(f"\n{engine.name}: {alike}{engine.note}", highlight=False, markup=False)
        for format, how in engine.also.items():
            console.print(f"  {format} too, {how}; not asked by --engine", highlight=False, markup=False)
        for way in engine.ways:
            console.print(f"  {way.format}, checked with {way.checked}", highlight=False, markup=False)


def _beyond(way: Any) -> tuple[tuple[bool, str], ...]:
    """What an engine may run beside weights in groups along the input."""
    return (
        (way.activations, "activations"),
        (way.cache, "KV cache"),
        (way.outliers, "outliers"),
        (way.per_input, "ic groups"),
    )


def _features(way: Any) -> str:
    """What the sizes of a linear are multiples of, the format's own aside."""
    if way.inputs == way.outputs:
        return "any" if way.inputs == 1 else f"multiples of {way.inputs}"
    return " and ".join(
        f"{what} multiples of {size}" for what, size in (("in", way.inputs), ("out", way.outputs)) if size > 1
    )


def _bits(bits: tuple[int, ...]) -> str:
    if not bits:
        return "none"
    return f"{bits[0]} to {bits[-1]}" if len(bits) > 4 else ", ".join(map(str, bits))
