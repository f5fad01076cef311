"""MLC-LLM's own model in TVM's virtual machine, on the CPU: ``tvm_worker.py MODEL REQUEST.json RESULT.json``.

MODEL is a folder that ``--format mlc`` wrote. MLC's Python code builds the model that mlc-chat-config.json names, its
compiler passes and TVM compile it for this processor, TVM's loader reads tensor-cache.json, and the virtual machine
runs it with the paged KV cache. MLC's C++ engine and its tokenizer have no part in it.

The environment (tried with Python 3.11, apache-tvm 0.26.0, mlc-llm 79d603f of July 2026, on a CPU with AVX2):

    python3.11 -m venv ENV
    ENV/bin/pip install apache-tvm==0.26.0 pydantic tqdm requests prompt_toolkit
    git clone https://github.com/mlc-ai/mlc-llm ENV/mlc-llm && git -C ENV/mlc-llm checkout 79d603f

Left out: tokens per second. Without the schedules that MLC has for GPUs, compiled code on a CPU is no measure of it.
"""

import json
import math
import os
import resource
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

MLC = Path(sys.prefix) / "mlc-llm" / "python" / "mlc_llm"
COMMIT = "79d603f"
PAGE = 16


def main(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What the model answers."""
    _import_mlc()
    chat = json.loads((folder / "mlc-chat-config.json").read_text())
    start = time.monotonic()
    model = Model(folder, chat)
    seconds = time.monotonic() - start
    logits, tokens = model.greedy(request["prompt"], request["new_tokens"])
    return {
        "tokens": tokens,
        "logits": logits,
        "nll": [model.nll(window) for window in request["windows"]],
        "versions": {"apache-tvm": version("apache-tvm"), "mlc-llm": COMMIT, "quantization": chat["quantization"]},
        "seconds_to_load": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _import_mlc() -> None:
    """Make mlc_llm's Python modules importable without its C++ library, which its own __init__ loads."""
    os.environ["SKIP_LOADING_MLCLLM_SO"] = "1"
    package = types.ModuleType("mlc_llm")
    package.__path__ = [str(MLC)]
    sys.modules["mlc_llm"] = package
    from tvm import relax

    if not hasattr(relax.Var, "name_hint"):  # what this mlc-llm calls the name of a variable, and this TVM does not
        relax.Var.name_hint = property(lambda var: var.name)
    from mlc_llm.quantization import QUANTIZATION
    from mlc_llm.quantization.group_quantization import GroupQuantize

    QUANTIZATION["q2f16_1"] = GroupQuantize(
        name="q2f16_1",
        kind="group-quant",
        group_size=64,
        quantize_dtype="int2",
        storage_dtype="uint32",
        model_dtype="float16",
        linear_weight_layout="NK",
        quantize_embedding=True,
        quantize_final_fc=True,
    )


class Model:
    """Compiled, with its weights."""

    def __init__(self, folder: Path, chat: dict[str, Any]) -> None:
        import tvm
        from tvm import relax

        self.tvm, self.device = tvm, tvm.cpu()
        executable, names = _compile(chat)
        self.vm = relax.VirtualMachine(executable, self.device)
        tvm.get_global_func("vm.builtin.tensor_cache.load")(str(folder), self.device.dlpack_device_type(), 0)
        self.parameters = tvm.get_global_func("vm.builtin.param_array_from_cache_by_name")(names)
        tvm.get_global_func("vm.builtin.tensor_cache.clear")()
        context, chunk = chat["context_window_size"], chat["prefill_chunk_size"]
        sizes = (tvm.runtime.ShapeTuple([size]) for size in (1, context, chunk, PAGE, 0))
        self.cache = self.vm["create_tir_paged_kv_cache"](*sizes)

    def run(self, function: str, tokens: list[int]) -> Any:
        """Logits [T, vocabulary], or of the last token alone, of tokens that follow those that were run before."""
        import numpy as np

        shape = self.tvm.runtime.ShapeTuple
        ids = self.tvm.runtime.tensor(np.array(tokens, np.int32), self.device)
        embedded = self.vm["embed"](ids, self.parameters)
        embedded = embedded.numpy().reshape(1, len(tokens), -1)
        self._call("begin_forward", self.cache, shape([0]), shape([len(tokens)]))
        logits = self.vm[function](self.tvm.runtime.tensor(embedded, self.device), self.cache, self.parameters)[0]
        self._call("end_forward", self.cache)
        return logits.numpy().astype(np.float64)[0]

    def fresh(self) -> None:
        """Forgets what was run before."""
        self._call("clear", self.cache)
        self._call("add_sequence", self.cache, 0)

    def greedy(self, prompt: list[int], count: int) -> tuple[list[float], list[int]]:
        """The logits of the token after the prompt, and the tokens that are chosen one after the other."""
        self.fresh()
        first = logits = self.run("prefill", prompt)[-1]
        chosen = [int(logits.argmax())]
        while len(chosen) < count:
            logits = self.run("decode", chosen[-1:])[-1]
            chosen.append(int(logits.argmax()))
        return first.tolist(), chosen[:count]

    def nll(self, window: list[int]) -> float:
        """Mean negative log-likelihood in nats of all tokens but the first."""
        import numpy as np

        self.fresh()
        logits = self.run("batch_verify", window)[:-1]
        most = logits.max(axis=1)
        normalizer = most + np.log(np.exp(logits - most[:, None]).sum(axis=1))
        loss = float((normalizer - logits[np.arange(len(logits)), window[1:]]).mean())
        assert math.isfinite(loss)
        return loss

    def _call(self, name: str, *arguments: Any) -> None:
        self.tvm.get_global_func(f"vm.builtin.kv_state_{name}")(*arguments)


def _compile(chat: dict[str, Any]) -> tuple[Any, list[str]]:
    """The executable, and the names of its parameters in their order."""
    import tvm
    from mlc_llm import compiler_pass  # noqa: F401  (registers the pipeline "mlc_llm")
    from mlc_llm import op as operators
    from mlc_llm.model import MODELS
    from mlc_llm.quantization import QUANTIZATION
    from tvm import relax

    model, quantization = MODELS[chat["model_type"]], QUANTIZATION[chat["quantization"]]
    config = model.config.from_dict(chat["model_config"])
    processor = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "core-avx2"}
    target = tvm.target.Target(processor, host=processor)
    metadata = {key: value for key, value in chat.items() if key != "conv_template"}
    metadata |= {"params": [], "disaggregation": False, "kv_state_kind": "kv_cache", "max_batch_size": 1}
    bounds = {"total_seq_len": chat["context_window_size"], "seq_len": chat["prefill_chunk_size"], "batch_size": 1}
    with target, tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        operators.enable(target=target, flashinfer=False, faster_transformer=False, cutlass=False)
        network, _ = model.quantize[quantization.kind](config, quantization)
        module, parameters, external = network.export_tvm(spec=network.get_default_spec(), allow_extern=True)
        pipeline = relax.get_pipeline(
            "mlc_llm",
            target=target,
            flashinfer=False,
            cublas_gemm=False,
            faster_transformer=False,
            allreduce_strategy=0,
            variable_bounds=bounds,
            cuda_graph_symbolic_capture_hints={},
            additional_tirs={},
            ext_mods=external,
            metadata=metadata,
            debug_dump=None,
        )
        executable = tvm.compile(module, target=target, relax_pipeline=pipeline)
    return executable, [name for name, _ in parameters]


if __name__ == "__main__":
    measured = main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
    Path(sys.argv[3]).write_text(json.dumps(measured))
