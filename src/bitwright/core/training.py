"""Settings of training as such. Every learned method brings them along."""

from dataclasses import dataclass

from bitwright.core.settings import Depends, Settings, setting

FEW_BITS = 2


@dataclass(frozen=True)
class Training(Settings):
    """How AdamW, without weight decay, trains the learned methods of a recipe on one block after the other.

    The preset ``paper`` is OmniQuant's (arXiv 2308.13137, section 4.1, and the authors' scripts): 20 epochs at batch 1
    with constant learning rates; 40 epochs and the augmented loss at 2 bits. Ours was measured in
    docs/methods/omniquant.md.

    ``aug_loss`` adds the loss against the full-precision block's output on the quantized stream. ``schedule`` says how
    the learning rate falls over the steps. ``precision`` is what a step's matrix products are computed in; master
    weights, losses and decisions stay in float32.
    """

    epochs: int = setting(
        5,
        "epochs of training",
        least=0,
        bitwright=Depends("5, or 0 if what is learned is refined too", lambda basis: 0 if basis.closed else 5),
        paper=Depends("20, 40 at 2 bits", lambda basis: 40 if basis.scheme.weight.bits <= FEW_BITS else 20),
    )
    batch_size: int = setting(1, "segments per step", least=1)
    aug_loss: bool = setting(
        False,
        "augmented loss",
        paper=Depends("on at 2 bits", lambda basis: basis.scheme.weight.bits <= FEW_BITS),
    )
    schedule: str = setting(
        "cosine",
        "learning rate over the steps: cosine (falls to zero) or constant",
        choices=("cosine", "constant"),
        paper="constant",
    )
    precision: str = setting(
        "auto",
        "matrix products of a step: float32, bfloat16, or auto (bfloat16 if the CPU has instructions for it; on a GPU "
        "the model's dtype)",
        choices=("auto", "float32", "bfloat16"),
    )
