"""Calibration segments: read the data, render and tokenize it as the model sees it, pack it, and draw from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.calibration import mix
from bitwright.calibration.packing import packed
from bitwright.calibration.rows import Document
from bitwright.calibration.sources import shares_of, sources_of
from bitwright.calibration.texts import documents_of, is_mix
from bitwright.calibration.tokenizer import Tokenizer
from bitwright.core.errors import CalibrationError

SEEDS = 2**63
"""The number of seeds that torch's generator accepts."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Segments:
    """Segments of text, or windows to measure on; ``beginning`` is in front of each, and of each document in it.

    ``begins_with`` spells it out; it is None if the tokenizer puts nothing in front of a text.
    """

    tokens: Int[Tensor, "N T"]
    beginning: tuple[int, ...] = ()
    begins_with: str | None = None


@dataclass(frozen=True)
class Packed:
    """One source of text, packed: all its segments, and what errors say of it."""

    name: str
    segments: Int[Tensor, "W T"]
    tokens: int
    documents: int

    def describe(self) -> str:
        """The size of the source, for errors."""
        rows = f" in {self.documents:,} documents" if self.documents > 1 else ""
        return f"'{self.name}' has {self.tokens}{rows}"


def calibration_segments(
    calibration: str,
    tokenizer: Tokenizer,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    field: str | None = None,
    say: Say = lambda note: None,
) -> Segments:
    """Draw ``samples`` segments of ``seqlen`` tokens from the sources that ``calibration`` names, without repetition.

    Equal data and seeds give equal segments. Raises CalibrationError, which names the source, if one is too short.
    """
    if seed >= SEEDS:
        raise CalibrationError(f"seed {seed} is more than torch's generator takes; it must be below {SEEDS}")
    sources = sources_of(calibration)
    counts = shares_of(samples, sources)
    texts = [documents_of(source.name, "calibration", say, field) for source in sources]
    generator, drawn = torch.Generator().manual_seed(seed), list[Tensor]()
    for source, documents, count in zip(sources, texts, counts, strict=True):
        if built_in := is_mix(source.name):
            documents = mix.fitted(documents, tokenizer, say)
        text = packed_text(source.name, documents, tokenizer, seqlen)
        available = len(text.segments)
        if available < count and not (built_in and available):
            raise _too_short(text, count, seqlen, tokenizer, alone=len(sources) == 1)
        if available < count:
            say(f"{mix.NAME} has {available} segments of {seqlen} tokens; all are used, and {count} were asked for")
        drawn.append(text.segments[torch.randperm(available, generator=generator)[:count]])
    tokens = torch.cat(drawn)
    if len(sources) > 1:
        tokens = tokens[torch.randperm(len(tokens), generator=generator)]
    return Segments(tokens, tokenizer.beginning, tokenizer.begins_with)


def packed_text(name: str, documents: Sequence[Document], tokenizer: Tokenizer, seqlen: int) -> Packed:
    """Tokenize and pack the documents of a source. Raises CalibrationError for segments that hold no text."""
    if seqlen <= len(tokenizer.beginning):
        raise CalibrationError(
            f"segments of {seqlen} tokens hold nothing but {tokenizer.begins_with}, with which each begins; --seqlen "
            f"must be at least {len(tokenizer.beginning) + 1}"
        )
    tokens = tokenizer.documents(documents)
    segments = list(packed(tokens, seqlen, tokenizer.beginning))
    stacked = torch.stack(segments) if segments else torch.empty(0, seqlen, dtype=torch.int64)
    return Packed(name, stacked, sum(map(len, tokens)), len(tokens))


def _too_short(text: Packed, samples: int, seqlen: int, tokenizer: Tokenizer, alone: bool) -> CalibrationError:
    """The error for a source with too few segments, with the options with which it would have enough."""
    front = len(tokenizer.beginning)
    ways = ["take a longer text"]
    if alone:
        shorter = text.tokens // samples + front
        ways += [f"--samples {len(text.segments)}"] if len(text.segments) else []
        ways += [f"--seqlen {shorter}"] if text.tokens >= samples else []
    else:
        ways += ["fewer --samples", "a shorter --seqlen", "a smaller share of it"]
    return CalibrationError(
        f"{samples} segments of {seqlen} tokens need {samples * (seqlen - front)} tokens{beside(tokenizer)}, but "
        f"{text.describe()}; {', or '.join(ways)}"
    )


def beside(tokenizer: Tokenizer) -> str:
    """The tokens in front of each segment, for errors."""
    return f" beside the {tokenizer.begins_with} with which each begins" if tokenizer.beginning else ""
