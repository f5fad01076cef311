"""Write a Llama checkpoint of any size with random weights, to time work on models that nobody has to download.

    python tools/make_random_checkpoint.py OUTPUT --size 3B
    python tools/make_random_checkpoint.py OUTPUT --size 7B --layers 4 --shard-size 1GB
    python tools/make_random_checkpoint.py OUTPUT --hidden 512 --mlp 1536 --layers 6 --heads 8 --vocab 4096

Sizes have the shapes of Llama-3.2-1B and -3B, TinyLlama-1.1B, Llama-2-7B and -70B; `tiny` is for tests. A model speaks
no language, and its tokenizer knows bytes only. If the command is killed, nothing is at OUTPUT, and it begins anew.

Weights have heavy tails, as trained ones have: Student's t with `--tail` degrees of freedom (more than 2) times a
factor per row. With the default of 5, 1.30% of a linear's weights lie beyond three standard deviations, with 10 it is
0.94%, with 20 0.75% (measured on linears of 1024 and 3072); for a normal distribution it is 0.27%, for the embedded
model 0.51%. The largest weight is 18 to 39 standard deviations out with 5, 7 to 11 with 20.
The standard deviation is 1 / sqrt(in features): a linear's outputs are then as large as its inputs at every width, so
that activations neither vanish in a tiny model nor overflow in a large one. At the widths of real models it stays
near the 0.02 that they begin with (0.006 to 0.022). Norms are near 1, with a few larger channels.

For speed only one pool of 2^22 values is drawn. Each row of a tensor is a window of the pool, which begins where no
other row's does, times a factor of its own and the tensor's signs per column: good for time and memory, no sample for
statistics. Equal seed, tail and dimensions give equal tensors, whatever the shards (with one version of NumPy).
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from bitwright.checkpoint.header import TensorEntry, build_header, file_order
from bitwright.checkpoint.layout import INDEX, SINGLE
from bitwright.checkpoint.merge import METADATA
from bitwright.checkpoint.output import OutputFolder, require_free, work_folder
from bitwright.checkpoint.writer import atomic, write_json
from bitwright.core.errors import OutputError, UserError, nearest
from bitwright.core.progress import Listener, Progress, silent
from bitwright.core.recipe import Recipe
from bitwright.core.tensor_bytes import memory_of
from bitwright.report.progress import ProgressReport
from llama_shapes import SIZES, Shape

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
POOL, BLOCK = 2**22, 2**20  # the values drawn; the elements in memory at a time
ROW_SPREAD = 0.2  # the standard deviation of the logarithm of a row's factor
NORM_SPREAD, LARGE_EVERY, LARGE = 0.1, 512, (4.0, 16.0)  # one channel in 512 of a norm is this many times larger
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SIDECAR_BYTES = 2**20  # config, tokenizer and index, at most


@dataclass(frozen=True)
class Weights:
    """The source of all tensors: a pool of Student-t values with variance 1, [POOL + widest row].

    Its end repeats its beginning.
    """

    seed: int
    pool: NDArray[np.float32]

    @classmethod
    def draw(cls, seed: int, tail: float, widest: int) -> "Weights":
        """Draw the pool of a seed, for rows of at most ``widest`` elements.

        Raises UserError for a ``tail`` without a variance.
        """
        if not (tail > 2 and math.isfinite(tail)):
            raise UserError(f"--tail is {tail}; Student's t has a standard deviation only above 2; the default is 5")
        drawn = _generator(seed, "pool").standard_t(tail, POOL) * math.sqrt((tail - 2) / tail)
        return cls(seed, np.resize(drawn.astype(np.float32), POOL + widest))

    def blocks(self, entry: TensorEntry) -> Iterator[Tensor]:
        """A tensor's elements in order, at most BLOCK (or one row) at a time; each block overwrites the one before."""
        generator = _generator(self.seed, entry.name)
        if len(entry.shape) == 1:
            yield torch.from_numpy(_norm(generator, *entry.shape)).to(entry.dtype)
            return
        rows, width = entry.shape
        distance = max(1, POOL // rows)
        starts = (generator.permutation(rows) * distance + generator.integers(distance, size=rows)) % POOL
        # the mean of the factor's square is 1, so that the tensor has the standard deviation that is stated above
        factors = generator.lognormal(-(ROW_SPREAD**2), ROW_SPREAD, rows) / math.sqrt(width)
        signs = generator.choice(np.array([-1, 1], np.float32), width)
        block = np.empty((max(1, min(rows, BLOCK // width)), width), np.float32)
        for first in range(0, rows, len(block)):
            part = block[: rows - first]
            for row, start, factor in zip(part, starts[first:], factors[first:], strict=False):
                np.multiply(self.pool[start : start + width], np.float32(factor), out=row)
            part *= signs
            yield torch.from_numpy(part).to(entry.dtype)


def _norm(generator: np.random.Generator, channels: int) -> NDArray[np.float32]:
    """A norm's weight: near 1, a few channels larger."""
    weight = 1 + NORM_SPREAD * generator.standard_normal(channels)
    large = generator.permutation(channels)[: max(1, channels // LARGE_EVERY)]
    weight[large] *= generator.uniform(*LARGE, len(large))
    return weight.astype(np.float32)


def _generator(seed: int, name: str) -> np.random.Generator:
    """The random generator of one tensor, which is the same wherever and whenever the tensor is written."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()))


def main(
    output: Path,
    size: Annotated[str | None, typer.Option(help=f"One of {', '.join(SIZES)}.")] = None,
    seed: int = 0,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    shard_size: Annotated[str, typer.Option(help="Larger models are split into files of at most this.")] = "5GB",
    tail: Annotated[float, typer.Option(help="Degrees of freedom of Student's t; fewer are heavier.")] = 5.0,
    hidden: int | None = None,
    mlp: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    kv_heads: Annotated[int | None, typer.Option(help="As many as heads, if no size says otherwise.")] = None,
    vocab: int | None = None,
    tied: Annotated[bool | None, typer.Option("--tied/--untied", help="One matrix for embedding and head.")] = None,
) -> None:
    """Write a random checkpoint; dimensions override the size's."""
    dimensions = {"hidden": hidden, "mlp": mlp, "layers": layers, "heads": heads, "kv_heads": kv_heads, "vocab": vocab}
    try:
        shape = shape_of(size, dimensions | {"tied": tied})
        if dtype not in DTYPES:
            raise UserError(f"there is no dtype '{dtype}'; {nearest(dtype, DTYPES)}")
        shard_bytes = Recipe(model=str(output), scheme="W4A16", shard_size=shard_size).shard_bytes  # it reads sizes
        with ProgressReport(Console(stderr=True)) as report:
            nbytes = write_checkpoint(output, shape, seed, DTYPES[dtype], shard_bytes, tail, report)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{output}: {nbytes} bytes of weights")


def shape_of(size: str | None, asked: dict[str, Any]) -> Shape:
    """The shape of a size, with the dimensions that are asked for (not None).

    Raises UserError if a dimension is missing, or the size is unknown.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if size is not None:
        if size not in SIZES:
            raise UserError(f"there is no size '{size}'; {nearest(size, SIZES)}")
        return replace(SIZES[size], **given)
    given = {"kv_heads": given.get("heads"), "tied": False} | given
    missing = [f"--{name}" for name in ("hidden", "mlp", "layers", "heads", "vocab") if name not in given]
    if missing:
        raise UserError(f"without a --size all dimensions are needed; give {', '.join(missing)} too, or a size")
    return Shape(**given)


def write_checkpoint(
    output: Path,
    shape: Shape,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 5 * 10**9,
    tail: float = 5.0,
    listener: Listener = silent,
) -> int:
    """Write the folder ``output``, which must not be there, and return the bytes of its tensors. Raises UserError."""
    weights = Weights.draw(seed, tail, max(shape.hidden, shape.mlp))
    shards = _shards(shape.tensors(dtype), shard_bytes)
    total = sum(entry.nbytes for entries in shards.values() for entry in entries)
    if output.exists():
        raise OutputError(f"{output}: exists and is kept as it is; choose another output, or remove it first")
    left = sum(path.stat().st_size for path in work_folder(output.resolve()).rglob("*.safetensors"))
    require_free(output, total + SIDECAR_BYTES - left)
    with OutputFolder.claim(output, restart=True) as folder:
        done = 0
        for file, entries in shards.items():
            for written in _write_shard(folder.path / file, entries, weights):
                done += written
                listener(Progress("write", done, total, "bytes"))
        if len(shards) > 1:
            homes = {entry.name: file for file, entries in shards.items() for entry in entries}
            write_json(folder.path / INDEX, {"metadata": {"total_size": total}, "weight_map": homes})
        _write_sidecar_files(folder.path, shape, dtype)
        folder.publish()
    return total


def _shards(tensors: Iterable[TensorEntry], shard_bytes: int) -> dict[str, list[TensorEntry]]:
    """The tensors of each file by its name, in the model's order, each file as full as ``shard_bytes`` allows."""
    groups: list[list[TensorEntry]] = [[]]
    for entry in tensors:
        if groups[-1] and sum(other.nbytes for other in groups[-1]) + entry.nbytes > shard_bytes:
            groups.append([])
        groups[-1].append(entry)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, start=1)}


def _write_shard(path: Path, entries: list[TensorEntry], weights: Weights) -> Iterator[int]:
    """Write one file; yield the size of each block in bytes once it is written."""
    header = build_header(entries, METADATA)
    with atomic(path, len(header) + sum(entry.nbytes for entry in entries)) as file:
        file.write(header)
        for entry in file_order(entries):
            for block in weights.blocks(entry):
                yield file.write(memory_of(block))


def _write_sidecar_files(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """Write config.json, and a tokenizer of one token per byte and the special ones."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL.values()]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied,
        bos_token_id=alphabet.index(SPECIAL["bos_token"]),
        eos_token_id=alphabet.index(SPECIAL["eos_token"]),
        dtype=str(dtype).removeprefix("torch."),
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)
