"""Whether a folder has every tensor that it needs, in its shape, and no other.

It is held against an original, and against the architecture that its config.json names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError
from bitwright.core.weight import NO_WEIGHTS
from bitwright.formats import QuantizedFolder
from bitwright.model.config import DIMENSIONS, SETTINGS, apart
from bitwright.model.fitting import require_fitting
from bitwright.model.view import ModelView, with_stacks
from bitwright.verification.findings import Check, first, lacking

Shapes = Mapping[str, tuple[int, ...]]
HEADS = ("lm_head", "embed_out")
"""Output layers that share the embedding's weight if the config says so."""
UNUSED = (*NO_WEIGHTS, "attn.bias", "attention.bias")
"""Endings of the names of tensors that old checkpoints hold and no model reads."""


@dataclass(frozen=True)
class _Wrong:
    """Missing tensors by name, and odd ones in words: in another shape, or of no use."""

    missing: list[str]
    odd: list[str]

    def __str__(self) -> str:
        return lacking(self.missing) or first(self.odd)


def complete(model: QuantizedFolder, original: Shapes | None, by_config: bool = True) -> Check:
    """Check that all tensors that the model needs are there in their shapes, and no others.

    They are those of ``original``, in which nothing is quantized, and, with ``by_config``, those that transformers'
    model of this architecture has.
    """
    there = _there(model)
    wrong, passed = _Wrong([], []), list[str]()
    if original is not None:
        wrong, passed = _beside(model, there, original), [f"all {len(original)} tensors of the original"]
    if by_config and not str(wrong):
        if blocks := _too_many_blocks(model):
            return Check("complete", False, blocks)
        try:
            view = _view(model, there)
            if view is None:
                require_fitting(model.checkpoint)
        except CheckpointError as error:
            return Check("complete", False, str(error))
        if view is not None:
            wrong = _by_architecture(model, there, view)
            passed.append(f"all {len(there)} tensors of the architecture, in their shapes")
        elif original is None:
            return Check(
                "complete", None, "not looked at: transformers does not know this architecture; --against tells"
            )
    return Check("complete", not str(wrong), str(wrong) or "; ".join(passed))


def require_all_tensors(model: QuantizedFolder) -> None:
    """Raise CheckpointError for a tensor that the architecture in config.json needs and the folder lacks.

    Tensors that it does not use do no harm, and architectures that transformers does not know pass.
    """
    there, wrong = _there(model), _too_many_blocks(model)
    if wrong is None:
        require_fitting(model.checkpoint)
    if wrong is None and (view := _view(model, there)) is not None:
        wrong = lacking(_by_architecture(model, there, view).missing)
    if wrong:
        raise CheckpointError(f"{model.folder}: {wrong}; the folder is damaged, download or quantize it again")


def require_same_model(model: QuantizedFolder, original: Checkpoint) -> None:
    """Raise CheckpointError if a tensor of a folder has another shape in the original: it was made of another."""
    if (how := original.config.get("quantization_config")) is not None:
        method = how.get("quant_method", "?") if isinstance(how, dict) else "?"
        raise CheckpointError(f"{original.folder} is quantized itself ({method}); --against takes the original")
    for name, shape in _there(model).items():
        if name in original and original.entry(name).shape != shape:
            theirs = original.entry(name).shape
            settings = apart(model.config, original.config)
            raise CheckpointError(
                f"{original.folder} is another model than {model.folder} was made of: {name} is {list(theirs)} there "
                f"and {list(shape)} here{f'; config.json: {settings}' if settings else ''}. Name the original with "
                f"--against; if that is the original, {model.folder} is damaged"
            )


def settings(model: QuantizedFolder, original: Checkpoint) -> Check:
    """Check that a folder computes with its weights as the original does with its own, as far as both say."""
    unlike = apart(model.config, original.config, (*DIMENSIONS, *SETTINGS))
    return Check("settings", not unlike, unlike or "those of the original's config.json")


def is_another(model: QuantizedFolder, original: Checkpoint) -> bool:
    """Whether config.json, or a tensor of the original that is not there, tells that this is of another model."""
    here = {_called(name, model, original.shapes) for name in _there(model)}
    return bool(apart(model.config, original.config)) or not here >= set(original.names)


def twice(model: QuantizedFolder) -> list[str]:
    """The linears that are there twice: quantized and in full precision."""
    dense, passed = ".weight", set(model.passed)
    return [
        x
        for x in (*model.linears, *model.stacks)
        if {x, x + dense} & passed or {x + dense, f"{x}.weight_packed"} <= {*model.stored(x)}
    ]


def require_sound_headers(model: QuantizedFolder) -> None:
    """Raise CheckpointError for a linear that is there twice, and for tensors of a linear that do not fit together.

    Only dtypes and shapes are compared, so that little is read.
    """
    if double := twice(model):
        full = next(name for name in (f"{double[0]}.weight", double[0]) if name in model.checkpoint)
        raise CheckpointError(
            f"{model.folder}: {double[0]} is there twice, quantized and in full precision ({full}), and which of them "
            "counts nobody can tell. Remove one of them, or quantize the original again"
        )
    for linear in model.linears:
        model.outline(linear)


def _view(model: QuantizedFolder, there: Shapes) -> ModelView | None:
    return ModelView.of(model.checkpoint, [*there, *with_stacks(model.stacks)])


def _there(model: QuantizedFolder) -> dict[str, tuple[int, ...]]:
    """All shapes by the names in a model that is not quantized. A stack may be called ``X.weight``: see ``_called``."""
    linears = {f"{linear}.weight": model.shape(linear) for linear in model.linears}
    return {name: model.shape(name) for name in (*model.passed, *model.stacks)} | linears


def _beside(model: QuantizedFolder, there: Shapes, original: Shapes) -> _Wrong:
    """Compare with the tensors of the original; an output layer quantized as a copy of the embedding is not odd."""
    here = {_called(name, model, original): shape for name, shape in there.items()}
    missing = sorted(set(original) - set(here))
    odd = [f"{name} is {list(shape)}, the original's {list(original[name])}"
           for name, shape in here.items() if name in original and shape != original[name]]  # fmt: skip
    more = [name for name in here if name not in original and name.removesuffix(".weight") not in HEADS]
    return _Wrong(missing, [*odd, *(f"{words} of the original" for words in _of_no_use(model, more))])


def _by_architecture(model: QuantizedFolder, there: Shapes, view: ModelView) -> _Wrong:
    """Compare with the parameters of the model that config.json describes."""
    stacks = {name: view.stack(name) for name in model.stacks}
    places = {name: view.places[stacks.get(name, name)] for name in there}
    tied = {f"{head}.weight" for head in HEADS} if view.tied else set()
    filled = {place for name in there for place in view.filled(stacks.get(name, name))}
    missing = sorted(view.needed - filled - tied)
    whole = {name: shape for name, shape in there.items() if stacks.get(name, name) not in view.converted}
    odd = [f"{name} is {list(shape)}, config.json calls for {list(view.shapes[places[name]])}"
           for name, shape in whole.items() if view.shapes.get(places[name], shape) != shape]  # fmt: skip
    more = [name for name, place in places.items() if place not in view.shapes
            and not any(re.search(pattern, place) for pattern in view.ignored)]  # fmt: skip
    return _Wrong(missing, [*odd, *(f"{words} of the architecture" for words in _of_no_use(model, more))])


def _called(name: str, model: QuantizedFolder, wanted: Shapes) -> str:
    """The name that is wanted for a tensor: that of a stack may or may not end in ``.weight``."""
    return f"{name}.weight" if name not in wanted and f"{name}.weight" in wanted else name


def _of_no_use(model: QuantizedFolder, names: list[str]) -> Iterator[str]:
    """The tensors that nobody asked for, in words.

    Biases of zeros, which some tools give every linear, change nothing and are left out.
    """
    for name in names:
        zeros = name.endswith(".bias") and name.removesuffix(".bias") in model.linears and not model.tensor(name).any()
        if not zeros and not name.endswith(UNUSED):
            size = f"{list(model.shape(name))}, {model.checkpoint.nbytes(name):,} bytes" if name in model.passed else ""
            yield f"{name}{f' ({size})' if size else ''} is no tensor"


def _too_many_blocks(model: QuantizedFolder) -> str | None:
    """The error of a config.json with more blocks than tensors, found before transformers builds them all."""
    blocks, tensors = model.config.get("num_hidden_layers"), len(model.checkpoint.names)
    if isinstance(blocks, int) and blocks > tensors:
        return f"config.json counts {blocks} blocks (num_hidden_layers), and there are {tensors} tensors in all"
    return None
