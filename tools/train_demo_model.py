"""Train the embedded demonstration model on the source of the installed Python standard library.

    python tools/train_demo_model.py                                   # replaces src/bitwright/demo/model
    python tools/train_demo_model.py --smoke --output /tmp/demo-model  # seconds, to see that everything runs

The run is float32 on the processor, seeded, and fixed in steps, so that it repeats on one machine; another processor or
thread count rounds differently and gives a slightly different model of the same quality. Needs torch 2.9 or newer, for
``torch.optim.Muon``.
"""

import argparse
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitwright.core.progress import silent
from bitwright.demo import MODEL_DIR, texts
from bitwright.evaluation.measure import consecutive, measure

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# The vocabulary begins with the special tokens, in this order.
SPECIAL_IDS: dict[str, Any] = {f"{name}_id": number for number, name in enumerate(SPECIAL)}
VOCABULARY, CONTEXT = 2048, 1024
DEFAULT_STEPS, TOKENS_PER_STEP, LOG_EVERY = 2400, 2048, 100
# Short windows cost less attention and serve as well at first; the last third learns the longer context.
SHORT_WINDOW, LONG_WINDOW, LONG_FROM = 256, 512, 2 / 3
ADAM_RATE, MUON_RATE, WARMUP_STEPS, FINAL_SHARE = 3e-3, 6e-3, 80, 0.01
EVALUATION_WINDOW, EVALUATION_WINDOWS = 512, 60
PROMPTS, NEW_TOKENS = ("    def __init__(self, name", "import os\n\n\ndef ", "        if not isinstance("), 70
SMOKE_STEPS, SMOKE_FILES, SMOKE_WINDOWS, SMOKE_NEW_TOKENS = 3, 40, 2, 4


@dataclass
class Run:
    """Options of one training run, and the rows of its log so far."""

    output: Path
    steps: int
    seed: int
    threads: int
    smoke: bool
    rows: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> None:
    """Train, save, load again, measure, write the log, then put the folder in its place."""
    run = parse_options()
    torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)
    sources = training_sources(run)
    tokenizer = train_tokenizer(sources)
    stream = token_stream(tokenizer, sources)
    model = LlamaForCausalLM(model_config()).float()
    print(f"{model.num_parameters()} weights, {len(stream)} training tokens", flush=True)
    train(model, stream, run)
    run.output.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system as the output, so that the last step is a rename.
    with tempfile.TemporaryDirectory(dir=run.output.parent) as temporary:
        folder = Path(temporary) / "model"
        save(model, tokenizer, folder)
        (folder / "TRAINING.md").write_text(training_log(run, folder, len(stream)), encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)  # the weights are written for their owner alone
        if run.output.exists():
            shutil.rmtree(run.output)
        folder.rename(run.output)


def parse_options() -> Run:
    """The run that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="folder to write (default: the embedded model)")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help=f"steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the windows")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps on a few files; needs --output")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be 1 or more, got {options.steps}")
    if options.smoke and options.output.resolve() == MODEL_DIR:
        parser.error("--smoke would replace the embedded model by an untrained one: give another folder with --output")
    steps = SMOKE_STEPS if options.smoke else options.steps
    return Run(options.output, steps, options.seed, options.threads, options.smoke)


def training_sources(run: Run) -> list[str]:
    """The text of every training file, sorted by name."""
    folder = texts.stdlib_folder()
    files = texts.training_files(folder)[: SMOKE_FILES if run.smoke else None]
    return [texts.read_source(folder, file) for file in files]


def train_tokenizer(sources: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the sources; a newline and its indentation become one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    settings: dict[str, Any] = {"special_tokens": list(SPECIAL.values()), "vocab_size": VOCABULARY}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, **settings)
    backend.train_from_iterator(sources, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL)


def token_stream(tokenizer: PreTrainedTokenizerFast, sources: list[str]) -> Tensor:
    """Tokens of the sources one after the other, each between a beginning and an end token."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return torch.tensor([number for source in sources for number in (bos, *tokenizer.encode(source), eos)])


def model_config() -> LlamaConfig:
    """The config of the model: 3.3 million weights, every width a multiple of 128."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        **SPECIAL_IDS,
    )


def train(model: LlamaForCausalLM, stream: Tensor, run: Run) -> None:
    """Minimize the next-token loss over the run's steps, with a row of the log every hundred."""
    optimizers = make_optimizers(model)
    supply = batches(stream, run)
    start, recent = time.perf_counter(), list[float]()
    for step in range(1, run.steps + 1):
        set_rates(optimizers, step, run.steps)
        batch = next(supply)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        run.seconds = time.perf_counter() - start
        if step % LOG_EVERY == 0 or step in (1, run.steps):
            mean = sum(recent) / len(recent)
            run.rows.append(f"| {step} | {mean:.4f} | {step * TOKENS_PER_STEP} | {run.seconds:.0f} |")
            print(run.rows[-1], flush=True)
            recent.clear()


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices (in trials of a minute it reached half the perplexity), AdamW for the rest."""
    hidden = [value for name, value in model.named_parameters() if value.ndim == 2 and "embed" not in name]
    rest = [value for name, value in model.named_parameters() if value.ndim != 2 or "embed" in name]
    adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    muon = torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for optimizer in (adam, muon):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [adam, muon]


def set_rates(optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    """Set the learning rates: a linear warm-up, then a linear decay to a hundredth of the peak at the last step."""
    decay = 1.0 - (1.0 - FINAL_SHARE) * step / steps
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(step / min(WARMUP_STEPS, steps), 1.0) * decay


def batches(stream: Tensor, run: Run) -> Iterator[Tensor]:
    """Batches of windows in shuffled passes over the whole stream, each pass cut at a random offset."""
    generator = torch.Generator().manual_seed(run.seed)
    step = 0
    while True:
        length = LONG_WINDOW if step >= LONG_FROM * run.steps else SHORT_WINDOW
        offset = int(torch.randint(length, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - length, length)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chunk in starts.split(TOKENS_PER_STEP // length)[:-1]:
            yield torch.stack([stream[begin : begin + length + 1] for begin in chunk.tolist()])
            step += 1
            if length == SHORT_WINDOW and step >= LONG_FROM * run.steps:
                break


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16, and its tokenizer."""
    model.generation_config = transformers.GenerationConfig(**SPECIAL_IDS)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def training_log(run: Run, folder: Path, training: int) -> str:
    """The training log: the options, the losses, the held-out perplexities and some completions."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(run.seed)
    untrained = LlamaForCausalLM(model.config).eval()
    tokens, calibration = (tokenizer.encode(text) for text in (texts.evaluation_text(), texts.calibration_text()))
    count, rows = SMOKE_WINDOWS if run.smoke else EVALUATION_WINDOWS, "\n".join(run.rows)
    windows = consecutive(torch.tensor(tokens), EVALUATION_WINDOW, count, "evaluation text")
    perplexity, chance = (measure(m, windows, listener=silent).perplexity for m in (model, untrained))
    return f"""# Training log of the demonstration model

Written by `tools/train_demo_model.py`.

- Weights: {model.num_parameters()}. Seed: {run.seed}. Steps: {run.steps} of {TOKENS_PER_STEP} tokens.
- Training text: {training} tokens; calibration text: {len(calibration)}; evaluation text: {len(tokens)}.
- Peak learning rates: Muon {MUON_RATE} for the hidden matrices, AdamW {ADAM_RATE} for the rest; float32.
- Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, \
tokenizers {tokenizers.__version__}; {platform.machine()} processor, {run.threads} threads.
- Training took {run.seconds:.0f} seconds.

## Training loss

Mean since the row before, nats per token.

| step | loss | tokens | seconds |
| ---: | ---: | ---: | ---: |
{rows}

## Held-out perplexity

Evaluation text tokenized whole, first {count} non-overlapping windows of {EVALUATION_WINDOW} tokens; exp of the mean
negative log-likelihood per predicted token.

| model | perplexity |
| --- | ---: |
| trained, bfloat16, as saved and loaded again | {perplexity:.3f} |
| untrained, same configuration, float32 | {chance:.1f} |

## Completions

{completions(model, tokenizer, run)}
"""


def completions(model: Any, tokenizer: Any, run: Run) -> str:
    """Each prompt with what the model makes of it; as text, because formatters rewrite what is marked as Python."""
    length = SMOKE_NEW_TOKENS if run.smoke else NEW_TOKENS
    blocks: list[str] = []
    for prompt in PROMPTS:
        for title, options in (("Greedy", {"do_sample": False}), ("Sampled at 0.8", {"do_sample": True})):
            torch.manual_seed(run.seed)
            extra = {"temperature": 0.8, "top_k": 0} if options["do_sample"] else {}
            output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=length, **options, **extra)
            blocks.append(f"{title}:\n\n```text\n{tokenizer.decode(output[0], skip_special_tokens=True)}\n```")
    return "\n\n".join(blocks)


if __name__ == "__main__":
    main()
