"""Small random models of every architecture that gguf and mlc are written for, in llama.cpp and in MLC's model.

    python benchmarks/architectures.py --python llamacpp=ENV1/bin/python --python tvm=ENV2/bin/python

Two layers of 128 features with the embedded model's tokenizer, weights drawn with a fixed seed, one line of ``MODELS``
each; what is compared, and when it passes, is as in ``clients.py``, on random tokens. Finished rows are kept in
benchmarks/results/architectures-random.jsonl; architectures-random.md is made anew.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import transformers
import typer
from agreement import compared, expected, verdict
from client_cases import Case, make
from rows import Kept, Row, listed, measured_on
from workers import interpreters, run

import bitwright
from bitwright.demo import MODEL_DIR

PROMPT, NEW, SEQLEN, WINDOWS, SEED = 64, 32, 128, 8, 2026
LENGTH = 256
ROTARY: dict[str, Any] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
MODELS = (
    ("Llama", None),
    ("Llama", "llama3"),
    ("Llama", "linear"),
    ("Llama", "yarn"),
    ("Mistral", None),
    ("Qwen2", None),
    ("Qwen2", "yarn"),
    ("Qwen3", None),
)
PLAIN = Case("llamacpp", "gguf", "F16")
"""Nothing quantized: here llama.cpp does not round the inputs of matrix products to 8 bits."""
GGUF, MLC = Case("llamacpp", "gguf", "W4A16g32sym", "bitwright"), Case("tvm", "mlc", "mlc:q4f16_1", "bitwright")
NOT_IN_MLC = ("linear", "yarn")
COLUMNS = (
    *("architecture", "rotary scaling", "client", "format", "scheme", "greedy tokens alike", "logits apart (std)"),
    *("perplexity", "the client's", "difference", "verdict"),
)


def main(
    python: Annotated[list[str] | None, typer.Option(help="CLIENT=INTERPRETER; repeatable.")] = None,
    name: str = "architectures-random",
) -> None:
    """Measure the rows that are missing and write the table."""
    torch.set_num_threads(1)
    protocol = {"prompt": PROMPT, "new": NEW, "seqlen": SEQLEN, "windows": WINDOWS, "seed": SEED}
    kept, pythons, rows = Kept(name, protocol), interpreters(python or []), []
    for case in (PLAIN, GGUF, MLC):
        for kind, rotary in MODELS:
            if not (case is MLC and rotary in NOT_IN_MLC):
                identity = {"architecture": kind, "rotary": rotary} | case.identity
                rows.append(kept.row(identity, partial(_measured, case, kind, rotary, pythons[case.client])))
    versions = {row["client"]: listed(row["client_versions"]) for row in rows}
    kept.write_table(
        "Random models in llama.cpp and MLC's model",
        f"Two layers of 128 features, weights drawn with seed {SEED}; rtn; {NEW} tokens chosen greedily after {PROMPT} "
        f"random ones; perplexity over {WINDOWS} windows of {SEQLEN} random tokens, which says no more than that two "
        "programs compute the same. Logits lie close together here. Of quantized weights llama.cpp rounds the inputs "
        f"of matrix products to 8 bits, of F16 it does not. {measured_on(rows)} "
        + " ".join(f"{client} with {numbers}." for client, numbers in versions.items()),
        COLUMNS,
        [_cells(row) for row in rows],
    )


def _measured(case: Case, kind: str, rotary: str | None, python: str) -> Row:
    with TemporaryDirectory() as scratch:
        vocabulary = _write_model(Path(scratch) / "model", kind, rotary)
        drawn = torch.Generator().manual_seed(SEED)
        tokens = torch.randint(3, vocabulary, (WINDOWS, SEQLEN), generator=drawn).tolist()
        asked: Row = {"prompt": tokens[0][:PROMPT], "new_tokens": NEW, "windows": tokens, "threads": 1}
        output, model = _opened(case, Path(scratch) / "model", Path(scratch))
        result = run(case.client, python, output, asked, Path(scratch))
        wanted = expected(model, asked["prompt"], NEW, tokens)
    comparison = compared(wanted, result)
    return comparison | {"verdict": verdict(comparison), "client_versions": result["versions"]}


def _opened(case: Case, folder: Path, scratch: Path) -> tuple[Path, Any]:
    """What the client opens, and the model in float32 that it should compute."""
    if case is not PLAIN:
        quantized = make(case, folder, scratch)
        return quantized.output, quantized.load()
    bitwright.export(folder, scratch / "out.gguf", format="gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return scratch / "out.gguf", loaded.eval()


def _write_model(folder: Path, kind: str, rotary: str | None) -> int:
    """A checkpoint in bfloat16 with the embedded model's tokenizer; how many tokens that has."""
    embedded = json.loads((MODEL_DIR / "config.json").read_text())
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=embedded["vocab_size"],
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=embedded["bos_token_id"],
        eos_token_id=embedded["eos_token_id"],
        rope_parameters={"rope_theta": 10000.0, "rope_type": rotary or "default"} | ROTARY.get(rotary or "", {}),
        **({"sliding_window": None} if kind == "Mistral" else {}),
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    _draw(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in MODEL_DIR.glob("tokenizer*"):
        shutil.copy(path, folder)
    return int(embedded["vocab_size"])


@torch.no_grad()
def _draw(model: torch.nn.Module) -> None:
    """Weights large enough for logits to differ, norms and biases that are not all alike."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.2 * drawn)
        elif parameter.dim() == 1:
            parameter.copy_(0.3 * drawn)
        else:
            parameter.copy_(drawn * (0.5 if "embed" in name else 1.4 / parameter.shape[1] ** 0.5))


def _cells(row: Row) -> list[str]:
    named = [row["architecture"], row["rotary"] or "none", row["client"], row["format"], row["scheme"]]
    tokens = f"{row['alike']} of {row['of']}"
    tokens += "" if row["behind"] is None else f", the next {row['behind']:.4f} std behind"
    ours, theirs = f"{row['expected_perplexity']:.4f}", f"{row['client_perplexity']:.4f}"
    return [*named, tokens, f"{row['logits']:.4f}", ours, theirs, f"{row['perplexity']:+.3f}%", row["verdict"]]


if __name__ == "__main__":
    typer.run(main)
