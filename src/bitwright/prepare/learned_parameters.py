"""Learned parameters as files, as OmniQuant's model zoo keeps them: to quantize again without training.

A safetensors file: ``BLOCK/GROUP/NAME`` (``model.layers.0/lwc.a/self_attn.q_proj``), and as metadata the scheme, the
method and what identifies the model.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import RecipeError
from bitwright.core.scheme import Allocation
from bitwright.core.small_files import require_regular
from bitwright.prepare.allocation_rules import HEAD

ALLOCATION = "allocation_sha256"


def belonging(checkpoint: Checkpoint, allocation: Allocation, method: str, sites: str) -> dict[str, str]:
    """What parameters belong to; ``sites`` names the sites of their transforms.

    An allocation is named if any linear of a block has another scheme than the default, or none.
    """
    weights = {k: v for k, v in checkpoint.fingerprint().items() if k != "config.json"}
    digest = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
    owner = {"scheme": str(allocation.default), "method": method, "sites": sites, "model_sha256": digest}
    unlike = {name: str(scheme) for name, scheme in allocation.schemes.items() if name != HEAD}
    if not unlike:
        return owner
    return owner | {ALLOCATION: hashlib.sha256(json.dumps(unlike, sort_keys=True).encode()).hexdigest()}


def saved_for(path: Path) -> dict[str, str]:
    """What the parameters in a file belong to; nothing for a file that is none."""
    try:
        require_regular(path, RecipeError)
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


class LearnedParameters:
    """The parameters in a file; ``learned(block)`` gives those of a block, none if training kept its start."""

    def __init__(self, path: Path, wanted_by: Mapping[str, str]) -> None:
        """Read what the file was saved for.

        Raises RecipeError for a file that is none, or was saved for another model, scheme, method, sites or allocation.
        """
        try:
            require_regular(path, RecipeError)
            with safe_open(path, framework="pt") as file:
                saved, self._names = file.metadata() or {}, list(file.keys())
        except (OSError, SafetensorError) as error:
            raise RecipeError(
                f"{path} cannot be read as learned parameters: {error}; --save-parameters makes such a file"
            ) from None
        for key, wanted in wanted_by.items():
            if key != ALLOCATION and saved.get(key) != wanted:
                raise RecipeError(
                    f"{path} was saved for {key.removesuffix('_sha256')} {_shown(saved.get(key))}, this run is for "
                    f"{_shown(wanted)}; load it with what it was saved with, or train anew"
                )
        if saved.get(ALLOCATION) != wanted_by.get(ALLOCATION):
            raise RecipeError(
                f"{path} was saved for another allocation: linears have other schemes in this run, or stay in full "
                "precision; load it with the --scheme-for, --exclude and --allocation it was saved with, or train anew"
            )
        self.path = path

    def __call__(self, block: str) -> Mapping[str, Tensor]:
        """Parameters by ``group/name``."""
        prefix = f"{block}/"
        with safe_open(self.path, framework="pt") as file:
            return {n.removeprefix(prefix): file.get_tensor(n) for n in self._names if n.startswith(prefix)}

    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def _shown(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) < 40 else f"{value[:12]}..."
