"""llm-compressor's ``gptq`` and ``awq``, by its ``oneshot``.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1

Settings of ``gptq``: ``actorder`` (static, which is its default, or none), ``dampening_frac``; of ``awq``:
``duo_scaling``, ``n_grid``. What is written are the weights as its own fake quantization makes them. Arithmetic is
float32, and so are scales. Its AWQ pins inputs for a GPU even if there is none, and fails: here pinning does nothing.
The clock counts ``oneshot`` on the loaded model: tracing it, calibration, quantization.
"""

from typing import Any

import torch
from compressed_tensors.quantization import forward_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from worker import Clock, Task, write_account, write_dense

HEAD = "lm_head"


def main() -> None:
    """Quantize and write the folder and the account."""
    task = Task.given()
    recipe = _recipe(task)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    segments = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in task.tokens()]
    with Clock() as clock:
        oneshot(
            model=model,
            dataset=DataLoader(segments, batch_size=1),  # type: ignore[arg-type]
            recipe=recipe,
            num_calibration_samples=len(segments),
        )
    libraries = "llmcompressor", "compressed-tensors", "torch", "transformers"
    write_account(task, clock, len(model.model.layers), *libraries)
    write_dense(task, model.state_dict() | _dequantized(model))


def _recipe(task: Task) -> list[Any]:
    how = {
        "num_bits": task.bits,
        "type": "int",
        "symmetric": task.symmetric,
        "strategy": "channel" if task.group_size is None else "group",
        "group_size": task.group_size,
    }
    what = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": how}}, "ignore": [HEAD]}
    if task.method == "awq":
        IntermediatesCache.pin_memory = lambda *_: None  # type: ignore[method-assign]
        return [AWQModifier(**task.settled("awq", duo_scaling=True, n_grid=20)), QuantizationModifier(**what)]
    settings = task.settled("gptq", "awq", actorder="static", dampening_frac=0.01)
    order = settings.pop("actorder")
    return [GPTQModifier(**what, **settings, actorder=None if order in ("none", None) else order)]


@torch.no_grad()
def _dequantized(model: nn.Module) -> dict[str, Tensor]:
    """Weights [O, I] of the quantized linears, as their codes give them."""
    return {
        f"{name}.weight": forward_quantize(module, module.weight, "weight", module.quantization_scheme.weights)
        for name, module in model.named_modules()
        if getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None
    }


if __name__ == "__main__":
    main()
