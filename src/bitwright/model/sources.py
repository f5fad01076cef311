"""The tensors of a checkpoint that each parameter of transformers' model comes from, by its own conversions.

Most parameters are one tensor of the checkpoint, perhaps under another name. Some are made of several, such as the
experts of a layer, or several are made of one. Which rows of which tensor become which rows of which parameter is found
by converting tensors of row numbers.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.block import Place
from bitwright.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATRIX, STACK = 2, 3
"""The dimensions of a matrix, and of a stack of experts."""
COLUMNS = 2
"""Columns of a tensor of row numbers: the fewest that show whether it is transposed."""


@dataclass(frozen=True)
class Conversion:
    """Parameters that one conversion makes from tensors of the checkpoint, with the pattern that each tensor fits.

    ``converter`` is None if the only parameter is the only tensor.
    """

    target: str
    parameters: tuple[str, ...]
    tensors: Mapping[str, str | None]
    converter: Any


class Sources:
    """The tensors behind each parameter of a model."""

    def __init__(self, checkpoint: Checkpoint, model: "PreTrainedModel") -> None:
        """``model`` is on the meta device. Nothing is read."""
        self.checkpoint, self.model = checkpoint, model
        self.conversions: dict[str, Conversion] = {}
        targets: dict[str, dict[str, str | None]] = {}
        names = Names(model)
        for tensor in sorted(checkpoint.names, key=_naturally):
            target, pattern = names.renamed(tensor)
            if target in names.state:
                targets.setdefault(target, {})[tensor] = pattern
        for target, tensors in targets.items():
            first = next(iter(tensors.values()))
            converter = None if first is None else names.by_pattern[first]
            conversion = Conversion(target, names.all_targets(target, converter), tensors, converter)
            self.conversions |= dict.fromkeys(conversion.parameters, conversion)
        shared = getattr(model, "all_tied_weights_keys", None) or {}
        self.tied = {name: other for name, other in shared.items() if name not in self.conversions}

    def tensors(self, parameter: str) -> tuple[str, ...]:
        """The tensors that a parameter is made of; none if the checkpoint lacks it."""
        conversion = self.conversions.get(self.tied.get(parameter, parameter))
        return () if conversion is None else tuple(conversion.tensors)

    def whole(self, parameter: str) -> str | None:
        """The tensor that a parameter is as a whole, with the same values; None if it is made in another way."""
        conversion = self.conversions.get(parameter)
        return next(iter(conversion.tensors)) if conversion is not None and conversion.converter is None else None

    def read(self, parameter: str) -> Tensor:
        """Read a parameter on the CPU, in the dtype of the checkpoint. Raises CheckpointError."""
        parameter = self.tied.get(parameter, parameter)
        conversion = self.conversions.get(parameter)
        if conversion is None:
            raise CheckpointError(
                f"{self.checkpoint.folder} has no tensor for '{parameter}', which its config.json calls for; the "
                "checkpoint is incomplete or belongs to another configuration: download it again"
            )
        if conversion.converter is None:
            return self.checkpoint.read(next(iter(conversion.tensors)))
        return self._converted(conversion, {name: self.checkpoint.read(name) for name in conversion.tensors})[parameter]

    def read_all(self, parameters: Iterable[str]) -> dict[str, Tensor]:
        """Read parameters; what one conversion makes is converted once."""
        wanted, read = list(dict.fromkeys(parameters)), dict[str, Tensor]()
        for name in wanted:
            if name in read:
                continue
            conversion = self.conversions.get(name)
            if conversion is None or conversion.converter is None:
                read[name] = self.read(name)
            else:
                together = self._converted(
                    conversion, {tensor: self.checkpoint.read(tensor) for tensor in conversion.tensors}
                )
                read |= {other: tensor for other, tensor in together.items() if other in wanted}
        return read

    def places(self, parameter: str) -> dict[tuple[str, int | None], tuple[Place, ...]]:
        """The places of every matrix of the checkpoint that the conversion of a parameter reads.

        A matrix is a tensor, or an expert in a tensor [E, ., .]; orders of rows and columns are as the checkpoint has
        them. Matrices that are not found again, row by row, are left out.
        """
        conversion = self.conversions[parameter]
        if conversion.converter is None:
            (tensor,) = conversion.tensors
            return _as_stored(parameter, tensor, self.checkpoint.entry(tensor).shape)
        return self._numbered[conversion.target]

    @cached_property
    def _numbered(self) -> "_Numbered":
        return _Numbered(self)

    def _converted(self, conversion: Conversion, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make parameters of tensors. Raises CheckpointError if they do not go together."""
        converter = deepcopy(conversion.converter)
        for name, tensor in tensors.items():
            # it takes tensors as well as futures, because transformers also saves models with it
            converter.add_tensor(conversion.target, name, conversion.tensors[name], tensor)
        try:
            result = converter.convert(conversion.target, model=self.model, config=self.model.config)
        except Exception as error:  # an operation may raise anything, for instance for experts that differ in shape
            raise CheckpointError(
                f"{self.checkpoint.folder}: the tensors of {conversion.target} do not go together: {error}; download "
                "the checkpoint again"
            ) from error
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in result.items()}


class _Numbered(dict[str, dict[tuple[str, int | None], tuple[Place, ...]]]):
    """The places of matrices by the conversion's target, found by converting row numbers."""

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self.sources = sources

    def __missing__(self, target: str) -> dict[tuple[str, int | None], tuple[Place, ...]]:
        self[target] = _found_again(self.sources, self.sources.conversions[target])
        return self[target]


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the checkpoint whose rows are numbered from ``first`` on."""

    first: int
    tensor: str
    expert: int | None
    rows: int


def _found_again(sources: Sources, conversion: Conversion) -> dict[tuple[str, int | None], tuple[Place, ...]]:
    """Number the rows of all tensors of a conversion, convert the numbers, and look where they have gone."""
    matrices, numbers = list[_Matrix](), dict[str, Tensor]()
    count = 0
    for name in conversion.tensors:
        shape = sources.checkpoint.entry(name).shape
        if not MATRIX <= len(shape) <= STACK:
            return {}
        *experts, rows, _ = shape
        for expert in range(experts[0]) if experts else (None,):
            matrices.append(_Matrix(count, name, expert, rows))
            count += rows
        column = torch.arange(matrices[-1].first + rows - prod(shape[:-1]), count).reshape(*shape[:-1], 1)
        numbers[name] = torch.cat([column * COLUMNS + c for c in range(COLUMNS)], -1)
    try:
        converted = sources._converted(conversion, numbers)
    except CheckpointError:
        return {}
    starts = torch.tensor([matrix.first for matrix in matrices])
    places: dict[int, dict[int, Place]] = {}
    for parameter, values in converted.items():
        for index in range(len(values)) if values.dim() == STACK else (None,):
            own = _in_matrix(parameter, index, values if index is None else values[index], starts)
            if own is None:
                return {}
            for home, first, place in own:
                places.setdefault(home, {})[first] = place
    complete = {}
    for home, placed in places.items():
        matrix = matrices[home]
        if sum(len(range(*place.rows)) for place in placed.values()) == matrix.rows:
            complete[matrix.tensor, matrix.expert] = tuple(placed[first] for first in sorted(placed))
    return complete


def _in_matrix(
    parameter: str, index: int | None, matrix: Tensor, starts: Tensor
) -> list[tuple[int, int, Place]] | None:
    """The places in a matrix of row numbers: (matrix of the checkpoint, its row there, place).

    None if rows are not in their order, or columns are missing.
    """
    if matrix.dim() != MATRIX or COLUMNS not in matrix.shape:
        return None
    transposed = matrix.shape[1] != COLUMNS or int(matrix[0, -1] - matrix[0, 0]) != 1
    rows = (matrix.T if transposed else matrix)[:, 0] // COLUMNS
    homes = torch.searchsorted(starts, rows, right=True) - 1
    places = []
    for home in homes.unique().tolist():
        at = (homes == home).nonzero().flatten()
        step = int(at[1] - at[0]) if len(at) > 1 else 1
        if not (bool((at.diff() == step).all()) and bool((rows[at].diff() == 1).all())):
            return None
        here = (int(at[0]), int(at[-1]) + 1, step)
        places.append((home, int(rows[at[0]] - starts[home]), Place(parameter, index, here, transposed)))
    return places


def _as_stored(parameter: str, tensor: str, shape: tuple[int, ...]) -> dict[tuple[str, int | None], tuple[Place, ...]]:
    if len(shape) == 3:
        return {(tensor, expert): (Place(parameter, expert, (0, shape[1], 1)),) for expert in range(shape[0])}
    return {(tensor, None): (Place(parameter, None, (0, shape[0], 1)),)} if len(shape) == 2 else {}


class Names:
    """The names that transformers gives to tensors as it loads them."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.state, self.prefix = dict(model.state_dict()), model.base_model_prefix
        self.renamings: list[Any] = []
        self.converters: list[Any] = []
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError:  # an early transformers 5
            conversions = []
        else:
            conversions = deepcopy(list(get_model_conversion_mapping(model)))
            self.renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
            self.converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self.by_pattern = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}

    def renamed(self, name: str) -> tuple[str, str | None]:
        """The parameter that a tensor goes to, and the pattern of the converter that changes it."""
        try:
            from transformers.core_model_loading import rename_source_key
        except ImportError:
            return name, None
        place, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.state)
        if place not in self.state and name in self.state:  # a name of the model that a rule for old names fits too
            place, pattern = rename_source_key(name, [], [], self.prefix, self.state)
        return place, pattern

    def destination(self, name: str) -> tuple[str, str | None, tuple[str, ...]]:
        """The parameter that a tensor goes to, the pattern of its converter, and all parameters that this one makes."""
        place, pattern = self.renamed(name)
        return place, pattern, self.all_targets(place, None if pattern is None else self.by_pattern[pattern])

    def all_targets(self, target: str, converter: Any) -> tuple[str, ...]:
        """All parameters that a conversion makes."""
        if converter is None or len(converter.target_patterns) == 1:
            return (target,)
        first, *_ = converter.target_patterns
        return tuple(target.replace(first, pattern) for pattern in converter.target_patterns)


def _naturally(name: str) -> tuple[tuple[int, int, str], ...]:
    """Order names by the numbers in them, as transformers does before it converts."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("."))
