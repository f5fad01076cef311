"""AutoRound without training (``--iters 0``): ``rtn``, ``neuqi`` and ``neuqi-imatrix``.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 auto-round==0.16.1

- ``rtn`` is plain rounding (``--disable_opt_rtn``).
- ``neuqi-imatrix`` is ``--enable_neuqi`` as shipped: its search for scale and zero point, every error weighted by what
  the segments make the linear read. That is calibration.
- ``neuqi`` is the same search without these weights, and data-free: the function that ``--enable_neuqi`` calls for
  every linear, called here without an imatrix. Its command line always collects one.

There are no settings; its grid on a CPU is 64 scales and 32 more around the best, with every zero point. Scales are
float16, arithmetic and what is written float32 (``amp=False``). The clock counts ``quantize`` on the loaded model, or
the calls of the function. Bits per weight count codes, a float16 scale, and a zero point of the weight's own bits.
"""

from typing import Any

import torch
from auto_round import AutoRound
from auto_round.data_type.neuqi import quant_tensor_opt_rtn_asym, quant_tensor_opt_rtn_sym_neuqi
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker import Clock, Task, write_account, write_dense

SCALE_BITS = 16
HOW: dict[str, dict[str, Any]] = {"rtn": {"disable_opt_rtn": True}, "neuqi-imatrix": {"enable_neuqi": True}}


def main() -> None:
    """Quantize and write the folder and the account."""
    task = Task.given()
    task.settled("neuqi", *HOW)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    layers = model.model.layers
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    shapes = [linear.weight.shape for linear in linears]
    clock = Clock()
    if task.method == "neuqi":
        with clock:
            _search(linears, task)
    else:
        model = _whole_way(model, task, clock)
    bits = sum(_stored_bits(*shape, task) for shape in shapes) / sum(shape.numel() for shape in shapes)
    write_account(task, clock, len(layers), "auto-round", "torch", "transformers", bits=bits)
    write_dense(task, model.state_dict())


def _whole_way(model: nn.Module, task: Task, clock: Clock) -> nn.Module:
    """The model as AutoRound itself quantizes it, with the segments if it asks for some."""
    segments = task.tokens()
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(task.model),
        bits=task.bits,
        group_size=task.group_size or -1,
        sym=task.symmetric,
        iters=0,
        dataset=[segment[None] for segment in segments],
        nsamples=len(segments),
        seqlen=segments.shape[1],
        batch_size=1,
        device_map="cpu",
        amp=False,
        **HOW[task.method],
    )
    with clock:
        quantized: nn.Module = rounding.quantize()[0]
    return quantized


@torch.no_grad()
def _search(linears: list[nn.Linear], task: Task) -> None:
    """Its search on every weight, nothing but the weight known; the weights become what their codes stand for."""
    search = quant_tensor_opt_rtn_sym_neuqi if task.symmetric else quant_tensor_opt_rtn_asym
    for linear in linears:
        result = search(linear.weight, bits=task.bits, group_size=task.group_size or -1, scale_dtype=torch.float16)
        linear.weight.copy_(result[0])


def _stored_bits(rows: int, columns: int, task: Task) -> int:
    groups = rows * columns // (task.group_size or columns)
    return rows * columns * task.bits + groups * (SCALE_BITS + (0 if task.symmetric else task.bits))


if __name__ == "__main__":
    main()
