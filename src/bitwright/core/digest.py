"""A short name for the bytes of a few tensors: what was stored when they were decided, and is to be there still."""

from collections.abc import Mapping
from hashlib import blake2b
from operator import itemgetter

import torch
from torch import Tensor

SIZE_BYTES = 16


def digest(tensors: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits of the tensors that one linear is stored as.

    The same ending of a name, dtype, shape and bytes of each give the same digits, whatever the linear is called, in
    whatever order they come and wherever they lie.
    """
    found = blake2b(digest_size=SIZE_BYTES)
    leaves = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    for leaf, tensor in sorted(leaves.items(), key=itemgetter(0)):
        found.update(f"{leaf} {tensor.dtype} {list(tensor.shape)}\n".encode())
        stored = tensor.detach().cpu().contiguous()
        # as_strided: a contiguous tensor of one element may have any stride, and then views as no bytes
        found.update(stored.as_strided((stored.numel(),), (1,)).view(torch.uint8).numpy().data)
    return found.hexdigest()
