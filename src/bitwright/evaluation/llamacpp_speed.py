"""Measure speed and memory of a GGUF file in llama.cpp itself, from the package xllamacpp or built by the user.

    python llamacpp_speed.py REQUEST.json RESULT.json
    python llamacpp_speed.py [LIBRARY]

This is a script for any interpreter that has xllamacpp, so it imports the standard library alone. REQUEST: {"model":
FILE.gguf, "prompt": n, "tokens": n, "threads": n, "library": PATH or null for xllamacpp}; RESULT: weight_bytes,
peak_bytes, tokens_per_second, prompt_tokens_per_second, version. With one argument it checks whether that library can
be used, without any whether xllamacpp is there.

xllamacpp's own interface is a server. Its shared library exports llama.cpp's C interface, which can be timed without a
server. Of parameters that are passed by value, this script knows only the first four numbers, whose defaults it checks.
"""

import ctypes
import json
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

ROOM = 1024  # bytes; more than a parameter structure takes in any version, and such structures are passed in memory
FIRST = (512, 2048, 512, 1)
"""The defaults of n_ctx, n_batch, n_ubatch and n_seq_max, which are the first parameters of a context."""
AT_ONCE, ERROR, STEP = 512, 4, 256
REFUSED = 3
"""The exit code if a request cannot be measured; standard error then says why."""


class Parameters(ctypes.Structure):
    """llama_model_params or llama_context_params."""

    _fields_ = (("raw", ctypes.c_ubyte * ROOM),)


Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
P, I32 = ctypes.c_void_p, ctypes.c_int32
Tokens = ctypes.POINTER(I32)


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", I32),
        ("token", Tokens),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", Tokens),
        ("n_seq_id", Tokens),
        ("seq_id", ctypes.POINTER(Tokens)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [Log, P]),
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_load_from_file": (P, [ctypes.c_char_p, Parameters]),
    "llama_init_from_model": (P, [P, Parameters]),
    "llama_set_n_threads": (None, [P, I32, I32]),
    "llama_model_get_vocab": (P, [P]),
    "llama_model_n_ctx_train": (I32, [P]),
    "llama_model_size": (ctypes.c_uint64, [P]),
    "llama_vocab_n_tokens": (I32, [P]),
    "llama_batch_get_one": (Batch, [Tokens, I32]),
    "llama_decode": (I32, [P, Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [P, I32]),
    "llama_get_memory": (P, [P]),
    "llama_memory_clear": (None, [P, ctypes.c_bool]),
}


def _errors_alone(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def _loaded(path: str | None) -> ctypes.CDLL:
    """Load llama.cpp's C interface. Raises SystemExit if a library does not have it."""
    if path is None:
        import xllamacpp

        path = xllamacpp.xllamacpp.__file__
    try:
        library = ctypes.CDLL(path)
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise SystemExit(str(error)) from None
    return library


class Llama:
    """A loaded model and its context."""

    def __init__(self, library: str | None, model: str, context: int, threads: int) -> None:
        self.library = _loaded(library)
        self.log = Log(_errors_alone)  # an attribute, because llama.cpp calls it for as long as it lives
        self.library.llama_log_set(self.log, None)
        self.library.llama_backend_init()
        parameters = self.library.llama_model_default_params()
        self.model = self.library.llama_model_load_from_file(os.fsencode(model), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        self._refuse_too_long(model, context)
        self.context = self.library.llama_init_from_model(self.model, self._context(context))
        if not self.context:
            raise SystemExit(f"llama.cpp has no room for a context of {context} tokens")
        self.library.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.model))

    def _refuse_too_long(self, model: str, tokens: int) -> None:
        longest = self.library.llama_model_n_ctx_train(self.model)
        if tokens > longest:
            sys.stderr.write(
                f"{model} takes {longest} tokens at most, and {tokens} were asked for; give --prompt and --tokens of "
                f"at most {longest}"
            )
            raise SystemExit(REFUSED)

    def _context(self, tokens: int) -> Parameters:
        parameters: Parameters = self.library.llama_context_default_params()
        if struct.unpack_from("<4I", parameters.raw) != FIRST:
            raise SystemExit("llama_context_params of this llama.cpp begin differently; try another xllamacpp")
        struct.pack_into("<4I", parameters.raw, 0, -(-tokens // STEP) * STEP, AT_ONCE, AT_ONCE, 1)
        return parameters

    def forget(self) -> None:
        """Empty the context."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def read(self, tokens: list[int]) -> None:
        """Read tokens into the context, at most AT_ONCE, and compute the logits after the last."""
        held = (I32 * len(tokens))(*tokens)
        if self.library.llama_decode(self.context, self.library.llama_batch_get_one(held, len(tokens))):
            raise SystemExit("llama_decode failed")
        if not self.library.llama_get_logits_ith(self.context, -1):
            raise SystemExit("llama.cpp has no logits")


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Time reading a prompt, then generating from an empty context.

    The time does not depend on which tokens these are, so they are fixed, as in llama.cpp's own llama-bench.
    """
    llama = Llama(request["library"], request["model"], max(request["prompt"], request["tokens"]), request["threads"])
    tokens = [n * 7919 % llama.vocabulary for n in range(max(request["prompt"], request["tokens"]))]
    llama.read(tokens[:2])  # the first passes, of a prompt and of a single token, read the file
    llama.read(tokens[:1])
    llama.forget()
    start = time.perf_counter()
    for first in range(0, request["prompt"], AT_ONCE):
        llama.read(tokens[first : min(first + AT_ONCE, request["prompt"])])
    prompt_seconds = time.perf_counter() - start
    llama.forget()
    start = time.perf_counter()
    for token in tokens[: request["tokens"]]:
        llama.read([token])
    seconds = time.perf_counter() - start
    return {
        "weight_bytes": llama.library.llama_model_size(llama.model),
        "peak_bytes": peak_resident(),
        "tokens_per_second": request["tokens"] / seconds,
        "prompt_tokens_per_second": request["prompt"] / prompt_seconds,
    }


def peak_resident() -> int:
    """The largest resident set since this program began, in bytes; getrusage counts the parent process too."""
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def main(request_file: str, result_file: str) -> None:
    """Measure as a request asks, and write the result to a file."""
    from importlib.metadata import version

    request = json.loads(Path(request_file).read_text())
    runner = Path(request["library"]).name if request["library"] else f"xllamacpp {version('xllamacpp')}"
    Path(result_file).write_text(json.dumps(measure(request) | {"version": runner}))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        import xllamacpp  # noqa: F401
    else:
        (_loaded if len(sys.argv) == 2 else main)(*sys.argv[1:])
