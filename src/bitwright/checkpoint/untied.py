"""Whether an output layer is one of its own, although config.json says that it is the embedding.

Transformers ties the two only if one of them is missing or both are equal; otherwise it keeps both
(``PreTrainedModel.tie_weights``, since 5.0). Engines that follow config.json would drop the output layer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from bitwright.core.panels import row_panels

if TYPE_CHECKING:
    from bitwright.checkpoint.reader import Checkpoint

TIED = "tie_word_embeddings"
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")


def is_untied(checkpoint: "Checkpoint") -> bool:
    """Whether output layer and embedding are both there, of one shape, with different values.

    Both are read, up to the first difference.
    """
    heads, embeddings = _outside(checkpoint.names, HEADS), _outside(checkpoint.names, EMBEDDINGS)
    if len(heads) != 1 or len(embeddings) != 1:
        return False
    head, embedding = heads[0], embeddings[0]
    shape = checkpoint.entry(head).shape
    if shape != checkpoint.entry(embedding).shape or len(shape) != 2:
        return False
    return any(
        not torch.equal(*(checkpoint.read_slice(name, rows.start, rows.stop).float() for name in (head, embedding)))
        for rows in row_panels(shape)
    )


def _outside(names: Sequence[str], ends: tuple[str, ...]) -> list[str]:
    """The names with one of these ends that belong to no numbered block."""
    return [name for name in names if name.endswith(ends) and not any(part.isdecimal() for part in name.split("."))]
