"""GPTQModel's ``gptq``.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 gptqmodel==7.6.0

Settings are fields of its ``QuantizeConfig``: ``desc_act``, ``act_group_aware``, ``static_groups``, ``damp_percent``,
``mse``, ``format``. What is written are the weights of the folder it saves, as its own torch kernel dequantizes them;
scales are float16 there. Arithmetic is float32. The clock counts ``quantize`` on the loaded model, which also packs.
Its pool needs two workers at least: at one thread it may still use two cores, which its processor seconds show.
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from worker import Clock, Task, write_account, write_dense

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

SETTINGS = ("desc_act", "act_group_aware", "static_groups", "damp_percent", "mse", "format")


def main() -> None:
    """Quantize and write the folder and the account."""
    task = Task.given()
    asked = task.settled("gptq", **dict.fromkeys(SETTINGS))
    config = QuantizeConfig(
        bits=task.bits,
        group_size=task.group_size or -1,
        sym=task.symmetric,
        offload_to_disk=False,
        **{key: value for key, value in asked.items() if value is not None},
    )
    model = GPTQModel.load(task.model, config, dtype=torch.float32, device="cpu")
    segments = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in task.tokens().tolist()]
    with Clock() as clock:
        model.quantize(segments, batch_size=1, backend=BACKEND.TORCH)
    write_account(task, clock, len(model.model.model.layers), "gptqmodel", "torch", "transformers")
    packed = Path(task.output) / "packed"
    model.save(str(packed))
    loaded = GPTQModel.load(str(packed), backend=BACKEND.TORCH, dtype=torch.float16, device="cpu").model
    write_dense(task, loaded.state_dict() | _dequantized(loaded))


@torch.no_grad()
def _dequantized(model: nn.Module) -> dict[str, Tensor]:
    """Weights [O, I] of the quantized linears, the product of scale and code not rounded to 16 bits once more."""
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "dequantize_weight"):
            module.scales = module.scales.float()
            weights[f"{name}.weight"] = module.dequantize_weight().T
    return weights


if __name__ == "__main__":
    main()
