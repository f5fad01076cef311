"""How transformers sees a checkpoint: which of its tensors become linears, under which names. No weight is read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.outline import Outline

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelView:
    """``linears`` are the model's, by their names in it, and ``ordinary`` those of no class of their own; ``places`` is
    the parameter that each tensor of the checkpoint becomes, or a part of which it becomes; ``tied``: the output layer
    may be the embedding.

    ``shapes`` are those of all that the model stores, ``needed`` the parameters that no other is tied to;
    ``converted`` are tensors that become part of a parameter, or one of another shape. Tensors that fit a pattern in
    ``ignored`` are not loaded, and nobody minds.
    """

    linears: frozenset[str]
    ordinary: frozenset[str]
    places: Mapping[str, str]
    tied: bool
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()
    converted: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()

    def linear(self, tensor: str) -> str | None:
        """The linear whose weight a tensor becomes; None where it becomes something else, as merged experts do."""
        module = self.places.get(tensor, tensor).removesuffix(".weight")
        return module if module in self.linears else None

    def merges(self, tensor: str) -> bool:
        """Whether a matrix becomes a part of a parameter with another name, together with others."""
        place = self.places.get(tensor, tensor)
        return tensor.endswith(".weight") and not place.endswith(".weight")

    @classmethod
    def of(cls, checkpoint: Checkpoint, names: Iterable[str] | None = None) -> "ModelView | None":
        """The view of an architecture that transformers knows, without remote code; None of any other.

        ``names`` are what the tensors would be called where they are not called as in a checkpoint.
        """
        from transformers import AutoConfig  # takes seconds: what is described does without

        try:
            config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                return cls.of_model(_class(config)._from_config(config), checkpoint.names if names is None else names)
        except Exception:  # whatever a configuration that it does not know makes transformers raise
            return None

    @classmethod
    def of_outline(cls, outline: Outline, checkpoint: Checkpoint) -> "ModelView":
        """The view of an architecture that is described: its linears are ordinary, its parameters called as on disk."""
        linears = frozenset((*outline.linears, outline.family.head))
        needed = frozenset(name for name in outline.shapes if outline.source(name) == name)
        places = {name: name for name in checkpoint.names}
        return cls(linears, linears, places, outline.tied, outline.shapes, needed)

    @classmethod
    def of_model(cls, model: "PreTrainedModel", names: Iterable[str]) -> "ModelView":
        """The view of a model on the meta device; ``names`` are those of the checkpoint's tensors."""
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        special = getattr(model.config, "is_encoder_decoder", False)  # T5 looks at a linear's weight before it uses it
        ordinary = frozenset(name for name, module in linears.items() if type(module) is nn.Linear and not special)
        rename = _renaming(model)
        found = {name: rename(name) for name in names}
        again = frozenset(getattr(model, "all_tied_weights_keys", None) or ())
        return cls(
            linears=frozenset(linears),
            ordinary=ordinary,
            places={name: place for name, (place, _) in found.items()},
            tied=bool(getattr(model.config, "tie_word_embeddings", False)),
            shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
            needed=frozenset(name for name, _ in model.named_parameters()) - again,
            converted=frozenset(name for name, (_, pattern) in found.items() if pattern is not None),
            ignored=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        )


def _class(config: Any) -> Any:
    """The class that the configuration names, else the one for causal language models."""
    import transformers
    from transformers import AutoModelForCausalLM

    named = (getattr(config, "architectures", None) or [""])[0]
    return getattr(transformers, named, None) or AutoModelForCausalLM._model_mapping[type(config)]


def _renaming(model: "PreTrainedModel") -> Callable[[str], tuple[str, str | None]]:
    """What loading makes of a tensor's name, and the pattern of what converts its values, if anything does; the name
    itself where this transformers does not say."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return lambda name: (name, None)
    found = get_model_conversion_mapping(model)
    renamings = [one for one in found if isinstance(one, WeightRenaming)]
    converters = [one for one in found if isinstance(one, WeightConverter)]
    state = dict(model.state_dict())
    return lambda name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)
