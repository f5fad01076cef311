"""The contract of a method: which decisions it takes, whether it needs text, and the callable that takes them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitwright.core.block import Block
from bitwright.core.decisions import BlockDecisions, Decision
from bitwright.core.scheme import Scheme


@dataclass(frozen=True)
class Activations:
    """A block's inputs: on the full-precision path, and as the already quantized blocks produce them."""

    reference: Float[Tensor, "N T D"]
    quantized: Float[Tensor, "N T D"]


@dataclass(frozen=True)
class Context:
    """What a method sees besides the block: the scheme, the dtype scales are stored in, and the activations."""

    scheme: Scheme
    scale_dtype: torch.dtype
    activations: Activations | None = None


@dataclass(frozen=True)
class Method:
    """A closed method: a function from a block and what is decided so far to new decisions."""

    decides: frozenset[Decision]
    decide: Callable[[Block, Context, BlockDecisions], BlockDecisions]
    needs_text: bool = False
