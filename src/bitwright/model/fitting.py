"""Hold the sizes that a config.json states against the tensors that are there, before anything of a size is built.

transformers builds what a config.json asks for: a million layers, or a table of labels of any length.
``require_possible`` and ``require_fitting`` look at the JSON before transformers does; ``built_within`` stops
transformers once it has built far more than the files hold.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registration

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, shown
from bitwright.model.possible_values import UNREAD, numbers, require_possible_values

HIDDEN, LAYERS = ("hidden_size", "n_embd", "d_model"), ("num_hidden_layers", "n_layer", "n_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads")
MORE_LAYERS = re.compile(r"nextn|mtp")
"""Keys with a number of blocks that stand behind those of ``LAYERS``."""
SHARED_LAYERS = re.compile(r"hidden_groups|_cycles$")
"""Keys of models that go through the same blocks several times, and count each time as a block."""
COUNT_OF_LAYERS = re.compile(r"(layers?|depths?|blocks|stages|n_block)$")
COUNT_OF_EXPERTS = re.compile(r"expert")
POSITIONS = re.compile(r"position|n_ctx|seq_?len|context")
LENGTHS = re.compile(r"max_length|window|chunk|budget|tokens|duration|samples?|rate|freq|param")
"""Numbers of positions, for which tables may be built, and numbers of which nothing is built."""
SIZE = re.compile(r"size|(^|_)n(um)?_|dim|layers|heads|hidden")
NO_SIZES = re.compile(
    r"(_ids?|_index|_idx|seed|theta|base|version|dtype|factor|scale|scaling|_start|_end|_token)$|rope"
)
MOST_NUMBER, MOST_LENGTH = 2**53, 2**26
"""The largest number of any kind, and the most positions; the longest context that is known is 10,485,760."""
SMALL, SMALL_LAYERS, SMALL_EXPERTS = 2**16, 256, 1024
"""Sizes that take no memory to speak of, whether tensors have them or not: parts of a model may be left out."""
PACKED = 16
"""The most codes in an element of a packed tensor: 32 bits of 2 bits each."""
ROOM_ELEMENTS, ROOM_MODULES = 2**27, 20_000
"""What a model may have beside what the files hold: computed buffers, a tower for images that was left out."""
NUMBERED = re.compile(r"^(.*?)(?:^|\.)(\d{1,9})\.")
_COMPARE = (
    "config and weights belong to different models: compare it with the original repository's, or download both again"
)


def require_fitting(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for sizes that ``require_possible`` refuses, and for a main size that no tensor has.

    Main sizes are hidden size, number of blocks and number of heads of the language model.
    """
    known, text = _possible(checkpoint), checkpoint.config.get("text_config")
    for part in (checkpoint.config, text if isinstance(text, dict) else {}):
        _check_main(checkpoint, part, known)


def require_possible(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a config.json that nobody could build or compute with.

    Its sizes are far beyond those of the tensors, or it has values that are no numbers to compute with.
    """
    _possible(checkpoint)


def _possible(checkpoint: Checkpoint) -> "_Known":
    config, known = checkpoint.config, _Known(checkpoint)
    require_possible_values(config, f"{checkpoint.folder}/config.json")
    for place, key, value in _whole_numbers(config):
        if why := known.objection(key, value):
            raise _unfit(checkpoint, place, value, why)
    for place, count in _lengths(config):
        if count > max(SMALL, len(checkpoint.names), known.largest):
            raise _unfit(checkpoint, place, f"a list of {count:,} values", f"more than any of {known}")
    return known


class _Known:
    """What the tensors of a checkpoint tell of sizes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        shapes = checkpoint.shapes
        self.tensors, self.sizes = len(shapes), {size for shape in shapes.values() for size in shape}
        self.widths = {size for name, shape in shapes.items() if ".weight" in name for size in shape}
        self.largest, self.experts = max(self.sizes, default=0), 0
        blocks: defaultdict[str, set[int]] = defaultdict(set)
        for name, shape in shapes.items():
            if outer := NUMBERED.match(name):
                blocks[outer[1]].add(int(outer[2]))
            if (
                len(shape) == 3
                or "expert" in name
                or "router" in name
                or name.endswith(("gate.weight", "gate.wg.weight"))
            ):
                number = NUMBERED.match(name.rpartition("experts.")[2]) if "experts." in name else None
                self.experts = max(self.experts, shape[0] if shape else 0, int(number[2]) + 1 if number else 0)
        self.blocks = {count for numbers in blocks.values() for count in (len(numbers), max(numbers) + 1)}

    def __str__(self) -> str:
        return f"the {self.tensors:,} tensors, whose largest dimension is {self.largest:,}"

    def objection(self, key: str, value: int) -> str:
        """Why a number cannot be; "" if it can."""
        if abs(value) > MOST_NUMBER:
            return f"more than any size of any model, and than any of {self}"
        if NO_SIZES.search(key):
            return ""
        if value < -1 and SIZE.search(key):
            return "less than nothing"
        if COUNT_OF_LAYERS.search(key) and value > max(SMALL_LAYERS, self.tensors):
            return f"more layers than there are tensors ({self.tensors:,})"
        if (
            COUNT_OF_EXPERTS.search(key)
            and "size" not in key
            and value > max(SMALL_EXPERTS, self.experts, *self.blocks)
        ):
            return f"more experts than any of {self} has"
        if POSITIONS.search(key):
            return "more positions than any model has" if value > MOST_LENGTH else ""
        if LENGTHS.search(key):
            return ""
        most = max(SMALL, self.largest * PACKED, self.tensors)
        return f"which is far more than any of {self}" if value > most else ""


def _check_main(checkpoint: Checkpoint, config: Mapping[str, Any], known: _Known) -> None:
    """Check the numbers of the language model itself: those that are stated have to fit."""
    for keys, least in ((HIDDEN, 1), (LAYERS, 1), (HEADS, 1)):
        for key in (key for key in keys if config.get(key) is not None):
            value = config[key]
            if not isinstance(value, list) and (type(value) is not int or value < least):
                raise _unfit(checkpoint, key, value, f"and it has to be a whole number, {least} or more")
    hidden = next((config[key] for key in HIDDEN if isinstance(config.get(key), int)), None)
    if hidden is not None and known.widths and not _is_a_size(hidden, known, checkpoint):
        raise _unfit(checkpoint, "hidden_size", hidden, "and no tensor has that size")
    layers = next((config[key] for key in LAYERS if isinstance(config.get(key), int)), None)
    more = sum(n for key, n in config.items() if MORE_LAYERS.search(key) and type(n) is int and 0 < n < SMALL_LAYERS)
    shared = any(SHARED_LAYERS.search(key) or ("share" in key and config[key] is True) for key in config)
    if (
        layers is not None
        and known.blocks
        and not shared
        and not any(layers <= n <= layers + more for n in known.blocks)
    ):
        counts = ", ".join(map(str, sorted(known.blocks)[:8]))
        raise _unfit(checkpoint, "num_hidden_layers", layers, f"and the tensors' names number {counts} blocks")


def _is_a_size(hidden: int, known: _Known, checkpoint: Checkpoint) -> bool:
    """Whether a tensor has this size; in a quantized folder, it may be packed."""
    divisors = (1, 2, 4, 8, 16) if checkpoint.config.get("quantization_config") else (1,)
    return any(hidden // divisor in known.widths for divisor in divisors)


def _unfit(checkpoint: Checkpoint, key: str, value: Any, why: str) -> CheckpointError:
    stated = value if isinstance(value, str) else shown(value)
    return CheckpointError(f"{checkpoint.folder}/config.json says {stated} for {key}, {why}; {_COMPARE}")


def _whole_numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yield place, key and value of each whole number, and of floats too large to be anything else."""
    for place, key, value in numbers(config):
        if isinstance(value, int) or (value.is_integer() and abs(value) > MOST_NUMBER):
            yield place, key, int(value)


def _lengths(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield place and length of each list."""
    waiting: list[tuple[str, Any]] = [(str(key), value) for key, value in config.items() if key not in UNREAD]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, list | dict):
            yield place, len(value)
            inner = value.values() if isinstance(value, dict) else value
            waiting += [(place, item) for item in inner if isinstance(item, list | dict)]


@contextmanager
def built_within(checkpoint: Checkpoint) -> Iterator[None]:
    """A context in which a model is built. Raises CheckpointError once it is far larger than what the files hold."""
    entries = [checkpoint.entry(name) for name in checkpoint.names]
    held = sum(entry.elements * (1 if entry.dtype.is_floating_point else PACKED) for entry in entries)
    most_elements, most_modules = 4 * held + ROOM_ELEMENTS, 4 * len(entries) + ROOM_MODULES
    sizes, modules, elements = dict[tuple[int, str], int](), 0, 0

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{checkpoint.folder}/config.json describes a model of more than {what}, and the weight files hold "
            f"{held:,} in {len(entries):,} tensors; {_COMPARE}"
        )

    def count_module(_: nn.Module, name: str, __: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > most_modules:
            raise refuse(f"{most_modules:,} modules")

    def count_tensor(owner: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal elements
        place = (id(owner), name)
        if tensor is not None:
            elements += tensor.numel() - sizes.get(place, 0)
            sizes[place] = tensor.numel()
        if elements > most_elements:
            raise refuse(f"{most_elements:,} weights")

    handles = [
        registration.register_module_module_registration_hook(count_module),
        registration.register_module_parameter_registration_hook(count_tensor),
        registration.register_module_buffer_registration_hook(count_tensor),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
