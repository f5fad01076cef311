"""HQQ's ``hqq``, data-free: the zero points, in floating point, of which the weights lose least in a norm below 1.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 hqq==0.2.8.post1

The segments are not looked at. Settings are those of its ``BaseQuantizeConfig`` for the weights: ``optimize``,
``round_zero`` (its own default: true at 4 bits, where the zero point that it starts from is rounded); groups go along
the input, ``axis=1``, and with no group size it takes whole rows. What is written are the weights that its packed
linears hold, scale and zero point in float16, multiplied out in float32. The clock counts making these linears, packing
included. Bits per weight are those of the tensors that it keeps; at 3 bits it packs ten codes into 32 bits.
"""

from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from worker import Clock, Task, write_account, write_dense

OWN = {"optimize": None, "round_zero": None}


def main() -> None:
    """Quantize and write the folder and the account."""
    task = Task.given()
    asked = {key: value for key, value in task.settled("hqq", symmetric=False, **OWN).items() if value is not None}
    config = BaseQuantizeConfig(nbits=task.bits, group_size=task.group_size, axis=1)
    config["weight_quant_params"] |= asked
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    layers = model.model.layers
    linears = {
        f"model.layers.{name}": module for name, module in layers.named_modules() if isinstance(module, nn.Linear)
    }
    with Clock() as clock:
        packed = {name: _packed(linear, config) for name, linear in linears.items()}
    stored = sum(8 * part.nbytes for linear in packed.values() for part in _stored(linear))
    bits = stored / sum(linear.weight.numel() for linear in linears.values())
    write_account(task, clock, len(layers), "hqq", "torch", "transformers", bits=bits)
    write_dense(task, model.state_dict() | {f"{name}.weight": _dequantized(linear) for name, linear in packed.items()})


def _packed(linear: nn.Linear, config: dict[str, Any]) -> HQQLinear:
    return HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False)


def _stored(linear: HQQLinear) -> list[Tensor]:
    return [linear.W_q.data, linear.meta["scale"], linear.meta["zero"]]


def _dequantized(linear: HQQLinear) -> Tensor:
    """Weight [O, I], the product of scale and code not rounded to 16 bits once more."""
    weight: Tensor = Quantizer.dequantize(linear.W_q.data, linear.meta | {"compute_dtype": torch.float32})
    return weight


if __name__ == "__main__":
    main()
