"""GGUF, one file for llama.cpp and what is built on it: weights, architecture and tokenizer together.

``weights`` says which codes are held and how, ``blocks`` has the layouts. ``architecture`` and ``tokenizer`` describe
the model, ``base_file`` takes the description from another file. ``model`` and ``file`` write everything. ``header``
and ``reading`` read such a file, ``settings`` compares it with a config.json.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind

from bitwright.core.errors import RecipeError, nearest
from bitwright.core.format import FileFormat, Foreseen, QuantizedModel, WriteOptions
from bitwright.core.grid import Zero
from bitwright.core.progress import Listener, silent
from bitwright.core.quantized import Difference
from bitwright.core.scheme import Scheme
from bitwright.formats import QuantizedFolder
from bitwright.formats.gguf.architecture import KNOWN, Architecture, architecture
from bitwright.formats.gguf.base_file import Base
from bitwright.formats.gguf.blocks import BLOCK, nbytes_of
from bitwright.formats.gguf.file import write_file
from bitwright.formats.gguf.model import EMBEDDINGS, Conversion
from bitwright.formats.gguf.reading import opened
from bitwright.formats.gguf.tokenizer import tokenizer
from bitwright.formats.gguf.weights import HOLDS, holds, kind_of


def recognizes(path: Path) -> bool:
    """Whether a path is a file: GGUF is the only format of a single file."""
    return path.is_file()


def adapted(scheme: Scheme) -> Scheme:
    """The scheme on the grid that codes are computed for if a GGUF file is asked for."""
    if scheme.weight.zero is not Zero.CODE or kind_of(scheme.weight, columns=0) is not Kind.Q4_1:
        return scheme
    return replace(scheme, weight=replace(scheme.weight, zero=Zero.PRODUCT))


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raise RecipeError for a weight whose rows are no whole blocks, or that is fused over experts."""
    if len(shape) > 2:
        raise RecipeError(f"{name}: GGUF is written of weights that are not fused over experts, this is of {shape[0]}")
    if shape[-1] % BLOCK:
        raise RecipeError(
            f"{name} {list(shape)}: {shape[-1]} input features are no multiple of {BLOCK}, the block of GGUF, which "
            "would keep them in 16 bits; compressed-tensors and bitwright take any number"
        )


def check(config: Mapping[str, Any], folder: Path, options: WriteOptions, foreseen: Foreseen | None = None) -> None:
    """Refuse, before the work, what GGUF cannot express.

    That is a model or a tokenizer, a base of another model, options that it does not know, and, unless ``lossy``, rows
    that are no whole blocks and codes that it does not hold. Raises RecipeError, or CheckpointError for files that
    cannot be read and tensors that llama.cpp has no place for.
    """
    if options.embeddings is not None and options.embeddings not in EMBEDDINGS:
        raise RecipeError(f"there are no embeddings '{options.embeddings}'; {nearest(options.embeddings, EMBEDDINGS)}")
    into = architecture(config)
    if foreseen is not None and not options.lossy:
        for name, shape in foreseen.linears.items():
            check_shape(name, shape)
    if options.base is None:
        tokenizer(folder, config, into.decoder.vocabulary)
    conversion = _conversion(QuantizedFolder.open(folder), into, options)
    conversion.require_whole()
    conversion.require_first()


def _conversion(model: QuantizedModel, into: Architecture, options: WriteOptions) -> Conversion:
    """The conversion of a model. Raises RecipeError for a base of another model."""
    conversion = Conversion(model, into, options, None if options.base is None else Base.open(options.base))
    if conversion.base is not None:
        conversion.base.check(into, {tensor.name: tensor.shape for tensor in conversion.tensors()})
    return conversion


def stored_bytes(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> int:
    """The bytes of one linear [O, I] in the file."""
    return nbytes_of(shape, kind_of(scheme.weight, shape[-1]))


def write(model: QuantizedModel, output: Path, options: WriteOptions, listener: Listener = silent) -> list[Difference]:
    """Write a model, quantized or not, as a GGUF file; return what each quantized linear lost.

    One tensor at a time is in memory. Raises RecipeError for what GGUF cannot hold, OutputError for a place that cannot
    be written to.
    """
    into = architecture(model.config)
    conversion = _conversion(model, into, options)
    tensors = conversion.tensors()
    if conversion.base is not None:
        entries = list(conversion.base.entries())
    else:
        tokens = tokenizer(model.folder, model.config, into.decoder.vocabulary)
        entries = [*conversion.general(), *into.entries(), *tokens.entries()]
    write_file(output, into.name, [*entries, *conversion.own(tensors)], tensors, listener)
    return conversion.differences


FORMAT = FileFormat(
    name="gguf",
    summary="llama.cpp and programs built on it",
    holds=holds,
    holds_what=HOLDS,
    stored_bytes=stored_bytes,
    scales=torch.float16,
    models=tuple(KNOWN),
    check_shape=check_shape,
    single=True,
    suffix=".gguf",
    what="a .gguf file",
    recognizes=recognizes,
    check=check,
    write=write,
    open=opened,
    adapted=adapted,
    next_step="llama-cli -m {output} -p PROMPT, or any other program on llama.cpp",
)
