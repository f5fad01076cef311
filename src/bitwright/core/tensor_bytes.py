"""The bytes of tensors: as memory to read and write, and as a digest that tells whether they are still the same."""

from collections.abc import Mapping
from hashlib import blake2b
from operator import itemgetter

import torch
from torch import Tensor

DIGEST_BYTES = 16


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, [nbytes]; no copy: writing to them writes to the tensor."""
    # as_strided: a contiguous tensor of one element may have any stride, and then views as no bytes
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The digest of the tensors that one linear is stored as: 32 hexadecimal digits.

    It depends on the last part of each tensor's name, and on dtype, shape and bytes; not on the linear's name, the
    order of the tensors, or the device they are on.
    """
    state = blake2b(digest_size=DIGEST_BYTES)
    leaves = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    for leaf, tensor in sorted(leaves.items(), key=itemgetter(0)):
        state.update(f"{leaf} {tensor.dtype} {list(tensor.shape)}\n".encode())
        state.update(memory_of(tensor.detach().cpu().contiguous()))
    return state.hexdigest()
