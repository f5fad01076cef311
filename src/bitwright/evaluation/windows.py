"""The windows of a text on which a model is measured, by the protocol that was asked for."""

from collections.abc import Callable

import torch

from bitwright.calibration.segments import Packed, Segments, beside, packed_text
from bitwright.calibration.sources import shares_of, sources_of
from bitwright.calibration.texts import documents_of, text_of
from bitwright.calibration.tokenizer import Tokenizer
from bitwright.core.errors import CalibrationError, UserError, nearest
from bitwright.evaluation.measure import MODEL, PAPERS, consecutive, require_windows

PROTOCOLS = (MODEL, PAPERS)
Say = Callable[[str], None]


def require_protocol(name: str) -> None:
    """Raise UserError for a protocol that is none."""
    if name not in PROTOCOLS:
        raise UserError(f"there is no protocol '{name}'; {nearest(name, PROTOCOLS)}")


def evaluation_windows(
    text: str,
    tokenizer: Tokenizer,
    *,
    seqlen: int,
    windows: int | None,
    protocol: str = MODEL,
    field: str | None = None,
    say: Say = lambda note: None,
) -> Segments:
    """The first ``windows`` windows of ``seqlen`` tokens of a text, or all.

    By the protocol "model", each is a text of its own: it begins with what the tokenizer puts in front of a text, and
    so does each document in it. By "papers", the whole text is one stream of tokens, cut. Several sources need
    ``windows``, of which each gets its share. Raises CalibrationError.
    """
    sources = sources_of(text)
    if protocol == PAPERS:
        if len(sources) > 1:
            raise CalibrationError(
                f"--protocol {PAPERS} measures on one text, and '{text}' names {len(sources)}; measure on one after "
                "the other"
            )
        tokens = tokenizer.stream(text_of(sources[0].name, "evaluation", say, field))
        return Segments(consecutive(tokens, seqlen, windows, sources[0].name))
    require_windows(seqlen, windows)
    if len(sources) > 1 and windows is None:
        raise CalibrationError(f"'{text}' names {len(sources)} texts; say with --windows how many windows they share")
    counts = [None] if windows is None else shares_of(windows, sources)
    chosen = []
    for source, count in zip(sources, counts, strict=True):
        documents = documents_of(source.name, "evaluation", say, field)
        packed = packed_text(source.name, documents, tokenizer, seqlen)
        if len(packed.segments) < (count or 1):
            raise _too_short(packed, count or 1, seqlen, tokenizer)
        chosen.append(packed.segments[:count])
    return Segments(torch.cat(chosen), tokenizer.beginning, tokenizer.begins_with)


def _too_short(text: Packed, windows: int, seqlen: int, tokenizer: Tokenizer) -> CalibrationError:
    needed = windows * (seqlen - len(tokenizer.beginning))
    return CalibrationError(
        f"{windows} windows of {seqlen} tokens need {needed} tokens{beside(tokenizer)}, but {text.describe()}, enough "
        f"for {len(text.segments)}; take a longer text, fewer --windows, or a shorter --seqlen"
    )
