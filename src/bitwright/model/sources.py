"""Where the parameters of transformers' model come from in a checkpoint, by transformers' own conversions.

Most parameters are one tensor of the checkpoint, perhaps under another name. Some are made of several, such as the
experts of a layer, or several are made of one. Which rows of which tensor become which rows of which parameter is found
by converting tensors of row numbers.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.block import Place
from bitwright.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLUMNS = 2
"""Columns of a tensor of row numbers: the fewest that show whether it is transposed."""


@dataclass(frozen=True)
class Made:
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
        self.made: dict[str, Made] = {}
        targets: dict[str, dict[str, str | None]] = {}
        names = _Names(model)
        for tensor in sorted(checkpoint.names, key=_naturally):
            target, pattern = names.renamed(tensor)
            if target in names.state:
                targets.setdefault(target, {})[tensor] = pattern
        for target, tensors in targets.items():
            first = next(iter(tensors.values()))
            converter = None if first is None else names.by_pattern[first]
            made = Made(target, names.all_targets(target, converter), tensors, converter)
            self.made |= dict.fromkeys(made.parameters, made)
        shared = getattr(model, "all_tied_weights_keys", None) or {}
        self.tied = {name: other for name, other in shared.items() if name not in self.made}

    def tensors(self, parameter: str) -> tuple[str, ...]:
        """The tensors that a parameter is made of; none if the checkpoint lacks it."""
        made = self.made.get(self.tied.get(parameter, parameter))
        return () if made is None else tuple(made.tensors)

    def whole(self, parameter: str) -> str | None:
        """The tensor that a parameter is as a whole, with the same values; None if it is made in another way."""
        made = self.made.get(parameter)
        return next(iter(made.tensors)) if made is not None and made.converter is None else None

    def read(self, parameter: str) -> Tensor:
        """Read a parameter on the CPU, in the dtype of the checkpoint. Raises CheckpointError."""
        parameter = self.tied.get(parameter, parameter)
        made = self.made.get(parameter)
        if made is None:
            raise CheckpointError(
                f"{self.checkpoint.folder} has no tensor for '{parameter}', which its config.json calls for; the "
                "checkpoint is incomplete or belongs to another configuration: download it again"
            )
        if made.converter is None:
            return self.checkpoint.read(next(iter(made.tensors)))
        return self._converted(made, {name: self.checkpoint.read(name) for name in made.tensors})[parameter]

    def read_all(self, parameters: Iterable[str]) -> dict[str, Tensor]:
        """Read parameters; what one conversion makes is converted once."""
        wanted, read = list(dict.fromkeys(parameters)), dict[str, Tensor]()
        for name in wanted:
            if name in read:
                continue
            made = self.made.get(name)
            if made is None or made.converter is None:
                read[name] = self.read(name)
            else:
                together = self._converted(made, {tensor: self.checkpoint.read(tensor) for tensor in made.tensors})
                read |= {other: tensor for other, tensor in together.items() if other in wanted}
        return read

    def places(self, parameter: str) -> dict[tuple[str, int | None], tuple[Place, ...]]:
        """The places of every matrix of the checkpoint that the conversion of a parameter reads.

        A matrix is a tensor, or an expert in a tensor [E, ., .]; orders of rows and columns are as the checkpoint has
        them. Matrices that are not found again, row by row, are left out.
        """
        made = self.made[parameter]
        if made.converter is None:
            (tensor,) = made.tensors
            return _as_stored(parameter, tensor, self.checkpoint.entry(tensor).shape)
        return self._numbered[made.target]

    @cached_property
    def _numbered(self) -> "_Numbered":
        return _Numbered(self)

    def _converted(self, made: Made, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make parameters of tensors. Raises CheckpointError if they do not go together."""
        converter = deepcopy(made.converter)
        for name, tensor in tensors.items():
            # it takes tensors as well as futures, because transformers also saves models with it
            converter.add_tensor(made.target, name, made.tensors[name], tensor)
        try:
            result = converter.convert(made.target, model=self.model, config=self.model.config)
        except Exception as error:  # an operation may raise anything, for instance for experts that differ in shape
            raise CheckpointError(
                f"{self.checkpoint.folder}: the tensors of {made.target} do not go together: {error}; download the "
                "checkpoint again"
            ) from error
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in result.items()}


class _Numbered(dict[str, dict[tuple[str, int | None], tuple[Place, ...]]]):
    """The places of matrices by the conversion's target, found by converting row numbers."""

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self.sources = sources

    def __missing__(self, target: str) -> dict[tuple[str, int | None], tuple[Place, ...]]:
        self[target] = _found_again(self.sources, self.sources.made[target])
        return self[target]


def _found_again(sources: Sources, made: Made) -> dict[tuple[str, int | None], tuple[Place, ...]]:
    entry, firsts, numbers = sources.checkpoint.entry, dict[int, tuple[str, int | None, int]](), dict[str, Tensor]()
    count = 0
    for name in made.tensors:
        *experts, rows, _ = shape = entry(name).shape if len(entry(name).shape) > 1 else (0, 0)
        if len(shape) > 3 or not rows:
            return {}
        for expert in range(experts[0]) if experts else (None,):
            firsts[count + rows * (expert or 0)] = (name, expert, rows)
        total = rows * (experts[0] if experts else 1)
        column = torch.arange(count, count + total, dtype=torch.int64).reshape(*experts, rows, 1)
        numbers[name] = torch.cat([column * COLUMNS + c for c in range(COLUMNS)], -1)
        count += total
    try:
        converted = sources._converted(made, numbers)
    except CheckpointError:
        return {}
    homes = torch.full((count,), -1, dtype=torch.int64)
    homes[list(firsts)] = torch.arange(len(firsts))
    homes = homes.cummax(0).values  # the matrix that each row number belongs to
    every, found = list(firsts.values()), dict[tuple[str, int | None], list[tuple[int, Place]]]()
    for parameter, values in converted.items():
        for index in range(len(values)) if values.dim() == 3 else (None,):
            matrix = values if index is None else values[index]
            if matrix.dim() != 2 or COLUMNS not in matrix.shape:
                return {}
            transposed = matrix.shape[1] != COLUMNS or int(matrix[0, -1] - matrix[0, 0]) != 1
            ids = (matrix.T if transposed else matrix)[:, 0] // COLUMNS
            for home in homes[ids].unique_consecutive().tolist() if homes[ids].unique().numel() < len(ids) else []:
                name, expert, rows = every[home]
                at = (homes[ids] == home).nonzero().flatten()
                step = int(at[1] - at[0]) if len(at) > 1 else 1
                numbered = ids[at] - ids[at].min()
                in_order = bool((numbered == torch.arange(len(at))).all()) and bool((at.diff() == step).all())
                if not in_order:
                    return {}
                start = int(at[0])
                place = Place(parameter, index, (start, start + (len(at) - 1) * step + 1, step), transposed)
                first = int(ids[at[0]]) - list(firsts)[home]
                places = found.setdefault((name, expert), [])
                if (first, place) not in places:
                    places.append((first, place))
    complete = {}
    for (name, expert), placed in found.items():
        placed.sort(key=lambda pair: pair[0])
        if sum(len(range(*place.rows)) for _, place in placed) == entry(name).shape[-2]:
            complete[name, expert] = tuple(place for _, place in placed)
    return complete


def _as_stored(parameter: str, tensor: str, shape: tuple[int, ...]) -> dict[tuple[str, int | None], tuple[Place, ...]]:
    if len(shape) == 3:
        return {(tensor, expert): (Place(parameter, expert, (0, shape[1], 1)),) for expert in range(shape[0])}
    return {(tensor, None): (Place(parameter, None, (0, shape[0], 1)),)} if len(shape) == 2 else {}


class _Names:
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

    def all_targets(self, target: str, converter: Any) -> tuple[str, ...]:
        """All parameters that a conversion makes."""
        if converter is None or len(converter.target_patterns) == 1:
            return (target,)
        first, *_ = converter.target_patterns
        return tuple(target.replace(first, pattern) for pattern in converter.target_patterns)


def _naturally(name: str) -> tuple[tuple[int, int, str], ...]:
    """Order names by the numbers in them, as transformers does before it converts."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("."))
