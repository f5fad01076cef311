"""Transformers' view of a checkpoint: which tensors become linears, and under which names. It reads no weight."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.block import Outline
from bitwright.core.errors import CheckpointError
from bitwright.model.config import read_config, without_hub_kernels
from bitwright.model.fitting import built_within, require_possible
from bitwright.model.sources import Names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelView:
    """A model as transformers would build it, with the places of a checkpoint's tensors in it.

    ``linears`` are the names of the model's linears, ``ordinary`` those of plain ``nn.Linear`` modules. ``places`` maps
    a tensor of the checkpoint to the parameter that it becomes, or becomes a part of. If ``tied``, the output layer may
    be the embedding. ``shapes`` are the shapes of everything that the model stores; ``needed`` are the parameters that
    are not tied to another. ``converted`` are tensors that become part of a parameter, or a parameter of another shape.
    ``parts`` maps a tensor that becomes several parameters to all of them. Tensors that fit a pattern in ``ignored``
    are not loaded, and need not be there.
    """

    linears: frozenset[str]
    ordinary: frozenset[str]
    places: Mapping[str, str]
    tied: bool
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()
    converted: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def filled(self, tensor: str) -> tuple[str, ...]:
        """All parameters that a tensor becomes, or becomes a part of."""
        return self.parts.get(tensor) or (self.places.get(tensor, tensor),)

    def linear(self, tensor: str) -> str | None:
        """The linear whose weight a tensor becomes; None if it becomes something else, such as merged experts."""
        module = self.places.get(tensor, tensor).removesuffix(".weight")
        return module if module in self.linears else None

    def stack(self, name: str) -> str:
        """The name of a stack of experts in an unquantized folder: with or without ``.weight``."""
        whole = f"{name}.weight"
        has_place = self.places.get(name, name) in self.shapes or self.places.get(whole, whole) not in self.shapes
        return name if has_place else whole

    def merges(self, tensor: str) -> bool:
        """Whether a matrix becomes, with others, a part of a parameter with another name."""
        place = self.places.get(tensor, tensor)
        return tensor.endswith(".weight") and not place.endswith(".weight")

    def needing_plugin(self, quantized: Mapping[str, str], kept: Iterable[str]) -> tuple[str | None, str | None]:
        """A quantized weight that transformers loads only with our plugin, and one that it loads without if symmetric.

        The first is the weight of a linear with a class of its own, or an expert that transformers merges with others
        of which some are not quantized; the second is any expert that it merges. ``quantized`` are the tensors of
        linears by the linears' names, ``kept`` the tensors that are not quantized. None if there is no such weight.
        """
        modules = {name: self.linear(tensor) for name, tensor in quantized.items()}
        special = [name for name, module in modules.items() if module and module not in self.ordinary]
        merged = [name for name, tensor in quantized.items() if self.merges(tensor)]
        whole = [tensor for tensor in kept if self.merges(tensor)]
        beside = [*merged, *whole] if whole else []
        return next(iter([*special, *beside]), None), next(iter(merged), None)

    @classmethod
    def of(cls, checkpoint: Checkpoint, names: Iterable[str] | None = None) -> "ModelView | None":
        """The view of an architecture that transformers knows, without remote code; None for any other.

        ``names`` are the names that the tensors would have, if they differ from those in the checkpoint. Raises
        CheckpointError if config.json does not fit the tensors.
        """
        require_possible(checkpoint)
        try:
            config = read_config(checkpoint.folder)  # takes seconds, so not for architectures with a description
            with torch.device("meta"), built_within(checkpoint), without_hub_kernels():
                return cls.of_model(class_of(config)._from_config(config), checkpoint.names if names is None else names)
        except CheckpointError:
            raise
        except Exception:  # transformers raises anything for a config that it does not know
            return None

    @classmethod
    def of_outline(cls, outline: Outline, checkpoint: Checkpoint) -> "ModelView":
        """The view of an architecture with a description: its linears are ordinary, its parameters named as on disk."""
        linears = frozenset((*outline.linears, outline.head))
        needed = frozenset(name for name in outline.shapes if outline.source(name) == name)
        places = {name: name for name in checkpoint.names}
        return cls(linears, linears, places, outline.tied, outline.shapes, needed)

    @classmethod
    def of_model(cls, model: "PreTrainedModel", names: Iterable[str]) -> "ModelView":
        """The view of a model on the meta device; ``names`` are those of the checkpoint's tensors."""
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        special = getattr(model.config, "is_encoder_decoder", False)  # T5 looks at a linear's weight before it uses it
        ordinary = frozenset(name for name, module in linears.items() if type(module) is nn.Linear and not special)
        naming = Names(model)
        renamed = {name: naming.destination(name) for name in names}
        tied = frozenset(getattr(model, "all_tied_weights_keys", None) or ())
        return cls(
            linears=frozenset(linears),
            ordinary=ordinary,
            places={name: place for name, (place, _, _) in renamed.items()},
            parts={name: places for name, (_, _, places) in renamed.items() if len(places) > 1},
            tied=bool(getattr(model.config, "tie_word_embeddings", False)),
            shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
            needed=frozenset(name for name, _ in model.named_parameters()) - tied,
            converted=frozenset(name for name, (_, pattern, _) in renamed.items() if pattern is not None),
            ignored=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        )


def with_stacks(stacks: Iterable[str]) -> list[str]:
    """The names that stacks of experts may have in an unquantized folder; ``ModelView.stack`` chooses."""
    return [name for stack in stacks for name in (stack, f"{stack}.weight")]


def class_of(config: Any) -> Any:
    """Choose the class that the config names if it is one of its architecture, else the causal language model's."""
    import transformers
    from transformers import AutoModelForCausalLM

    classes = getattr(config, "architectures", None)
    named = getattr(transformers, str(classes[0]), None) if isinstance(classes, list) and classes else None
    own: Any = getattr(named, "config_class", None)
    if own is not None and own.__module__.rpartition(".")[0] == type(config).__module__.rpartition(".")[0]:
        return named
    return AutoModelForCausalLM._model_mapping[type(config)]
