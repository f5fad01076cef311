"""One screen per command: what its result looks like to a person."""

from typing import Any

from rich.console import Console

from bitwright.report.tables import duration, grid, pairs, size

_MEASURE = "bitwright evaluate {output} --text FILE --reference ORIGINAL"
_NEXT = {
    "gguf": "llama-cli -m {output} -p PROMPT, or any other program on llama.cpp",
    "mlc": "mlc_llm chat {output}, or compile it for a phone (docs/formats/mlc.md)",
}
_BY_BITWRIGHT = "bitwright.load, which quantizes the queries too; the folder's config could not say so"


def plan(console: Console, found: Any) -> None:
    """``quantize --dry-run``."""
    tokens = found.calibration_tokens
    pairs(
        console,
        "Plan (nothing was written)",
        [
            ("model", f"{found.model} ({found.architecture}, {found.blocks} blocks)"),
            ("method", f"{found.method}, scheme {found.scheme}, format {found.format}"),
            ("linears", f"{found.linears} with {found.quantized_weights:,} weights"),
            ("bits per weight", f"{found.bits_per_weight:.3f} with scales and zero points"),
            ("bytes in", size(found.bytes_in)),
            ("bytes out", f"about {size(found.bytes_out)} ({found.bytes_out / found.bytes_in:.0%})"),
            ("memory", f"about {size(found.memory_bytes)} at the largest moment"),
            ("workers", f"{found.workers} processes" if found.workers > 1 else None),
            ("calibration", f"{tokens:,} tokens" if tokens else "none"),
            *(("note", note) for note in found.notes),
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
        for kind in found.tensors
    ]
    grid(console, "Tensors", ("name", "shape", "how many", "what happens", "why"), rows)


def result(console: Console, found: Any) -> None:
    """``quantize``."""
    error = None if found.output_error is None else f"{found.output_error:.3g} of the last block's output, squared"
    pairs(
        console,
        f"Wrote {found.output}",
        [
            ("method", f"{found.method}, scheme {found.scheme}, format {found.format}"),
            ("linears", found.linears),
            ("groups", f"along the output in {found.per_ic} of {found.linears} linears" if found.per_ic else None),
            ("outliers", f"{found.outliers:,} weights kept exactly" if found.outliers else None),
            ("bits per weight", f"{found.bits_per_weight:.3f} with everything stored for them"),
            ("size", f"{size(found.bytes_in)} -> {size(found.bytes_out)}"),
            ("relative error", error),
            ("verified", found.verified),
            ("took", f"{duration(found.seconds)}, peak memory {size(found.peak_bytes)}"),
            ("continued", f"{found.resumed} parts were finished before" if found.resumed else None),
            *(("note", text) for text in found.notes),
            *(("fallback", text) for text in found.fallbacks),
            (
                "next",
                _NEXT.get(found.format, "bitwright evaluate {output} --text FILE --reference ORIGINAL").format(
                    output=found.output
                ),
            ),
        ],
    )


def exported(console: Console, found: Any) -> None:
    """``export``."""
    again, also = found.linears - found.codes_kept, found.also_quantized
    error = f"at most {found.largest_error:.3g} (in {found.largest_in}), {found.mean_error:.3g} on average, squared"
    pairs(
        console,
        f"Wrote {found.output}",
        [
            ("format", f"{found.format}, from {found.read_as}"),
            ("linears", _linears(found)),
            ("codes kept", _codes_kept(found) if found.exact < found.linears else None),
            ("codes not kept", f"in {again} linears, quantized again or in 16 bits" if again else None),
            ("relative error", error if found.largest_in else None),
            (
                "quantized too",
                f"{', '.join(also)}, not so before: at most {found.also_error:.3g} squared" if also else None,
            ),
            ("size", f"{size(found.bytes_in)} -> {size(found.bytes_out)}"),
            ("verified", found.verified),
            ("took", f"{duration(found.seconds)}, peak memory {size(found.peak_bytes)}"),
        ],
    )


def _linears(found: Any) -> str:
    """How many had codes, and whether they are what they were."""
    if not found.linears:
        return "no linear is quantized; written in 16 bits"
    return f"{found.linears}{', all exactly as they were' if found.exact == found.linears else ''}"


def _codes_kept(found: Any) -> str:
    """In how many linears, and in how many of those the client still computes something else."""
    rounded, what = found.codes_kept - found.exact, "weights" if found.format == "dense" else "scales or minima"
    return f"in {found.codes_kept}" + (f", of which {rounded} have rounded {what}" if rounded else "")


def verification(console: Console, found: Any) -> None:
    """``verify``."""
    rows = [("yes" if check.passed else "NO", check.name, check.found) for check in found.checks]
    grid(console, f"{found.folder} ({found.format}): {found.linears} linears", ("passed", "check", "found"), rows)


def bench(console: Console, found: Any) -> None:
    """``bench``."""
    rows = [
        (
            f"{row.role}: {row.model}",
            size(row.weight_bytes),
            size(row.peak_bytes),
            f"{row.tokens_per_second:.2f}",
            f"{row.prompt_tokens_per_second:.1f}",
        )
        for row in found.rows
    ]
    if found.speedup is not None:
        memory = (f"{found.weight_ratio:.3f}", f"{found.memory_ratio:.3f}")
        rows.append(("model / original", *memory, f"{found.speedup:.2f}", f"{found.prompt_speedup:.2f}"))
    kind = "" if found.dtype is None else f", {found.dtype} on {found.device}"
    grid(
        console,
        f"{found.engine} ({found.version}), {found.threads} threads{kind}: {found.tokens} tokens generated at batch 1, "
        f"a prompt of {found.prompt}, median of {found.rounds}",
        ("", "weights", "running memory", "tokens per second", "prompt tokens per second"),
        rows,
    )


def evaluation(console: Console, found: Any) -> None:
    """``evaluate``."""
    pairs(
        console,
        found.folder,
        [
            *(() if found.measurement is None else _on_text(found)),
            ("weights on disk", size(found.weight_bytes)),
            ("arithmetic", f"{found.dtype} on {found.device}"),
            ("loaded by", None if found.loader == "transformers" else _BY_BITWRIGHT),
            *(("note", note) for note in found.notes),
        ],
    )
    if found.tasks:
        _tasks(console, found)


def _on_text(found: Any) -> list[tuple[str, object]]:
    """Perplexity, and divergence where there is a reference."""
    m = found.measurement
    over = f"({m.windows} windows of {m.seqlen} tokens)"
    with_reference = m.kl_divergence is not None
    return [
        ("text", found.text),
        ("perplexity", f"{m.perplexity:.4f} {over}"),
        ("of the original", f"{m.reference_perplexity:.4f} {over}" if with_reference else None),
        ("KL divergence", f"{m.kl_divergence:.5f} nats per token {over}" if with_reference else None),
        ("top-1 agreement", f"{m.top1_agreement:.2%} {over}" if with_reference else None),
    ]


def _tasks(console: Console, found: Any) -> None:
    """A row per score; the parts of a group that has a mean of its own are left to ``--json``."""
    means = {row.task for row in found.tasks if row.group is None}
    rows = [row for row in found.tasks if row.group not in means]
    beside = ("original", "difference") if found.reference is not None else ()
    grid(
        console,
        "Tasks",
        ("task", "metric", "value", *beside, "documents", "shots"),
        [_task(row, bool(beside)) for row in rows],
    )
    if len(rows) < len(found.tasks):
        console.print(f"{len(found.tasks) - len(rows)} scores of parts of these: --json", highlight=False)
    for row in (row for row in rows if row.cut):
        console.print(
            f"{row.task}: {row.cut} prompts were longer than the model's context and lost their beginning",
            highlight=False,
        )


def _task(row: Any, beside: bool) -> tuple[str, ...]:
    """One line: the value with its standard error, and the original's."""
    metric = row.metric if row.filter == "none" else f"{row.metric} ({row.filter})"
    values = [_with_error(row.value, row.standard_error)]
    if beside:
        values += [_with_error(row.reference, row.reference_standard_error), f"{row.difference:+.4f}"]
    return (row.task, metric, *values, str(row.documents), str(row.shots))


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def inspection(console: Console, found: Any, linears: bool) -> None:
    """``inspect``."""
    pairs(
        console,
        found.path,
        [
            ("architecture", f"{found.architecture} ({found.model_type})"),
            ("blocks", found.blocks),
            ("linears", len(found.linears)),
            ("parameters", f"{found.parameters:,}"),
            ("weights on disk", size(found.weight_bytes)),
            ("quantization", found.quantization or "none"),
            ("scheme", found.scheme),
            ("bits per weight", f"{found.bits_per_weight:.3f} of the linears, all that is stored for them"),
            ("", f"{found.model_bits_per_weight:.3f} of the whole model, embeddings too"),
        ],
    )
    if linears:
        rows = [
            (row.name, _product(row.shape), row.dtype, _product(row.tile), f"{row.bits_per_weight:.3f}")
            for row in found.linears
        ]
        grid(console, "Linears", ("name", "out x in", "stored as", "share a scale", "bits per weight"), rows)


def _product(sides: tuple[int, ...] | None) -> str:
    return "" if sides is None else " x ".join(map(str, sides))


def demonstration(console: Console, found: Any) -> None:
    """``demo``."""
    rows = [
        (
            f"{row.method} {row.scheme}" if row.seconds is not None else "original",
            f"{row.bits_per_weight:.2f}",
            f"{row.weight_bytes / 1e6:.2f}",
            f"{row.perplexity:.3f}",
            f"{row.kl_divergence:.4f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        )
        for row in found.rows
    ]
    grid(
        console,
        f"The embedded model on held-out Python source ({found.windows} windows of {found.seqlen} tokens)",
        ("method", "bits per weight", "MB on disk", "perplexity", "KL from original", "seconds"),
        rows,
    )
    console.print("\nHow each completes the same beginning:", highlight=False)
    for row in found.rows:
        console.print(f"\n[bold]{row.scheme}[/bold]", highlight=False)
        console.print(found.prompt + row.completion, markup=False, highlight=False)
