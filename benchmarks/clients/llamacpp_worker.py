"""llama.cpp itself, as ``xllamacpp`` brings it prebuilt: what it makes of a GGUF file.

    python -m venv ENV && ENV/bin/pip install xllamacpp==2026.10.11549 numpy==2.4.6
    ENV/bin/python llamacpp_worker.py MODEL.gguf REQUEST.json RESULT.json

Tried with these versions (Python 3.11, x86-64 with AVX2). REQUEST: {"prompt": [token ids], "new_tokens": n, "windows":
[[token ids], ...], "threads": n}, and "texts" where they are to be tokenized. RESULT: "tokens" chosen greedily after
the prompt, "logits" at the prompt's last position, "nll" the mean negative log likelihood in nats of tokens 1.. of each
window, "tokenized" texts without what begins them, "adds" the tokens around an empty text, speeds, "peak_bytes" (all of
the process, its KV cache in float16 too), "weight_bytes" (all tensors) and versions.

The wheel's Python interface has a server, which takes token ids but gives no likelihoods of a prompt; its shared
library exports llama.cpp's own C interface, which does. Parameters that are passed by value are opaque here but for
their first four numbers, whose defaults are checked.
"""

import ctypes
import json
import platform
import resource
import struct
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

ROOM = 1024
FIRST = (512, 2048, 512, 1)
"""Defaults of n_ctx, n_batch, n_ubatch and n_seq_max, with which the parameters of a context begin."""
AT_ONCE, ERROR = 512, 4


class Parameters(ctypes.Structure):
    """More room than any version of a parameter structure takes; such structures are passed in memory."""

    _fields_ = (("raw", ctypes.c_ubyte * ROOM),)


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


Quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
P, I32 = ctypes.c_void_p, ctypes.c_int32
SIGNATURES = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [Quiet, P]),
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_load_from_file": (P, [ctypes.c_char_p, Parameters]),
    "llama_init_from_model": (P, [P, Parameters]),
    "llama_set_n_threads": (None, [P, I32, I32]),
    "llama_model_get_vocab": (P, [P]),
    "llama_model_size": (ctypes.c_uint64, [P]),
    "llama_vocab_n_tokens": (I32, [P]),
    "llama_batch_init": (Batch, [I32, I32, I32]),
    "llama_decode": (I32, [P, Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [P, I32]),
    "llama_get_memory": (P, [P]),
    "llama_memory_clear": (None, [P, ctypes.c_bool]),
    "llama_tokenize": (
        I32,
        [P, ctypes.c_char_p, I32, ctypes.POINTER(I32), I32, ctypes.c_bool, ctypes.c_bool],
    ),
}


def _errors_alone(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


class Llama:
    """A model, loaded, and a context of so many tokens."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        self.library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.quiet = Quiet(_errors_alone)
        self.library.llama_log_set(self.quiet, None)
        self.library.llama_backend_init()
        self.model = self.library.llama_model_load_from_file(
            str(path).encode(), self.library.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.context = self.library.llama_init_from_model(self.model, self._parameters(context))
        self.library.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary = self.library.llama_model_get_vocab(self.model)
        self.n_vocabulary = self.library.llama_vocab_n_tokens(self.vocabulary)
        self.batch = self.library.llama_batch_init(AT_ONCE, 0, 1)
        self.past = 0

    def _parameters(self, context: int) -> Parameters:
        found = self.library.llama_context_default_params()
        if struct.unpack_from("<4I", found.raw) != FIRST:
            raise SystemExit("llama_context_params of this llama.cpp begin differently: look into its llama.h")
        struct.pack_into("<4I", found.raw, 0, -(-context // 256) * 256, AT_ONCE, AT_ONCE, 1)
        return found

    def forget(self) -> None:
        """Begins anew."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.past = 0

    def logits(self, tokens: list[int], every: bool) -> np.ndarray[Any, Any]:
        """Of all positions of more tokens, or of the last one [positions, tokens of the vocabulary]."""
        found = []
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
            found += [self._row(n) for n in wanted]
        return np.stack(found)

    def _row(self, n: int) -> np.ndarray[Any, Any]:
        row = self.library.llama_get_logits_ith(self.context, n)
        return np.ctypeslib.as_array(row, (self.n_vocabulary,)).astype(np.float64)

    def tokenize(self, text: str, around: bool = False, special: bool = False) -> list[int]:
        """A text's tokens, with what llama.cpp puts around it or without."""
        raw = text.encode()
        room = (I32 * (len(raw) + 16))()
        count = self.library.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), around, special)
        return list(room[:count])


def nll(llama: Llama, window: list[int]) -> float:
    """Mean negative log likelihood of tokens 1.. of a window, in nats."""
    llama.forget()
    rows = llama.logits(window, every=True)[:-1]
    most = rows.max(1, keepdims=True)
    log_sum = most[:, 0] + np.log(np.exp(rows - most).sum(1))
    return float((log_sum - rows[np.arange(len(rows)), window[1:]]).mean())


def generate(llama: Llama, prompt: list[int], count: int) -> dict[str, Any]:
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
    """Does what was asked and writes it down."""
    asked = json.loads(Path(request).read_text())
    prompt, windows = asked.get("prompt") or [], asked.get("windows") or []
    longest = max([len(prompt) + asked.get("new_tokens", 0), *map(len, windows), 1])
    start = time.perf_counter()
    llama = Llama(Path(model), longest, asked.get("threads", 1))
    found: dict[str, Any] = {"seconds_to_load": time.perf_counter() - start}
    if prompt:
        found |= generate(llama, prompt, asked.get("new_tokens", 0))
    found["nll"] = [nll(llama, window) for window in windows]
    found["tokenized"] = [llama.tokenize(text, special=True) for text in asked.get("texts", [])]
    found["adds"] = llama.tokenize("", around=True)
    found["weight_bytes"] = llama.library.llama_model_size(llama.model)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["versions"] = {"python": platform.python_version(), "xllamacpp": version("xllamacpp")}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
