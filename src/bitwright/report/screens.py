"""One screen per command: what its result looks like to a person."""

from typing import Any

from rich.console import Console

from bitwright.report.tables import duration, grid, pairs, size

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
            ("calibration", f"{tokens:,} tokens" if tokens else "none"),
            *(("note", note) for note in found.notes),
        ],
    )


def result(console: Console, found: Any) -> None:
    """``quantize``."""
    error = None if found.output_error is None else f"{found.output_error:.3g} of the last block's output, squared"
    pairs(
        console,
        f"Wrote {found.output}",
        [
            ("method", f"{found.method}, scheme {found.scheme}, format {found.format}"),
            ("linears", found.linears),
            ("bits per weight", f"{found.bits_per_weight:.3f} with scales and zero points"),
            ("size", f"{size(found.bytes_in)} -> {size(found.bytes_out)}"),
            ("relative error", error),
            ("took", f"{duration(found.seconds)}, peak memory {size(found.peak_bytes)}"),
            ("continued", f"{found.resumed} parts were finished before" if found.resumed else None),
            *(("note", text) for text in found.notes),
            *(("fallback", text) for text in found.fallbacks),
            ("next", f"bitwright evaluate {found.output} --text FILE --reference ORIGINAL"),
        ],
    )


def evaluation(console: Console, found: Any) -> None:
    """``evaluate``."""
    m = found.measurement
    over = f"({m.windows} windows of {m.seqlen} tokens)"
    with_reference = m.kl_divergence is not None
    pairs(
        console,
        found.folder,
        [
            ("text", found.text),
            ("perplexity", f"{m.perplexity:.4f} {over}"),
            ("of the original", f"{m.reference_perplexity:.4f} {over}" if with_reference else None),
            ("KL divergence", f"{m.kl_divergence:.5f} nats per token {over}" if with_reference else None),
            ("top-1 agreement", f"{m.top1_agreement:.2%} {over}" if with_reference else None),
            ("weights on disk", size(found.weight_bytes)),
            ("arithmetic", f"{found.dtype} on {found.device}"),
            ("loaded by", None if found.loader == "transformers" else _BY_BITWRIGHT),
        ],
    )


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
            (row.name, f"{row.shape[0]} x {row.shape[1]}", row.dtype, f"{row.bits_per_weight:.3f}")
            for row in found.linears
        ]
        grid(console, "Linears", ("name", "out x in", "stored as", "bits per weight"), rows)


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
