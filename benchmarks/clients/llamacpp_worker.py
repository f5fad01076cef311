"""llama.cpp itself, as ``xllamacpp`` brings it prebuilt: what it makes of a GGUF file.

    python -m venv ENV && ENV/bin/pip install xllamacpp==2026.10.11549 numpy==2.4.6
    ENV/bin/python llamacpp_worker.py MODEL.gguf REQUEST.json RESULT.json

Tried with these versions (Python 3.11, x86-64 with AVX2). REQUEST: {"prompt": [token ids], "new_tokens": n, "windows":
[[token ids], ...], "threads": n}, and "texts" if they are to be tokenized. RESULT: "tokens" chosen greedily after
the prompt, "logits" at the prompt's last position, "nll" the mean negative log likelihood in nats of tokens 1.. of each
window, "tokenized" texts without what begins them, "adds" the tokens around an empty text, speeds, "peak_bytes" (all of
the process, its KV cache in float16 too), "weight_bytes" (all tensors) and versions.

The wheel's Python interface has a server, which takes token ids but gives no likelihoods of a prompt; its shared
library exports llama.cpp's own C interface, which does: src/bitwright/evaluation/llamacpp_speed.py.
"""

import ctypes
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src" / "bitwright" / "evaluation"))
from llamacpp_speed import AT_ONCE, I32, SIGNATURES, Batch, Llama, P, Tokens, peak_resident

SIGNATURES["llama_batch_init"] = (Batch, [I32, I32, I32])
SIGNATURES["llama_tokenize"] = (I32, [P, ctypes.c_char_p, I32, Tokens, I32, ctypes.c_bool, ctypes.c_bool])


class Reader(Llama):
    """A model in llama.cpp, loaded, with a context of a number of tokens."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        super().__init__(None, path, context, threads)
        self.batch, self.past = self.library.llama_batch_init(AT_ONCE, 0, 1), 0

    def forget(self) -> None:
        """Empty the context."""
        super().forget()
        self.past = 0

    def logits(self, tokens: list[int], every: bool) -> np.ndarray[Any, Any]:
        """The logits [positions, tokens of the vocabulary] of all positions of more tokens, or of the last one."""
        rows = []
        for start in range(0, len(tokens), AT_ONCE):
            part = tokens[start : start + AT_ONCE]
            for n, token in enumerate(part):
                last = start + n == len(tokens) - 1
                self.batch.token[n], self.batch.pos[n] = token, self.past + n
                self.batch.n_seq_id[n], self.batch.seq_id[n][0] = 1, 0
                self.batch.logits[n] = every or last
            self.batch.n_tokens, self.past = len(part), self.past + len(part)
            if self.library.llama_decode(self.context, self.batch):
                raise SystemExit("llama_decode failed")
            wanted = range(len(part)) if every else [len(part) - 1] if start + AT_ONCE >= len(tokens) else []
            rows += [self._row(n) for n in wanted]
        return np.stack(rows)

    def _row(self, n: int) -> np.ndarray[Any, Any]:
        row = self.library.llama_get_logits_ith(self.context, n)
        return np.ctypeslib.as_array(row, (self.vocabulary,)).astype(np.float64)

    def tokenize(self, text: str, around: bool = False, special: bool = False) -> list[int]:
        """A text's tokens, with what llama.cpp puts around it or without."""
        raw = text.encode()
        room = (I32 * (len(raw) + 16))()
        vocabulary = self.library.llama_model_get_vocab(self.model)
        count = self.library.llama_tokenize(vocabulary, raw, len(raw), room, len(room), around, special)
        return list(room[:count])


def nll(llama: Reader, window: list[int]) -> float:
    """Mean negative log likelihood of tokens 1.. of a window, in nats."""
    llama.forget()
    rows = llama.logits(window, every=True)[:-1]
    most = rows.max(1, keepdims=True)
    log_sum = most[:, 0] + np.log(np.exp(rows - most).sum(1))
    return float((log_sum - rows[np.arange(len(rows)), window[1:]]).mean())


def generate(llama: Reader, prompt: list[int], count: int) -> dict[str, Any]:
    """The greedy continuation of a prompt, and how fast it came."""
    llama.forget()
    llama.logits(prompt[:1], every=False)  # the first pass reads the file
    llama.forget()
    start = time.perf_counter()
    first = llama.logits(prompt, every=False)[0]
    asked, logits, tokens = time.perf_counter() - start, first, []
    start = time.perf_counter()
    for n in range(count):
        tokens.append(int(logits.argmax()))
        if n < count - 1:
            logits = llama.logits(tokens[-1:], every=False)[0]
    seconds = time.perf_counter() - start
    return {
        "tokens": tokens,
        "logits": first.tolist(),
        "prompt_tokens_per_second": len(prompt) / asked,
        "tokens_per_second": (count - 1) / seconds if count > 1 else None,
    }


def main(model: str, request: str, result: str) -> None:
    """Measure what a request asks for, and write the result down."""
    asked = json.loads(Path(request).read_text())
    prompt, windows = asked.get("prompt") or [], asked.get("windows") or []
    longest = max([len(prompt) + asked.get("new_tokens", 0), *map(len, windows), 1])
    start = time.perf_counter()
    llama = Reader(model, longest, asked.get("threads", 1))
    measured: dict[str, Any] = {"seconds_to_load": time.perf_counter() - start}
    if prompt:
        measured |= generate(llama, prompt, asked.get("new_tokens", 0))
    measured["nll"] = [nll(llama, window) for window in windows]
    measured["tokenized"] = [llama.tokenize(text, special=True) for text in asked.get("texts", [])]
    measured["adds"] = llama.tokenize("", around=True)
    measured["weight_bytes"] = llama.library.llama_model_size(llama.model)
    measured["peak_bytes"] = peak_resident()
    measured["versions"] = {"python": platform.python_version(), "xllamacpp": version("xllamacpp")}
    Path(result).write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
