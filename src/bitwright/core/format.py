"""The contract of a format: what it holds, and how a quantized model becomes somebody's files and is read again.

A file in ``formats/`` ends with ``FORMAT``, a ``TensorFormat`` (a folder of safetensors whose config.json describes
them) or a ``FileFormat`` (an engine's own file or folder, made of a finished folder). Everybody else asks ``FORMAT``.
Letters: O output features, I input features, E experts, A and B the sides of an expert's weight.
"""

from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from bitwright.core.engine_file import EngineFile
from bitwright.core.errors import RecipeError
from bitwright.core.grid import Grid, Tile
from bitwright.core.progress import Listener
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described, Difference, WrittenModel
from bitwright.core.scheme import Scheme

Shape = tuple[int, ...]
ReadTensor = Callable[[str], Tensor]
"""A function that reads a tensor by its name."""
ReadRows = Callable[[str, int, int], Tensor]
"""A function that reads rows [start, stop) of a tensor."""


class QuantizedModel(Protocol):
    """A quantized model that can be read linear by linear, whatever format it is in."""

    @property
    def folder(self) -> Path:
        """The folder of the model, which holds its tokenizer too."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json without its quantization_config."""

    @property
    def described(self) -> Described | None:
        """The content of the quantization_config; None if nothing is quantized."""

    @property
    def linears(self) -> Sequence[str]:
        """Names of the quantized linears, without ``.weight``, in the order of the model."""

    @property
    def passed(self) -> Sequence[str]:
        """Names of all other tensors."""

    def read(self, linear: str) -> QTensor:
        """Read a quantized linear."""

    def tensor(self, name: str) -> Tensor:
        """Read another tensor as it is stored."""

    def shape(self, name: str) -> Shape:
        """The shape of a quantized linear [O, I] or of another tensor; only its header is read."""


def typical(model: QuantizedModel) -> str:
    """Choose a quantized linear that is like most: groups along the input, no outliers, if there is such a linear.

    Raises IndexError if nothing is quantized.
    """
    departures = {} if model.described is None else model.described.departures
    rows = {name: departures[name].tile[0] if name in departures else 0 for name in model.linears}
    return min(model.linears, key=lambda name: min(rows[name], 2), default="") or model.linears[0]


@dataclass(frozen=True)
class Foreseen:
    """A quantized model before it is made, or before more than its first linear is read.

    ``linears`` are the shapes, [O, I] or [E, A, B], of the quantized linears; ``passed`` the names of all other
    tensors; ``grid`` and ``tile`` those of the linears, or of the first, None if there are none. ``outlines`` are the
    linears of a folder without their data, by name; empty for a model that is not quantized yet.
    """

    linears: Mapping[str, Shape]
    passed: Collection[str]
    grid: Grid | None
    tile: Tile | None
    outlines: Mapping[str, QTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WriteOptions:
    """How a file format is written.

    ``lossy``: weights whose codes it cannot hold are quantized once more. ``embeddings``: the type of embedding and
    output layer, None for the format's own choice. ``base``: a file of the same format whose metadata are taken.
    ``account``: what goes along of bitwright.json.
    """

    lossy: bool = False
    embeddings: str | None = None
    base: Path | None = None
    account: Mapping[str, Any] = field(default_factory=dict)


def _any_shape(name: str, shape: Shape) -> None:
    """Accept every shape."""


def refuse_stacked(name: str, slices: Sized, format: str = "this format") -> NoReturn:
    """Raise RecipeError for a weight that is fused over experts, in a format whose tensors are two-dimensional."""
    raise RecipeError(
        f"{name}: {format} holds no weight that is fused over {len(slices)} experts. Leave --format out, or take "
        "--format bitwright (transformers loads it after 'import bitwright') or --format dense"
    )


def no_stacks(tensors: Mapping[str, Tensor], name: str, grid: Grid) -> NoReturn:
    """The counterpart of ``refuse_stacked``: there is nothing to decode."""
    raise AssertionError(f"{name}: no such weight was written")


def _no_grid(scheme: Scheme) -> Grid | None:
    return None


def _never(described: Described) -> bool:
    return False


def _loaded_right(config: Mapping[str, Any]) -> str | None:
    """Know of no release that loads a folder wrong."""
    return None


def _as_it_is(scheme: Scheme) -> Scheme:
    return scheme


@dataclass(frozen=True, kw_only=True)
class Format:
    """What every format says of itself.

    ``name`` is what a user writes, ``summary`` says in a line who loads it, ``holds_what`` in words what
    ``holds(grid, tile, outliers)`` answers: whether a linear of this grid and tile, with or without outliers, has a
    place. ``scales`` is the dtype of scales, None if it is the checkpoint's own. ``stored_bytes(shape, scheme, dtype)``
    are the bytes of a weight [O, I] or [E, A, B] without outliers; ``packed_bits``, with the number of outliers as a
    fourth argument, the bits to report if those are fewer. ``check_shape(name, shape)`` raises RecipeError for a weight
    that it does not pack whatever its codes. ``queries_left_out`` is the grid of the queries if the config has no place
    for it. ``weights_only``: the format has no place for quantized activations or a quantized KV cache; Bitwright
    refuses them before ``encode`` is called. ``mixes``: linears may have different schemes. ``models`` are the
    architectures (``model_type``) that it is written for, None for any. ``next_step`` is what a user does with a
    result, with ``{output}`` for its path.
    """

    name: str
    summary: str
    holds: Callable[[Grid, Tile, bool], bool]
    holds_what: str
    stored_bytes: Callable[[Shape, Scheme, torch.dtype], int]
    packed_bits: Callable[[Shape, Scheme, torch.dtype, int], int] | None = None
    scales: torch.dtype | None = None
    check_shape: Callable[[str, Shape], None] = _any_shape
    queries_left_out: Callable[[Scheme], Grid | None] = _no_grid
    weights_only: bool = False
    mixes: bool = True
    models: tuple[str, ...] | None = None
    next_step: str = "bitwright evaluate {output} --text FILE --reference ORIGINAL"

    def stored_bits(self, shape: Shape, scheme: Scheme, dtype: torch.dtype, outliers: int = 0) -> int:
        """Bits that a weight [O, I] or [E, A, B] takes, outliers counted; what the account reports."""
        if self.packed_bits is not None:
            return self.packed_bits(shape, scheme, dtype, outliers)
        return 8 * self.stored_bytes(shape, scheme, dtype)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How folders of a format are read, whoever wrote them.

    ``described`` is what a quantization_config says; it raises CheckpointError for one that is not read. ``shape`` is
    that of a weight, from the shapes of its tensors and, if these do not tell, from what is in them, both by the end of
    the tensor's name. ``read`` makes the QTensor of one linear from its tensors. If only shapes and dtypes are wanted,
    the tensors are on the meta device, without data; then ``read`` must not look at values. ``read_stacked`` makes the
    QTensors of a weight that is fused over experts, one for each expert; it is None if such weights are not read.
    ``cut`` gives the tensors of such a weight with one expert alone, from the names of all, the weight's name, the
    expert's number, and what reads a tensor or rows of it; None if all have to be read.
    ``codes_may_be_weight``: a tensor X.weight may hold codes.
    """

    described: Callable[[Mapping[str, Any]], Described]
    shape: Callable[[Callable[[str], Shape], Callable[[str], Tensor], Grid], Shape]
    read: Callable[[Mapping[str, Tensor], str, Described], QTensor]
    read_stacked: Callable[[Mapping[str, Tensor], str, Grid], list[QTensor]] | None = None
    cut: Callable[[Collection[str], str, int, ReadTensor, ReadRows], dict[str, Tensor]] | None = None
    codes_may_be_weight: Callable[[Described], bool] = _never


@dataclass(frozen=True, kw_only=True)
class TensorFormat(Format):
    """A folder of safetensors: linears encoded one by one, and a quantization_config.

    ``leaves`` are the endings of the names of a weight's tensors; the first is always there. ``codes`` is the one
    that holds packed codes. ``encode(name, weight)`` makes the tensors of a linear, ``decode`` gives the weight [O,
    I] back as it was written. ``encode_stacked(name, slices)`` makes the tensors of a weight that is fused over
    experts, ``name`` as it is called in the checkpoint, from the QTensor [A, B] of each expert, and
    ``decode_stacked`` gives the weight [E, A, B] back; a format that holds no such weights leaves them out. Each
    raises RecipeError for what the format cannot hold. ``config`` is the quantization_config, None if the folder is
    an ordinary model. ``reader`` is None if the format stores no codes. ``loaded_by_transformers``: transformers
    loads such folders, with our plugin or without it. Bitwright reads and dequantizes others. ``wrongly_loaded``
    says, of a quantization_config, what the installed release of transformers does wrong, None if nothing is known.
    """

    leaves: tuple[str, ...]
    codes: str
    encode: Callable[[str, QTensor], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor], str, Grid], Tensor]
    config: Callable[[WrittenModel], dict[str, Any] | None]
    encode_stacked: Callable[[str, Sequence[QTensor]], dict[str, Tensor]] = refuse_stacked
    decode_stacked: Callable[[Mapping[str, Tensor], str, Grid], Tensor] = no_stacks
    reader: Reader | None = None
    loaded_by_transformers: bool = False
    wrongly_loaded: Callable[[Mapping[str, Any]], str | None] = _loaded_right

    def __post_init__(self) -> None:
        if self.encode_stacked is refuse_stacked:  # a refusal names the format
            object.__setattr__(self, "encode_stacked", partial(refuse_stacked, format=self.name))


@dataclass(frozen=True, kw_only=True)
class FileFormat(Format):
    """An engine's own file or folder, written from a finished folder.

    ``single``: the result is one file, whose name ends in ``suffix``. ``recognizes`` tells whether a path is such a
    file or folder, from outside. ``check`` refuses before the work what cannot be written, ``write`` writes and returns
    what each linear lost, ``open`` reads a result back. ``adapted`` is the scheme on the grid that codes are computed
    against. ``embeddings`` are the types that embedding and output layer may be written in.
    """

    single: bool
    suffix: str
    what: str
    recognizes: Callable[[Path], bool]
    check: Callable[[Mapping[str, Any], Path, WriteOptions, Foreseen | None], None]
    write: Callable[[QuantizedModel, Path, WriteOptions, Listener], list[Difference]]
    open: Callable[[Path], EngineFile]
    adapted: Callable[[Scheme], Scheme] = _as_it_is
    weights_only: bool = True
