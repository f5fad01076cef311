"""Give a model the outlier channels that large language models have, without changing its function.

    python tools/make_outlier_model.py MODEL OUTPUT

A few channels in front of the linears (of each norm, and of the linear before the last one of the MLP if that is exact)
are multiplied by powers of two from 16 to 128, and the weights that read them are divided by the same. Powers of two
keep every dtype exact: the logits stay what they were. Small models have no such channels, large ones do (LLM.int8(),
arXiv 2208.07339), and they are what breaks quantized activations.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from bitwright.checkpoint.merge import merge_shards
from bitwright.checkpoint.output import OutputFolder
from bitwright.checkpoint.sidecar_files import COPIED
from bitwright.checkpoint.writer import copy_file, write_tensors
from bitwright.core.block import Site
from bitwright.model.source import Source
from bitwright.prepare.block_way import subject_of
from bitwright.steps.transform import apply_site

FACTORS = (16.0, 32.0, 64.0, 128.0)
SHARD_BYTES = 5 * 10**9


def main(
    model: Path,
    output: Path,
    channels: Annotated[int, typer.Option(help="Outlier channels per site.")] = 4,
    seed: Annotated[int, typer.Option(help="Chooses the channels.")] = 0,
) -> None:
    """Write the outlier version of a model folder."""
    source = Source.open(model)
    blocks = subject_of(source, "cpu").anatomy.blocks
    generator = torch.Generator().manual_seed(seed)
    with OutputFolder.claim(output) as folder:
        parts = [folder.work / "part-outside.safetensors"]
        inside = tuple(f"{block.name}." for block in blocks)
        outside = [name for name in source.checkpoint.names if not name.startswith(inside)]
        write_tensors(parts[0], {name: source.checkpoint.read(name) for name in outside})
        for number, (block, prefix) in enumerate(zip(blocks, inside, strict=True)):
            sites = [site for site in block.topology.sites if _takes_outliers(site)]
            parts.append(folder.work / f"part-{number:05d}.safetensors")
            tensors = _with_outliers(_read(source, prefix), sites, channels, generator)
            write_tensors(parts[-1], {prefix + name: tensor for name, tensor in tensors.items()})
        merge_shards(parts, folder.path, SHARD_BYTES)
        for path in {path for pattern in (*COPIED, "config.json") for path in model.glob(pattern) if path.is_file()}:
            copy_file(path, folder.path / path.name)
        folder.publish()


def _takes_outliers(site: Site) -> bool:
    """Whether a site begins at a norm, or at the linear before the last one of the MLP; not so inside attention."""
    return "attn" not in site.producers[0].module or "norm" in site.producers[0].module


def _read(source: Source, prefix: str) -> dict[str, Tensor]:
    names = [name for name in source.checkpoint.names if name.startswith(prefix)]
    return {name.removeprefix(prefix): source.checkpoint.read(name) for name in names}


def _with_outliers(
    tensors: dict[str, Tensor], sites: list[Site], channels: int, generator: torch.Generator
) -> dict[str, Tensor]:
    for site in sites:
        chosen = torch.randperm(site.channels, generator=generator)[:channels]
        factors = torch.tensor(FACTORS)[torch.randint(len(FACTORS), (len(chosen),), generator=generator)]
        scale = torch.ones(site.channels)
        scale[chosen] = 1 / factors
        moved = apply_site({name: t.float() for name, t in tensors.items()}, site, scale)
        tensors = {name: moved[name].to(t.dtype) for name, t in tensors.items()}
    return tensors


if __name__ == "__main__":
    typer.run(main)
