"""Memory of a quantized model as bitwright.load holds it, beside the original as transformers does.

    python benchmarks/packed_memory.py --work FOLDER [--layers 8] [--hidden 2048]

Makes a random Llama-shaped model in bfloat16 (small embeddings: what is measured are the linears), streamed to disk,
quantizes it (rtn), and loads each folder in a process of its own: bytes of parameters and buffers, resident memory
before, its peak while loading, and its peak after one forward pass of 16 tokens. One JSON line per model. Linux only.
"""

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SCHEME, VOCABULARY, TOKENS = "W4A16g128ic", 512, 16


def make_model(folder: Path, layers: int, hidden: int) -> None:
    """A folder that transformers loads; one file per block, so that no more than a block is in memory."""
    from transformers import LlamaConfig

    mlp = hidden * 11 // 4 // 128 * 128
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                         num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, dtype="bfloat16",
                         architectures=["LlamaForCausalLM"], max_position_embeddings=512)  # fmt: skip
    config.save_pretrained(folder)
    shapes = dict.fromkeys([f"self_attn.{n}_proj" for n in "qkvo"], (hidden, hidden))
    shapes |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
    files = [{"model.embed_tokens": (VOCABULARY, hidden), "model.norm": (hidden,), "lm_head": (VOCABULARY, hidden)}]
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    files += [{f"model.layers.{n}.{name}": s for name, s in (shapes | norms).items()} for n in range(layers)]
    homes: dict[str, str] = {}
    for n, contents in enumerate(files):
        name, seed = f"model-{n:05d}.safetensors", torch.Generator().manual_seed(n)
        tensors = {
            f"{k}.weight": torch.randn(s, generator=seed).mul_(hidden**-0.5).bfloat16() for k, s in contents.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        homes |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """One token per byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def measure(how: str, folder: Path) -> dict[str, Any]:
    """What this process needs to load and to run the model once; sizes in bytes."""
    import psutil
    from transformers import AutoModelForCausalLM

    import bitwright
    from bitwright import api  # noqa: F401  # everything that is imported, before the first reading

    process = psutil.Process()
    before = process.memory_info().rss
    if how == "bitwright.load":
        model: Any = bitwright.load(folder, device="cpu", dtype="bfloat16")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    loaded = peak_memory()
    with torch.inference_mode():
        assert model(torch.arange(TOKENS)[None]).logits.isfinite().all()
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return {"loaded_by": how, "held_bytes": held, "rss_before": before,
            "peak_while_loading": loaded, "peak_after_forward": peak_memory(),
            "rss_after_forward": process.memory_info().rss}  # fmt: skip


def peak_memory() -> int:
    """The largest resident set since this program began: getrusage also counts the process that started it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def in_a_fresh_process(how: str, folder: Path) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, "--work", str(folder), "--measure", how]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Make the models unless they are there, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure, asked.work)))
        return
    import bitwright

    original, packed = asked.work / "original", asked.work / SCHEME
    if not original.exists():
        original.mkdir(parents=True)
        make_model(original, asked.layers, asked.hidden)
    if not packed.exists():
        bitwright.quantize(bitwright.Recipe(str(original), SCHEME, method="rtn"), packed)
    about = {"torch": torch.__version__, "transformers": version("transformers"), "machine": platform.machine()}
    for how, folder in (("transformers", original), ("bitwright.load", packed)):
        on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(json.dumps({"model": folder.name, "on_disk": on_disk} | in_a_fresh_process(how, folder) | about))


if __name__ == "__main__":
    main()
