"""How far what a linear reads is aligned with its weights: what the second term of EasyQuant's range counts.

    python benchmarks/alignment.py MODEL --text TEXT.txt --name alignment-en-llama

For each linear with rows w and inputs x: the mean of E[(w x)^2] / |w|^2 over its rows, over the mean of E[x_i^2]. It
is 1 if no direction is special; the table has it for whole rows and for groups of 128 within them. Always measured
anew.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rows import Kept, machine, measured_on
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(
    model: Path,
    text: Annotated[Path, typer.Option(help="Text that the model reads.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    seqlen: int = 512,
    windows: int = 16,
    group: int = 128,
) -> None:
    """Measure every linear of the blocks and write the table."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    ids = AutoTokenizer.from_pretrained(model, local_files_only=True)(
        text.read_text(), return_tensors="pt", verbose=False
    )
    moments = _moments(network, ids.input_ids[0][: seqlen * windows].view(-1, seqlen))
    alignments = {
        n: [_along(network.get_submodule(n).weight, m, size) for size in (m.shape[0], group)]
        for n, m in moments.items()
    }
    kinds = list(dict.fromkeys(n.rpartition(".")[2] for n in alignments))
    about = {"text": text.name, "seqlen": seqlen, "windows": windows}
    kept, row = Kept(name, about), machine()
    kept.write_table(
        f"Alignment of inputs and weights: {name}",
        f"{windows} windows of {seqlen} tokens of {text.name}. Least to most over the blocks. {measured_on([row])}",
        ("linear", "whole rows", f"groups of {group}"),
        [(kind, *_spans([v for n, v in alignments.items() if n.endswith(kind)])) for kind in kinds],
    )


@torch.no_grad()
def _moments(network: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """E[x x^T] of what every linear but the output layer reads."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(_: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(())) + x.T @ x / len(x)

        return add

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(hook(name))
    for window in windows:
        network(window[None])
    return sums


def _along(weight: Tensor, moments: Tensor, size: int) -> float:
    parts = []
    for start in range(0, weight.shape[1] - size + 1, size):
        here = slice(start, start + size)
        w, h = weight[:, here].detach(), moments[here, here]
        parts.append(float((((w @ h) * w).sum(1) / w.square().sum(1)).mean() / h.diagonal().mean()))
    return sum(parts) / len(parts)


def _spans(values: list[list[float]]) -> list[str]:
    return [f"{min(column):.1f} to {max(column):.1f}" for column in zip(*values, strict=True)]


if __name__ == "__main__":
    typer.run(main)
