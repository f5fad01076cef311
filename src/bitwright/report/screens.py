"""The screens of the commands: each shows the result of one command."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from bitwright.core.errors import in_shell
from bitwright.core.registry import format_of
from bitwright.core.weight import starred
from bitwright.report.tables import duration, grid, pairs, size

_BY_BITWRIGHT = "bitwright.load: transformers alone does not load this format, or leaves the queries as they are"


def plan(console: Console, result: Any) -> None:
    """Show the result of ``quantize --dry-run``."""
    tokens = result.calibration_tokens
    pairs(
        console,
        "Plan (nothing was written)",
        [
            ("model", f"{result.model} ({result.architecture}, {result.blocks} blocks)"),
            ("method", f"{result.method}, scheme {result.scheme}, format {result.format}"),
            ("settings", _settings(result.settings) or None),
            ("linears", f"{result.linears} with {result.quantized_weights:,} weights"),
            ("bits per weight", f"{result.bits_per_weight:.3f} with scales and zero points"),
            ("bytes in", size(result.bytes_in)),
            ("bytes out", f"about {size(result.bytes_out)} ({result.bytes_out / result.bytes_in:.0%})"),
            ("memory", f"about {size(result.memory_bytes)} at the largest moment"),
            ("workers", f"{result.workers} processes" if result.workers > 1 else None),
            ("calibration", f"{tokens:,} tokens{_begins(result.begins_with, 'segment')}" if tokens else "none"),
            *(("note", note) for note in result.notes),
        ],
    )
    rows = [
        (
            kind.name,
            " x ".join(map(str, kind.shape)),
            str(kind.count),
            "quantized" if kind.quantized else "kept",
            kind.why,
        )
        for kind in result.tensors
    ]
    grid(console, "Tensors", ("name", "shape", "how many", "what happens", "why"), rows)


def _settings(settings: Mapping[str, object]) -> str:
    """The settings that have a value, in words."""
    shown = {key: ("off", "on")[value] if isinstance(value, bool) else value for key, value in settings.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)


def result(console: Console, result: Any) -> None:
    """Show the result of ``quantize``."""
    error = None if result.output_error is None else f"{result.output_error:.3g} of the last block's output, squared"
    pairs(
        console,
        f"Wrote {result.output}",
        [
            ("method", f"{result.method}, scheme {result.scheme}, format {result.format}"),
            ("linears", result.linears),
            ("groups", f"along the output in {result.per_ic} of {result.linears} linears" if result.per_ic else None),
            ("outliers", f"{result.outliers:,} weights kept exactly" if result.outliers else None),
            ("bits per weight", f"{result.bits_per_weight:.3f} with everything stored for them"),
            ("", f"{result.model_bits_per_weight:.3f} of the whole model, embeddings too"),
            ("left alone", _left_alone(result)),
            ("size", f"{size(result.bytes_in)} -> {size(result.bytes_out)}"),
            ("calibration", _calibration(result.calibration)),
            ("relative error", error),
            ("verified", result.verified),
            ("took", f"{duration(result.seconds)}, peak memory {size(result.peak_bytes)}"),
            ("continued", _continued(result.resumed)),
            *(("note", text) for text in result.notes),
            *(("fallback", text) for text in result.fallbacks),
            ("next", format_of(result.format).next_step.format(output=in_shell(result.output))),
        ],
    )


def _calibration(data: Any) -> str | None:
    """The calibration data of a run; None if it had none."""
    if data is None:
        return None
    return f"{data.segments} segments of {data.seqlen} tokens{_begins(data.begins_with, 'segment')}"


def _begins(token: str | None, what: str) -> str:
    """What each segment or window begins with, as the end of a line."""
    return f"; each {what} begins with {token}" if token else ""


def _continued(parts: int) -> str | None:
    """How many parts an earlier run had finished; None if there was none."""
    were = "1 part was" if parts == 1 else f"{parts} parts were"
    return f"{were} finished before" if parts else None


def _left_alone(result: Any) -> str | None:
    """The share of matrices in full precision, with the reasons; None if there are none."""
    shares = result.left_alone
    reasons = ", ".join(f"{why} {share:.0%}" for why, share in shares.items())
    whole = f"{sum(shares.values()):.0%} of the weights of matrices stay at {result.full_bits} bits"
    return f"{whole}: {reasons}" if shares else None


def exported(console: Console, result: Any) -> None:
    """Show the result of ``export``."""
    again, also = result.linears - result.codes_kept, result.also_quantized
    error = f"at most {result.largest_error:.3g} (in {result.largest_in}), {result.mean_error:.3g} on average, squared"
    pairs(
        console,
        f"Wrote {result.output}",
        [
            ("format", f"{result.format}, from {result.read_as}"),
            ("linears", _linears(result)),
            ("codes kept", _codes_kept(result) if result.exact < result.linears else None),
            ("codes not kept", f"in {again} linears, quantized again or in 16 bits" if again else None),
            ("relative error", error if result.largest_in else None),
            (
                "quantized too",
                f"{', '.join(also)}, not so before: at most {result.also_error:.3g} squared" if also else None,
            ),
            ("size", f"{size(result.bytes_in)} -> {size(result.bytes_out)}"),
            ("verified", result.verified),
            ("took", f"{duration(result.seconds)}, peak memory {size(result.peak_bytes)}"),
        ],
    )


def _linears(result: Any) -> str:
    """The number of linears that had codes, and whether they are unchanged."""
    if not result.linears:
        return "no linear is quantized; written in 16 bits"
    return f"{result.linears}{', all exactly as they were' if result.exact == result.linears else ''}"


def _codes_kept(result: Any) -> str:
    """The number of linears that keep their codes, and of those whose values a client computes differently."""
    from bitwright.core.format import TensorFormat  # brings torch, which a first screen does not wait for

    format, rounded = format_of(result.format), result.codes_kept - result.exact
    what = "weights" if isinstance(format, TensorFormat) and format.reader is None else "scales or minima"
    return f"in {result.codes_kept}" + (f", of which {rounded} have rounded {what}" if rounded else "")


def verification(console: Console, result: Any) -> None:
    """Show the result of ``verify``."""
    words = {True: "yes", False: "NO", None: "not seen"}
    rows = [(words[check.passed], check.name, check.found) for check in result.checks]
    grid(console, f"{result.folder} ({result.format}): {result.linears} linears", ("passed", "check", "found"), rows)


def bench(console: Console, result: Any) -> None:
    """Show the result of ``bench``."""
    rows = [
        (
            f"{row.role}: {row.model}",
            size(row.weight_bytes),
            size(row.peak_bytes),
            f"{row.tokens_per_second:.2f}",
            f"{row.prompt_tokens_per_second:.1f}",
        )
        for row in result.rows
    ]
    if result.speedup is not None:
        memory = (f"{result.weight_ratio:.3f}", f"{result.memory_ratio:.3f}")
        rows.append(("model / original", *memory, f"{result.speedup:.2f}", f"{result.prompt_speedup:.2f}"))
    kind = "" if result.dtype is None else f", {result.dtype} on {result.device}"
    grid(
        console,
        f"{result.engine} ({result.version}), {result.threads} threads{kind}: {result.tokens} tokens generated at "
        f"batch 1, a prompt of {result.prompt}, median of {result.rounds}",
        ("", "weights", "running memory", "tokens per second", "prompt tokens per second"),
        rows,
    )


def evaluation(console: Console, result: Any) -> None:
    """Show the result of ``evaluate``."""
    pairs(
        console,
        result.folder,
        [
            *(() if result.measurement is None else _on_text(result)),
            ("weights on disk", size(result.weight_bytes)),
            ("arithmetic", f"{result.dtype} on {result.device}"),
            ("loaded by", None if result.loader == "transformers" else _BY_BITWRIGHT),
            *(("note", note) for note in result.notes),
        ],
    )
    if result.tasks:
        _tasks(console, result)


def _on_text(result: Any) -> list[tuple[str, object]]:
    """Perplexity, and the divergence from a reference if there is one."""
    m = result.measurement
    over = f"({m.windows} windows of {m.seqlen} tokens)"
    with_reference = m.kl_divergence is not None
    return [
        ("text", result.text),
        ("windows", f"each begins with {m.begins_with}" if m.begins_with else None),
        ("protocol", f"{m.protocol}: one stream of tokens, cut into windows" if m.protocol == "papers" else None),
        ("perplexity", f"{m.perplexity:.4f} {over}"),
        ("of the original", f"{m.reference_perplexity:.4f} {over}" if with_reference else None),
        ("KL divergence", f"{m.kl_divergence:.5f} nats per token {over}" if with_reference else None),
        ("top-1 agreement", f"{m.top1_agreement:.2%} {over}" if with_reference else None),
    ]


def _tasks(console: Console, result: Any) -> None:
    """Show a row per score; if a group has its own mean, its parts are only in ``--json``."""
    means = {row.task for row in result.tasks if row.group is None}
    rows = [row for row in result.tasks if row.group not in means]
    beside = ("original", "difference") if result.reference is not None else ()
    grid(
        console,
        "Tasks",
        ("task", "metric", "value", *beside, "documents", "shots"),
        [_task(row, bool(beside)) for row in rows],
    )
    if len(rows) < len(result.tasks):
        console.print(f"{len(result.tasks) - len(rows)} scores of parts of these: --json", highlight=False)
    for row in (row for row in rows if row.cut):
        console.print(
            f"{row.task}: {row.cut} prompts were longer than the model's context and lost their beginning",
            highlight=False,
        )


def _task(row: Any, beside: bool) -> tuple[str, ...]:
    """One row: the value with its standard error, and the original's."""
    metric = row.metric if row.filter == "none" else f"{row.metric} ({row.filter})"
    values = [_with_error(row.value, row.standard_error)]
    if beside:
        values += [_with_error(row.reference, row.reference_standard_error), f"{row.difference:+.4f}"]
    return (row.task, metric, *values, str(row.documents), str(row.shots))


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def inspection(console: Console, result: Any, linears: bool) -> None:
    """Show the result of ``inspect``."""
    pairs(
        console,
        result.path,
        [
            ("architecture", f"{result.architecture} ({result.model_type})"),
            ("blocks", result.blocks),
            ("linears", len(result.linears)),
            ("parameters", f"{result.parameters:,}"),
            ("weights on disk", size(result.weight_bytes)),
            ("quantization", result.quantization or "none"),
            ("scheme", _schemes(result)),
            ("bits per weight", f"{result.bits_per_weight:.3f} of the linears, all that is stored for them"),
            ("", f"{result.model_bits_per_weight:.3f} of the whole model, embeddings too"),
        ],
    )
    if linears:
        rows = [
            (row.name, _product(row.shape), row.scheme or row.dtype, _product(row.tile), f"{row.bits_per_weight:.3f}")
            for row in result.linears
        ]
        grid(console, "Linears", ("name", "out x in", "stored as", "share a scale", "bits per weight"), rows)
    for kind in result.inside:
        _inside(console, kind)


def _inside(console: Console, kind: Any) -> None:
    """Show one kind of block: groups of linears, sites, and what stays. Experts are shown once, with ``*``."""
    first, *others = kind.blocks
    rows = [("share an input", _starred(group)) for group in kind.groups]
    for site in kind.sites:
        what = f"{site.channels} scales" + (" and shifts" if site.shift else "")
        ends = f"{_starred(site.producers)} to {_starred(site.readers)}" if site.readers else _starred(site.producers)
        rows.append((starred(site.name), f"{ends}: {what}"))
    rows += [("stay", f"{_starred(names)} ({why})") for why, names in kind.kept.items()]
    pairs(console, f"{first}, and {len(others)} like it" if others else first, list(dict.fromkeys(rows)))


def _starred(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(starred(f"{name}.").removesuffix(".") for name in names))


def _schemes(result: Any) -> str | None:
    """The scheme of a quantized folder; the number of linears with each, if it has several or leaves linears alone."""
    counted = result.schemes
    if len(counted) < 2:
        return result.scheme or next(iter(counted), None)
    return ", ".join(f"{'not quantized' if scheme is None else scheme} ({n})" for scheme, n in counted.items())


def _product(sides: tuple[int, ...] | None) -> str:
    return "" if sides is None else " x ".join(map(str, sides))


def demonstration(console: Console, result: Any) -> None:
    """Show the result of ``demo``."""
    rows = [
        (
            f"{row.method} {row.scheme}" if row.seconds is not None else "original",
            f"{row.bits_per_weight:.2f}",
            f"{row.model_bits_per_weight:.2f}",
            f"{row.weight_bytes / 1e6:.2f}",
            f"{row.perplexity:.3f}",
            f"{row.kl_divergence:.4f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        )
        for row in result.rows
    ]
    grid(
        console,
        f"The embedded model on held-out Python source ({result.windows} windows of {result.seqlen} tokens)",
        ("method", "bits per weight", "of the whole model", "MB on disk", "perplexity", "KL from original", "seconds"),
        rows,
    )
    console.print("\nHow each completes the same beginning:", highlight=False)
    for row in result.rows:
        console.print(f"\n[bold]{row.scheme}[/bold]", highlight=False)
        console.print(result.prompt + row.completion, markup=False, highlight=False)
