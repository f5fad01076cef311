"""The authors' AdaDim (github.com/johnheo/adadim-llm): ``rtn-ada`` and ``gptq-ada``, groups along either dimension.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==4.31.0 "numpy<2" safetensors scipy tqdm

All the work is done by the checkout's ``run_rtn_ada`` and ``run_gptq_ada``. What is put in its way, and why:

- ``calib_data`` is a stand-in that hands over the segments given: it would download texts.
- What moves to a GPU stays where it is, and the wait for a GPU does nothing. Arithmetic is float32.
- ``state_dict`` returns copies. The authors keep alternatives by ``{k: v.cpu() ...}``, which copies from a GPU; on a
  CPU it does not, and putting the original weights back would overwrite the alternatives, best one included.

The clock counts ``run_*_ada``: the embedding of the segments and all blocks.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from worker import Clock, Task, write_account, write_dense


def main() -> None:
    """Quantize, in place, and write the folder and the account."""
    task = Task.given()
    task.settled("rtn-ada", "gptq-ada", symmetric=False)
    run = _reference(task)
    model = transformers.AutoModelForCausalLM.from_pretrained(task.model, torch_dtype=torch.float32).eval()
    with Clock() as clock:
        run(model, None, task.bits, {"zero_point": True, "q_group_size": task.group_size or -1}, adaptive=True)
    write_account(task, clock, len(model.model.layers), "torch", "transformers")
    write_dense(task, model.state_dict())


def _reference(task: Task) -> Callable[..., Any]:
    """The function that does it, from the checkout, able to run without a GPU."""
    sys.path.insert(0, task.checkout())
    segments = task.tokens()
    data = ModuleType("adadim.utils.calib_data")
    data.get_calib_dataset = lambda **_: [segment[None] for segment in segments]  # type: ignore[attr-defined]
    sys.modules[data.__name__] = data
    if task.method == "rtn-ada":
        from adadim.quantize import rtn_ada as reference
    else:
        from adadim.update import gptq_ada as reference
    reference.move_embed = lambda *_: None
    nn.Module.cuda = lambda module, *_: module  # type: ignore[assignment, method-assign]
    torch.cuda.synchronize = lambda *_: None
    _copy_states()
    return getattr(reference, f"run_{task.method.replace('-', '_')}")


def _copy_states() -> None:
    """From now on a ``state_dict`` shares no memory with the module."""
    shared = nn.Module.state_dict

    def copied(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        result = shared(module, *args, **kwargs)
        within = args or "destination" in kwargs  # a child's, on the way into its parent's
        return result if within else {name: tensor.clone() for name, tensor in result.items()}

    nn.Module.state_dict = copied  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    main()
