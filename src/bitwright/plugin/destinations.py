"""The place of each tensor of a folder in a model, taken from transformers' own functions.

Experts that are separate in a folder go into one parameter, and old names become new ones. Transformers' conversions
describe both, and are used here, so no rule is written twice.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass(frozen=True)
class Destination:
    """The tensor of the model for a tensor of the folder, and the converter and pattern that lead to it.

    ``converter`` is None if the tensor is at most renamed; ``target`` is the first of several.
    """

    target: str
    converter: WeightConverter | None = None
    pattern: str | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """All tensors of the model that the converter makes."""
        if self.converter is None:
            return (self.target,)
        first, *_ = patterns = self.converter.target_patterns
        return tuple(self.target.replace(first, pattern) for pattern in patterns)


class Destinations:
    """The destinations of tensors in a model, by its conversions; model and conversions stay unchanged."""

    def __init__(self, model: PreTrainedModel, conversions: Iterable[Any]) -> None:
        """Take the ``conversions`` that transformers hands to a quantizer."""
        own = deepcopy(list(conversions))  # transformers marks a conversion as used when it is asked
        self._renamings = [c for c in own if isinstance(c, WeightRenaming)]
        self._converters = [c for c in own if isinstance(c, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._state, self._prefix = model.state_dict(), model.base_model_prefix

    def of(self, name: str) -> Destination | None:
        """The destination of a tensor of this name; None if the model has no place for it."""
        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if target not in self._state and name in self._state:
            target, pattern = rename_source_key(name, [], [], self._prefix, self._state)
        if target not in self._state:
            return None
        return Destination(target, None if pattern is None else self._by_pattern[pattern], pattern)

    def renamed(self, name: str) -> str:
        """A tensor's name as the converters see it."""
        return str(rename_source_key(name, self._renamings, [])[0])

    def converted(self, name: str) -> bool:
        """Whether a converter takes a tensor of this name."""
        return rename_source_key(name, self._renamings, self._converters)[1] is not None

    @property
    def certain(self) -> bool:
        """Whether ``Destination.targets`` is sure to be complete; it is not if names are built from parts."""
        several = (c.target_patterns for c in self._converters if len(c.target_patterns) > 1)
        return not any(re.search(r"\\\d", pattern) for patterns in several for pattern in patterns)
