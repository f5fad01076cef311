"""The anatomy of a model: its blocks, their linears, which of them read the same input, and its sites.

Nothing of it comes from a list of architectures. The blocks are where transformers' own forward pass stops; what a
linear is, and what it reads, is seen in one recorded call of each kind of block; sites are found and proven by
arithmetic (``sites.py``).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from bitwright.core.block import Layout, Topology
from bitwright.core.errors import CheckpointError, UserError
from bitwright.core.weight import Weight
from bitwright.model.calls import with_hidden
from bitwright.model.kinds import Kind, recorded, run_block, signature_of
from bitwright.model.linears import groups_of, laid_out, linears_of
from bitwright.model.sites import find_sites
from bitwright.model.skeleton import Skeleton
from bitwright.model.sources import Sources

SEGMENTS, TOKENS = 2, 24
"""The calls that are recorded: enough tokens to reach most experts."""


@dataclass(frozen=True)
class BlockAnatomy:
    """A block: its path in the checkpoint and in the model, its linears, and how they lie in its module.

    ``weights`` are the tensors that are linears, or stacks of them; ``kept`` are the other matrices, and why.
    ``joins``: calls of several segments can be joined into one.
    """

    name: str
    path: str
    topology: Topology
    layout: Layout
    weights: tuple[Weight, ...]
    kept: Mapping[str, str]
    joins: bool


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a model in the order in which data flows through them, each once."""

    blocks: tuple[BlockAnatomy, ...]

    def block(self, path: str) -> BlockAnatomy:
        """The block at a path of the model."""
        return next(block for block in self.blocks if block.path == path)


def dissect(skeleton: Skeleton, vocabulary: int, *, sites: bool = True) -> Anatomy:
    """Find the anatomy of a model, its sites too if they are asked for.

    No weight is read: one block of each kind is run with random ones, and the others pass on what they are given. If
    the model does not go through with that, because a block needs what an earlier one has left for it, all are run.
    Raises CheckpointError if no blocks are found.
    """
    try:
        return _dissected(skeleton, vocabulary, sites, all_run=False)
    except UserError:
        raise
    except Exception:  # whatever a model's own code raises
        return _dissected(skeleton, vocabulary, sites, all_run=True)


@contextmanager
def seeded() -> Iterator[None]:
    """A context in which torch draws the same random numbers each time; its own go on behind it as if nothing were."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


@torch.no_grad()
def _dissected(skeleton: Skeleton, vocabulary: int, sites: bool, all_run: bool) -> Anatomy:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(100, vocabulary // 2), vocabulary, (SEGMENTS, TOKENS), generator=generator)
    blocks, kinds = dict[str, BlockAnatomy](), dict[object, tuple[Kind, BlockAnatomy]]()
    with seeded(), skeleton.walk(tokens, random=True) as walk:
        while walk.name is not None and walk.name != skeleton.head:
            path = walk.name
            module = skeleton.parts[path]
            signature = signature_of(module)
            if all_run or signature not in kinds:
                with skeleton.filled(path, random=True):
                    if signature not in kinds:
                        kind = recorded(module, walk.calls)
                        kinds[signature] = kind, _block(skeleton.sources, path, kind, None, sites)
                    results = [run_block(module, call) for call in walk.calls]
            else:
                results = [with_hidden(kinds[signature][0].result, call.hidden) for call in walk.calls]
            if path not in blocks:
                kind, known = kinds[signature]
                blocks[path] = _block(skeleton.sources, path, kind, known, sites)
            walk.advance(results)
    if not blocks:
        raise CheckpointError(
            f"{skeleton.checkpoint.folder}: no blocks were found: transformers' forward pass goes through no list of "
            "modules. Methods that look at one weight alone work on any model: --method rtn, --method easyquant"
        )
    return Anatomy(tuple(blocks.values()))


def _block(sources: Sources, path: str, kind: Kind, known: BlockAnatomy | None, sites: bool) -> BlockAnatomy:
    """The anatomy of a block; ``known`` is that of the first block of its kind, with the same sites."""
    name, layout, weights, kept = laid_out(sources, path, kind)
    if known is not None and known.layout == layout:
        return replace(known, name=name, path=path, weights=weights, kept=kept)
    linears = [linear for weight in weights for linear in linears_of(weight, name)]
    groups = tuple(groups_of(layout, kind.recording, linears))
    proven = find_sites(kind.module, layout, groups, kind.call) if sites else ()
    return BlockAnatomy(name, path, Topology(groups, proven), layout, weights, kept, kind.joins)
