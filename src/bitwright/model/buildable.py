"""Whether transformers makes a model of a config.json and its tensors, asked of the original before any work.

A config.json may be wrong (an architecture that is not that of the tensors, a part that is no object), or it may be
that of an architecture that the installed transformers does not know. The first is refused. The second is quantized
all the same, and whether it loads is not seen.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, shown
from bitwright.model.config import read_config
from bitwright.model.view import ModelView, class_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
OWN_CODE = "auto_map"
"""The key of a config.json that names code beside the weights, which Bitwright does not run."""
_COMPARE = "compare it with the original repository's, or download it again"


def require_buildable(checkpoint: Checkpoint, view: ModelView | None) -> None:
    """Raise CheckpointError for a config.json that is wrong; one that transformers does not know passes.

    ``view`` is the model as transformers would build it, if it does.
    """
    where, config = f"{checkpoint.folder}/config.json", checkpoint.config
    if view is not None:
        _require_shapes(checkpoint, view)
    elif wrong := misnamed(config):
        raise CheckpointError(f"{where} says {wrong}; {_COMPARE}")
    elif is_known(config) and OWN_CODE not in config:
        why = _why_not_built(checkpoint)
        if why is not None:
            raise CheckpointError(f"{where}: {why}; {_COMPARE}")


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers knows the architecture that a config.json names."""
    from transformers import CONFIG_MAPPING

    return str(config.get("model_type")) in CONFIG_MAPPING


def misnamed(config: Mapping[str, Any]) -> str | None:
    """Why the ``model_type`` of a config.json can be no architecture's, in words; None if it can be."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return f"model_type {shown(kind)}"
    if not NAME.fullmatch(kind):
        return f"model_type {shown(kind)}, which is no name of an architecture"
    if not is_known(config) and find_spec("transformers.models." + kind.split(".")[0]) is not None:
        return f"model_type {shown(kind)}, which is a part of transformers and no architecture"
    return None


def unseen(config: Mapping[str, Any]) -> str:
    """Why nobody can tell whether a folder with this config.json loads, in words."""
    kind, known = config.get("model_type"), is_known(config)
    if OWN_CODE in config:
        return f"'{kind}' brings code of its own, which Bitwright does not run"
    if known:
        return f"the installed transformers makes no model of this '{kind}'"
    summary, owner = f"transformers does not know '{kind}'", _owner(config)
    if owner is None:
        return summary
    return f"{summary}, and architectures names a class of '{owner}': if that is what it is, say so in config.json"


def _owner(config: Mapping[str, Any]) -> str | None:
    """The architecture of the class that a config.json names; None if transformers has no such class."""
    import transformers

    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    kind = getattr(getattr(transformers, name, None), "config_class", None)
    return getattr(kind, "model_type", None) or None


def is_at_odds(config: Mapping[str, Any]) -> bool:
    """Whether transformers has the class that a config.json names, and it is not the ``model_type``'s: one is wrong."""
    owner = None if OWN_CODE in config else _owner(config)
    return owner is not None and owner != config.get("model_type")


def _why_not_built(checkpoint: Checkpoint) -> str | None:
    """Why transformers makes no model of a config.json whose architecture it knows; None if a package is missing."""
    kind = checkpoint.config.get("model_type")
    try:
        config = read_config(checkpoint.folder)
    except ImportError:
        return None
    except Exception as error:  # transformers validates with several libraries, which have their own exceptions
        return f"transformers knows '{kind}', and cannot read this one: {shown(str(error))}"
    try:
        built = class_of(config)
    except Exception:
        return f"transformers has no causal language model of '{kind}', and architectures names no class of it either"
    if ModelView.of(checkpoint) is not None:
        return None
    try:
        import torch

        with torch.device("meta"):
            built._from_config(config)
    except ImportError:
        return None
    except Exception as error:
        return f"transformers cannot build this {built.__name__}: {type(error).__name__}: {shown(str(error))}"
    return None


def _require_shapes(checkpoint: Checkpoint, view: ModelView) -> None:
    """Raise CheckpointError for a tensor that has another shape than the model that config.json describes."""
    for name in checkpoint.names:
        wanted, shape = view.shapes.get(view.places.get(name, name)), checkpoint.entry(name).shape
        if wanted is not None and name not in view.converted and tuple(shape) != wanted:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json calls for {name} of shape {list(wanted)}, and the file has "
                f"{list(shape)}: config and weights belong to different models; {_COMPARE}"
            )
