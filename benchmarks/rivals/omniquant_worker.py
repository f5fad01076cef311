"""The authors' OmniQuant on one Llama model, in an environment of its own. ``../omniquant_reference.py`` starts it.

All the work is done by the checkout: ``quantize.omniquant.omniquant``, and for LET ``get_act_scales`` of its
generate_act_scale_shift.py, with the arguments that its main.py makes. What is put in its way, and why:

- Arithmetic is float32 (its own ``deactive_amp``), and ``Module.half`` keeps float32: on a CPU float16 is slow, and its
  scripts' mixed precision exists on a GPU alone. Its CUDA calls do nothing where no GPU is visible.
- The model's parameters are made plain tensors, which they become on the way to a GPU: the reference assigns tensors in
  their places.
- ``datasets`` and ``datautils`` are empty stand-ins while generate_act_scale_shift.py is imported: it would download
  calibration texts with them, and here the segments are given.
- Its loss scaler, made just before a block's first epoch, starts the clock; the line it logs after an epoch stops it.
"""

import argparse
import json
import logging
import random
import re
import shutil
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

NETWORK = "llama"
"""What the reference looks for in the model's name to know the architecture."""
UNQUANTIZED_BITS = 16


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
    """Writes the quantized model, dense, an account of time and memory, and where windows are given its logits."""
    options = _options()
    sys.path.insert(0, str(options.repository))
    transformers.logging.set_verbosity_error()  # buffers that it computes itself count as missing from the checkpoint
    warnings.filterwarnings("ignore", "(?i).*cuda")  # that there is none
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(options.seed)
    nn.Module.half = nn.Module.float
    model = _load(options.model)
    stored = {name for name, _ in model.named_parameters()}
    segments = safetensors.torch.load_file(options.segments)["tokens"]
    clock = _quantize(model, segments, options)
    account = {
        "seconds": sum(map(sum, clock.seconds)),
        "cpu_seconds": clock.cpu_seconds,
        "steps": len(segments) * sum(map(len, clock.seconds)),
        "epoch_seconds": clock.seconds,
        "peak_bytes": peak_bytes(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    _write_model(model, stored, options.model, options.output / "model")
    (options.output / "account.json").write_text(json.dumps(account))
    if options.windows is not None:
        windows = safetensors.torch.load_file(options.windows)["tokens"]
        safetensors.torch.save_file({"logits": _logits(model, windows)}, options.output / "logits.safetensors")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("repository", "model", "segments", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--windows", type=Path, help="tokens to write the quantized model's logits of")
    for name in ("wbits", "abits", "epochs"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--group-size", type=int, help="one scale per output channel without it")
    for name in ("lwc-lr", "let-lr", "alpha"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--aug-loss", action="store_true")
    parser.add_argument("--let", action="store_true")
    parser.add_argument("--seed", type=int, required=True)
    return parser.parse_args()


def _load(folder: Path) -> nn.Module:
    """The model in float32, refused where its configuration says what this transformers would not obey."""
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
    """Makes every parameter a plain tensor."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())


def _quantize(model: nn.Module, segments: Tensor, options: argparse.Namespace) -> EpochClock:
    """Runs the reference on the model, in place."""
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
    scales = _activation_scales(model, batches) if options.let else None
    _freeze(model)
    device = torch.device("cpu")
    lm = SimpleNamespace(model=model, device=device, _device=device, seqlen=segments.shape[1])
    with TemporaryDirectory() as scratch:
        omniquant(lm, _arguments(options, len(batches), scratch), batches, scales, None, logger)
    return clock


def _arguments(options: argparse.Namespace, samples: int, scratch: str) -> argparse.Namespace:
    """What main.py makes of its own flags and defaults."""
    tokens = {"n_bits": options.abits, "per_channel_axes": [], "symmetric": False, "dynamic_method": "per_token"}
    weights = {
        "n_bits": options.wbits,
        "per_channel_axes": [0],
        "symmetric": False,
        "dynamic_method": "per_channel",
        "group_size": options.group_size,
        "lwc": True,
        "disable_zero_point": False,
    }
    given = {name: getattr(options, name) for name in ("wbits", "abits", "epochs", "lwc_lr", "let_lr", "alpha")}
    return argparse.Namespace(
        **given,
        net=NETWORK,
        let=options.let,
        lwc=True,
        aug_loss=options.aug_loss,
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


def _write_model(model: nn.Module, stored: set[str], source: Path, output: Path) -> None:
    """The dequantized weights in float32, under the original's names and with the files that go along."""
    state = model.state_dict()
    biases = [name for name in state if name.endswith(".bias") and name not in stored and state[name].any()]
    if biases:
        raise SystemExit(f"the reference made biases that are not zero and that the model has no place for: {biases}")
    output.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copyfile(path, output / path.name)
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2))
    tensors = {name: state[name].contiguous() for name in sorted(stored)}
    safetensors.torch.save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    """Logits [W, T, V] of the quantized model as the reference runs it, activations quantized where it does so."""
    return torch.stack([model(window[None], use_cache=False).logits[0] for window in windows])


def peak_bytes() -> int:
    """The largest resident set of this program. ``ru_maxrss`` would count the process that started it as well."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
