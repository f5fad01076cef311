"""The dimensions of Llama models, real ones by their names, and the tensors that they have."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bitwright.checkpoint.header import TensorEntry
from bitwright.core.decoder import Decoder
from bitwright.core.errors import UserError

SMALLEST_VOCABULARY = 256 + 2


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama model; ``positions`` in tokens. Raises UserError for what no Llama model can have."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    positions: int = 4096
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        """Check the dimensions against each other."""
        for name in ("hidden", "mlp", "layers", "heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.hidden % (2 * self.heads):
            raise UserError(
                f"--hidden {self.hidden} does not divide into {self.heads} heads of an even width; try a multiple of "
                f"{2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} heads cannot share {self.kv_heads} kv heads evenly; give --kv-heads too")
        if self.vocab < SMALLEST_VOCABULARY:
            raise UserError(f"--vocab is {self.vocab}; 256 bytes and two special tokens take {SMALLEST_VOCABULARY}")

    def tensors(self, dtype: torch.dtype) -> Iterator[TensorEntry]:
        """Name, dtype and shape of every tensor, in the order in which the model uses them."""
        decoder = Decoder(
            model_type="llama",
            blocks=self.layers,
            hidden=self.hidden,
            intermediate=self.mlp,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            vocabulary=self.vocab,
            tied=self.tied,
        )
        for name, shape in decoder.tensors.items():
            yield TensorEntry(name, dtype, shape)


SIZES = {
    "tiny": Shape(128, 384, 2, 4, 2, 512, tied=False),
    "1B": Shape(2048, 8192, 16, 32, 8, 128256, tied=True, positions=131072, rope_theta=500000.0),
    "1.1B": Shape(2048, 5632, 22, 32, 4, 32000, tied=False, positions=2048),
    "3B": Shape(3072, 8192, 28, 24, 8, 128256, tied=True, positions=131072, rope_theta=500000.0),
    "7B": Shape(4096, 11008, 32, 32, 32, 32000, tied=False),
    "70B": Shape(8192, 28672, 80, 64, 8, 32000, tied=False),
}
