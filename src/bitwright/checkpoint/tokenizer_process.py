"""A tokenizer in a process of its own, within limits of memory and time.

This is a script for a fresh Python. The tokenizers library cannot be interrupted, ends its process if it gets no
memory, and a tokenizer.json can make it take any amount of either. Neither torch nor bitwright is imported, so that the
process starts in under a second.

Requests and answers are lines of JSON; numbers of tokens follow an answer as 32-bit integers.

    {"folder": path, "seconds": s, "memory": bytes}     -> {}
    {"texts": [...], "special": bool, "seconds": s}     -> {"counts": [n, ...]}, then 4 * sum(counts) bytes
    {"call": name, "with": [...], "and": {...}}         -> {"value": ...}

Each may be answered by {"error": message}. ``seconds`` are those that the process may have taken in all.
"""

import json
import os
import sys
from array import array
from typing import Any, BinaryIO

LIBRARIES = ("torch", "tensorflow", "jax", "flax")
MOST_ERROR = 1000
"""The most characters of an error."""
BEYOND = 1_000_000
"""The most tokens beside two for each byte of text."""


def main() -> None:
    """Answer requests until there are no more."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    tokenizer, tokens = None, 0
    for line in requests:
        request = json.loads(line)
        _limit(request)
        try:
            if "folder" in request:
                tokenizer = _opened(request["folder"])
                _answer(answers, {})
            elif "texts" in request:
                ids = _encoded(tokenizer, request["texts"], request["special"])
                tokens += sum(map(len, ids))
                if tokens > request["most"]:
                    raise ValueError(f"it makes {tokens:,} tokens of {request['most'] // 2:,} bytes of text")
                _answer(answers, {"counts": [*map(len, ids)]}, array("I", [i for text in ids for i in text]).tobytes())
            else:
                value = getattr(tokenizer, request["call"])
                _answer(answers, {"value": value(*request["with"], **request["and"]) if callable(value) else value})
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of tokenizers is no Exception, and many of its errors are bare ones
            _answer(answers, {"error": f"{type(error).__name__}: {error}"[:MOST_ERROR]})


def _opened(folder: str) -> Any:
    """Load the tokenizer of a model folder."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    nowhere: dict[str, Any] = dict.fromkeys(LIBRARIES)  # None: they cannot be imported
    sys.modules.update(nowhere)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _encoded(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """The numbers of the tokens of texts, as calling the tokenizer gives them; ``special`` adds those around a text."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    if not isinstance(tokenizer, Fast) or kind._encode_plus is not Fast._encode_plus:
        return [list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids) for text in texts]
    backend = tokenizer.backend_tokenizer  # asked directly, because transformers takes as long again for offsets
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]


def _limit(request: dict[str, Any]) -> None:
    """Set limits of memory (address space) and processor time, where the system has them."""
    try:
        import resource
    except ImportError:
        return
    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: request["seconds"]}
    if "memory" in request:
        wanted[resource.RLIMIT_AS] = request["memory"]
    for what, most in wanted.items():
        _, hard = resource.getrlimit(what)
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(what, (soft, hard))
        except (ValueError, OSError):  # a system that does not limit this
            continue


def _answer(answers: BinaryIO, value: dict[str, Any], raw: bytes = b"") -> None:
    answers.write(json.dumps(value).encode() + b"\n" + raw)
    answers.flush()


if __name__ == "__main__":
    main()
