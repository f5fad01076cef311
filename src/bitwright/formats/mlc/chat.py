"""mlc-chat-config.json: the model's settings, how text becomes tokens, and how a conversation becomes text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.checkpoint.sidecar_files import (
    read_generation_config,
    read_tokenizer,
    read_tokenizer_config,
    require_token_numbers,
)
from bitwright.core.decoder import Config, Decoder
from bitwright.core.errors import CheckpointError, RecipeError
from bitwright.core.small_files import parse_object, read_small
from bitwright.formats.mlc.architectures import model_config

CONFIG, VERSION = "mlc-chat-config.json", "0.1.0"
MOST_BYTES = 2**24
"""A file that is larger is no such config, and is not read."""
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
)  # fmt: skip
GENERATION = {
    "temperature": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "top_p": 1.0,
}  # fmt: skip
"""The settings for keys that generation_config.json leaves out."""
SYSTEM, PROMPT = "{system_message}", "You are a helpful assistant."


@dataclass(frozen=True)
class Conversation:
    """A way to write messages as text.

    ``sign`` is what a chat template of this kind has in it, ``ends`` are the tokens that end an answer.
    """

    name: str
    sign: str
    system: str
    user: str
    assistant: str
    after_role: str
    between: tuple[str, ...]
    ends: tuple[str, ...]
    message: str = PROMPT
    role_after_system: bool = True


HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
CONVERSATIONS = (
    Conversation("llama-3", "<|start_header_id|>", HEADER.format("system") + SYSTEM + "<|eot_id|>",
                 "<|start_header_id|>user", "<|start_header_id|>assistant", "<|end_header_id|>\n\n", ("<|eot_id|>",),
                 ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")),
    Conversation("chatml", "<|im_start|>", f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", "<|im_start|>user",
                 "<|im_start|>assistant", "\n", ("<|im_end|>\n",), ("<|im_end|>", "<|endoftext|>")),
    Conversation("mistral_default", "[INST]", f"[INST] {SYSTEM}", "[INST]", "[/INST]", " ", (" ",), ("</s>",), "",
                 role_after_system=False),
)  # fmt: skip
PLAIN = Conversation("LM", "", SYSTEM, "", "", "", ("",), (), "")
"""The conversation of a model without a chat template: text goes on."""


def chat_config(config: Config, decoder: Decoder, folder: Path, quantization: str, base: Path | None) -> dict[str, Any]:
    """Build the contents of mlc-chat-config.json.

    Conversation and generation are those of ``base``, a config of the same architecture, if there is one. Raises
    CheckpointError and RecipeError for files that cannot be read.
    """
    require_token_numbers(config, f"{folder}/config.json")
    settings, generation = model_config(decoder), read_generation_config(folder)
    known = {} if base is None else of_base(base, decoder.model_type)
    tokens = Tokens.of(folder)
    chat: dict[str, Any] = {
        "version": VERSION,
        "model_type": decoder.model_type,
        "quantization": quantization,
        "model_config": settings,
        "vocab_size": settings["vocab_size"],
        "active_vocab_size": min(tokens.count or settings["vocab_size"], settings["vocab_size"]),
        "context_window_size": settings["context_window_size"],
        "sliding_window_size": settings.get("sliding_window_size", -1),
        "prefill_chunk_size": settings["prefill_chunk_size"],
        "attention_sink_size": settings.get("attention_sink_size", -1),
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
    }
    for key, value in GENERATION.items():
        chat[key] = known.get(key, generation.get(key) if generation.get(key) is not None else value)
    chat["tokenizer_files"] = files_of(folder)
    chat["tokenizer_info"] = tokens.info
    ids = {key: generation.get(key, config.get(key)) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    chat["conv_template"] = known.get("conv_template") or _conversation(folder, ids, tokens)
    chat |= {key: value if value is not None else 0 for key, value in ids.items()}
    return chat | {"model_task": "chat", "embedding_metadata": None}


def files_of(folder: Path) -> list[str]:
    """The names of the tokenizer's files. Raises CheckpointError if there are none that MLC reads."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model"} & {*names}:
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor tokenizer.model, and MLC-LLM reads nothing else; save the "
            "tokenizer with transformers (a fast one), and repeat"
        )
    return names


def of_base(base: Path, kind: str) -> dict[str, Any]:
    """Read an mlc-chat-config.json, or that of a folder.

    Raises RecipeError for anything else, and for one of another architecture.
    """
    path = base / CONFIG if base.is_dir() else base
    try:
        config = _read(path) if path.is_file() and path.stat().st_size <= MOST_BYTES else {}
    except CheckpointError:
        config = {}  # no JSON, or no text at all
    if not path.is_file():
        wrong = f"has no {CONFIG}" if base.is_dir() else "there is no such file"
    elif not isinstance(config.get("conv_template"), dict):
        wrong = f"is no {CONFIG}, which is a JSON object with a conv_template"
    elif config.get("model_type") != kind:
        wrong = f"is the {CONFIG} of a {config.get('model_type')} model"
    else:
        return config
    raise RecipeError(
        f"--base {base}: {wrong}; name the {CONFIG} of a {kind} model, or the folder that it is in, or leave --base out"
    )


@dataclass(frozen=True)
class Tokens:
    """The contents of tokenizer.json: the number of tokens, the ids of special ones, and how MLC has to decode."""

    count: int | None
    special: Mapping[str, int]
    info: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "Tokens":
        """Read the tokenizer.json of a folder. Raises CheckpointError for a file that is no JSON."""
        tokenizer = read_tokenizer(folder)
        special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or ()
        names = vocabulary if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary)
        decoders, normalizers = _parts(tokenizer.get("decoder")), _parts(tokenizer.get("normalizer"))
        info = {
            "token_postproc_method": "byte_level" if _has(decoders, type="ByteLevel") else "byte_fallback",
            "prepend_space_in_encode": _has(normalizers, type="Prepend", prepend="\u2581"),
            "strip_space_in_decode": _has(decoders, type="Strip", content=" ", start=1, stop=0),
        }
        return cls(len({*names, *special}) or None, special, info)


def _conversation(folder: Path, ids: Mapping[str, Any], tokens: Tokens) -> dict[str, Any]:
    """The conversation that the model's own chat template stands for, as far as it is of a known kind."""
    stated = str(read_tokenizer_config(folder).get("chat_template") or "")
    beside = folder / "chat_template.jinja"
    template = stated or (beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else "")
    kind = next((kind for kind in CONVERSATIONS if template and kind.sign in template), PLAIN)
    eos = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
    stops = [number for number in eos if number is not None] + [
        tokens.special[e] for e in kind.ends if e in tokens.special
    ]
    begins = ids["bos_token_id"] is not None and _begins(folder)
    return {
        "name": kind.name,
        "system_template": kind.system,
        "system_message": kind.message,
        **({"system_prefix_token_ids": [ids["bos_token_id"]]} if begins else {}),
        "add_role_after_system_message": kind.role_after_system,
        "roles": {"user": kind.user, "assistant": kind.assistant},
        "role_templates": {"user": "{user_message}", "assistant": "{assistant_message}", "tool": "{tool_message}"},
        "messages": [],
        "seps": list(kind.between),
        "role_content_sep": kind.after_role,
        "role_empty_sep": kind.after_role,
        "stop_str": [],
        "stop_token_ids": list(dict.fromkeys(stops)),
        "function_string": "",
        "use_function_calling": False,
    }


def _begins(folder: Path) -> bool:
    """Whether texts begin with a token of their own."""
    stated = read_tokenizer_config(folder).get("add_bos_token")
    processor = json.dumps(read_tokenizer(folder).get("post_processor") or {})
    return bool(stated) if stated is not None else "TemplateProcessing" in processor and "SpecialToken" in processor


def _parts(step: Any) -> list[Mapping[str, Any]]:
    """A decoder or normalizer, or the parts of a sequence of them."""
    if not isinstance(step, dict):
        return []
    return list(step.get("decoders") or step.get("normalizers") or [step])


def _has(parts: list[Mapping[str, Any]], **wanted: Any) -> bool:
    return any(all(part.get(key) == value for key, value in wanted.items()) for part in parts)


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. Raises CheckpointError."""
    return {} if not path.is_file() else parse_object(read_small(path), f"{path}: cannot be read")
