"""The authors' OmniQuant (github.com/OpenGVLab/OmniQuant) on one Llama model: ``lwc`` and ``let+lwc``.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==4.31.0 "numpy<2" safetensors termcolor tqdm

Its decoder layers fit transformers 4.31 and not much newer ones. Settings are ``epochs``, ``lwc_lr``, ``let_lr``,
``alpha`` and ``aug_loss``; for a row without them, they are the paper's, as with Bitwright's ``training=paper``. It
refuses LET under grouped-query attention: ``side_by_side.py all-heads`` makes a copy of a model that has none.

All the work is done by the checkout: ``quantize.omniquant.omniquant``, and for LET ``get_act_scales`` of its
generate_act_scale_shift.py, with the arguments that its main.py makes. What is put in its way, and why:

- Arithmetic is float32 (its own ``deactive_amp``), and ``Module.half`` keeps float32: on a CPU float16 is slow, and its
  scripts' mixed precision exists on a GPU alone. Its CUDA calls do nothing if no GPU is visible.
- The model's parameters are made plain tensors, which they become on the way to a GPU: the reference assigns tensors in
  their places.
- ``datasets`` and ``datautils`` are empty stand-ins while generate_act_scale_shift.py is imported: it would download
  calibration texts with them, and here the segments are given.
- Its loss scaler, made just before a block's first epoch, starts the clock of the training; the line it logs after an
  epoch stops it.
"""

import argparse
import json
import logging
import random
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, process_time
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from worker import UNQUANTIZED_BITS, Clock, Task, stored_names, write_account, write_dense

NETWORK = "llama"
"""What the reference looks for in the model's name to know the architecture."""
FEW_BITS = 2


class EpochClock(logging.Handler):
    """Seconds of every epoch of every block, without the passes between them that make targets and inputs.

    ``cpu_seconds`` are the processor time of them all, over all threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[list[float]] = []
        self.cpu_seconds = 0.0
        self._last = self._last_cpu = 0.0

    def start_block(self) -> None:
        """The first epoch of the next block begins now."""
        self.seconds.append([])
        self._last, self._last_cpu = monotonic(), process_time()

    def emit(self, record: logging.LogRecord) -> None:
        """An epoch ends, and the next begins, where the reference logs its loss."""
        if re.match(r"layer \d+ iter \d+ loss", record.getMessage()):
            now, cpu = monotonic(), process_time()
            self.seconds[-1].append(now - self._last)
            self.cpu_seconds += cpu - self._last_cpu
            self._last, self._last_cpu = now, cpu


def main() -> None:
    """Write the quantized model, dense, an account of time and memory, and its logits if windows are given."""
    task = Task.given()
    settings = _settings(task)
    sys.path.insert(0, task.checkout())
    transformers.logging.set_verbosity_error()  # buffers that it computes itself count as missing from the checkpoint
    warnings.filterwarnings("ignore", "(?i).*cuda")  # that there is none
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(task.seed)
    nn.Module.half = nn.Module.float
    model, segments = _load(Path(task.model)), task.tokens()
    with Clock() as clock:
        epochs = _quantize(model, segments, task, settings)
    training = {
        "seconds": sum(map(sum, epochs.seconds)),
        "cpu_seconds": epochs.cpu_seconds,
        "steps": len(segments) * sum(map(len, epochs.seconds)),
        "epoch_seconds": epochs.seconds,
    }
    write_account(task, clock, len(epochs.seconds), "torch", "transformers", training=training)
    _refuse_biases(model, stored_names(Path(task.model)))
    write_dense(task, model.state_dict())
    if task.windows is not None:
        windows = safetensors.torch.load_file(task.windows)["tokens"]
        logits = {"logits": _logits(model, windows)}
        safetensors.torch.save_file(logits, Path(task.output) / "logits.safetensors")


def _settings(task: Task) -> dict[str, Any]:
    """The paper's settings, for what the row does not name."""
    few = task.bits <= FEW_BITS
    paper: dict[str, Any] = {"epochs": 40 if few else 20, "lwc_lr": 1e-2, "let_lr": 5e-3, "alpha": 0.5, "aug_loss": few}
    return task.settled("lwc", "let+lwc", symmetric=False, activations=True, **paper)


def _load(folder: Path) -> nn.Module:
    """The model in float32, refused if this transformers would not obey its config."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if config["model_type"] != NETWORK:
        raise SystemExit(f"{folder} is of type {config['model_type']}; this worker runs {NETWORK} only")
    if rope.get("rope_theta", 10000.0) != 10000.0 or rope.get("rope_type", "default") != "default":
        raise SystemExit(f"{folder}: rotary embeddings other than the first Llama's are newer than this transformers")
    if (
        config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]) * config["num_attention_heads"]
        != config["hidden_size"]
    ):
        raise SystemExit(f"{folder}: heads that do not add up to the hidden size are newer than this transformers")
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    return model.eval()


def _freeze(model: nn.Module) -> None:
    """Make every parameter a plain tensor."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())


def _quantize(model: nn.Module, segments: Tensor, task: Task, settings: dict[str, Any]) -> EpochClock:
    """Run the reference on the model, in place."""
    import utils  # the checkout's
    from quantize.omniquant import omniquant

    clock = EpochClock()
    logger = logging.getLogger("omniquant")
    logger.setLevel(logging.INFO)
    logger.addHandler(clock)

    class ClockedScaler(utils.NativeScalerWithGradNormCount):
        def __init__(self) -> None:
            super().__init__()
            clock.start_block()

    utils.NativeScalerWithGradNormCount = ClockedScaler
    batches = [(segment[None],) for segment in segments]
    scales = _activation_scales(model, batches) if "let" in task.method else None
    _freeze(model)
    device = torch.device("cpu")
    lm = SimpleNamespace(model=model, device=device, _device=device, seqlen=segments.shape[1])
    with TemporaryDirectory() as scratch:
        omniquant(lm, _arguments(task, settings, len(batches), scratch), batches, scales, None, logger)
    return clock


def _arguments(task: Task, settings: dict[str, Any], samples: int, scratch: str) -> argparse.Namespace:
    """What main.py makes of its own flags and defaults."""
    tokens = {"n_bits": task.activation_bits, "per_channel_axes": [], "symmetric": False, "dynamic_method": "per_token"}
    weights = {
        "n_bits": task.bits,
        "per_channel_axes": [0],
        "symmetric": False,
        "dynamic_method": "per_channel",
        "group_size": task.group_size,
        "lwc": True,
        "disable_zero_point": False,
    }
    return argparse.Namespace(
        **settings,
        wbits=task.bits,
        abits=task.activation_bits,
        net=NETWORK,
        let="let" in task.method,
        lwc=True,
        nsamples=samples,
        batch_size=1,
        wd=0,
        deactive_amp=True,
        resume=None,
        real_quant=False,
        output_dir=scratch,
        weight_quant_params=weights,
        **{f"{name}_quant_params": dict(tokens) for name in ("act", "q", "k", "v")},
        p_quant_params={"n_bits": UNQUANTIZED_BITS, "metric": "fix0to1"},
    )


@torch.no_grad()
def _activation_scales(model: nn.Module, batches: list[tuple[Tensor]]) -> dict[str, Tensor]:
    """The largest magnitude of every channel of every linear's input, as the reference collects it."""
    with _stand_ins(datasets="load_dataset", datautils="get_loaders"):
        from generate_act_scale_shift import get_act_scales
    scales: dict[str, Tensor] = get_act_scales(model, batches, len(batches))
    return scales


@contextmanager
def _stand_ins(**names: str) -> Iterator[None]:
    """While it lasts, these modules exist and hold nothing but the one name that is imported from them."""
    for module, name in names.items():
        sys.modules[module] = ModuleType(module)
        setattr(sys.modules[module], name, None)
    try:
        yield
    finally:
        for module in names:
            del sys.modules[module]


def _refuse_biases(model: nn.Module, stored: list[str]) -> None:
    state = model.state_dict()
    biases = [name for name in state if name.endswith(".bias") and name not in stored and state[name].any()]
    if biases:
        raise SystemExit(f"the reference made biases that are not zero and that the model has no place for: {biases}")


@torch.no_grad()
def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    """Logits [W, T, V] of the quantized model as the reference runs it, activations quantized if it does so."""
    return torch.stack([model(window[None], use_cache=False).logits[0] for window in windows])


if __name__ == "__main__":
    main()
