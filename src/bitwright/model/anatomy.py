"""The anatomy of a model: its blocks, their linears, which of them read the same input, and its sites.

Nothing of it comes from a list of architectures. The blocks are where transformers' own forward pass stops; what a
linear is, and what it reads, is seen in one recorded call of each kind of block; sites are found and proven by
arithmetic (``sites.py``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.core.block import Layout, LinearGroup, Place, Topology
from bitwright.core.errors import CheckpointError, UserError
from bitwright.core.weight import Weight, starred
from bitwright.model.calls import Call, UnlikeCallsError, hand_back, hidden_of, joined, split, with_hidden
from bitwright.model.class_code import weights_taken
from bitwright.model.discover import ROUTER, SMALL, SMALLEST, UNNAMED, is_router
from bitwright.model.recording import Product, Recording, record
from bitwright.model.sites import find_sites
from bitwright.model.skeleton import Skeleton
from bitwright.model.sources import Sources

SEGMENTS, TOKENS = 2, 24
"""The calls that are recorded: enough tokens to reach most experts."""
CLOSE = 1e-4
OTHERWISE = "read in another way than by a product"
NOT_READ = "not read in a forward pass"
REORDERED = "its rows are reordered as transformers loads it"


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


@torch.no_grad()
def _dissected(skeleton: Skeleton, vocabulary: int, sites: bool, all_run: bool) -> Anatomy:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(100, vocabulary // 2), vocabulary, (SEGMENTS, TOKENS), generator=generator)
    blocks, kinds = dict[str, BlockAnatomy](), dict[object, tuple[_Kind, BlockAnatomy]]()
    with skeleton.walk(tokens, random=True) as walk, torch.random.fork_rng([]):
        torch.manual_seed(0)
        while walk.name is not None and walk.name != skeleton.head:
            path = walk.name
            module = skeleton.parts[path]
            signature = _signature(module)
            if all_run or signature not in kinds:
                with skeleton.filled(path, random=True):
                    if signature not in kinds:
                        kind = _recorded(module, walk.calls)
                        kinds[signature] = kind, _block(skeleton.sources, path, kind, None, sites)
                    results = [_run(module, call) for call in walk.calls]
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


@dataclass(frozen=True)
class _Kind:
    """What was recorded of the first block of a kind; ``result`` is what it returned."""

    module: nn.Module
    recording: Recording
    call: Call
    result: Any
    joins: bool
    _taken: dict[str, frozenset[tuple[str, str]]] = field(default_factory=dict)

    @cached_property
    def orientations(self) -> dict[str, set[bool]]:
        """Whether products read each parameter transposed; also by names without numbers, for unreached experts."""
        used: dict[str, set[bool]] = {}
        for product in self.recording.products:
            factor = product.factor
            for name in (factor.parameter, starred(f"{factor.parameter}.")):
                used.setdefault(name, set()).add(factor.transposed)
        return used

    def orientation(self, parameter: str) -> set[bool] | None:
        """The ways in which products read a parameter; None if none does."""
        return self.orientations.get(parameter) or self.orientations.get(starred(f"{parameter}."))

    def taken_from(self, parameter: str) -> str | None:
        """The class whose code takes the weight of a linear, as kernels do that are not run here; None if none does."""
        *path, leaf, end = ("", *parameter.split("."))
        owner = ".".join(path).strip(".")
        if owner not in self._taken:
            self._taken[owner] = weights_taken(self.module.get_submodule(owner))
        return type(self.module.get_submodule(owner)).__name__ if (leaf, end) in self._taken[owner] else None


def _signature(module: nn.Module) -> object:
    """What makes two blocks of one kind: classes, parameters, and settings, but for their number."""
    parts = []
    for name, part in module.named_modules():
        shapes = tuple((key, tuple(p.shape)) for key, p in part.named_parameters(recurse=False))
        plain = (bool, int, float, str, type(None))
        settings = {key: value for key, value in vars(part).items() if isinstance(value, plain) and key[0] != "_"}
        chosen = tuple(sorted((k, v) for k, v in settings.items() if k not in ("layer_idx", "layer_id", "block_idx")))
        parts.append((name, type(part), shapes, repr(chosen)))
    return tuple(parts)


def _recorded(module: nn.Module, calls: Sequence[Call]) -> _Kind:
    """Record the first block of a kind, on all segments if their calls can be joined."""
    own = {name: p.detach() for name, p in module.named_parameters()}
    results = [module(*call.args, **call.kwargs) for call in map(_alone, calls)]
    single = [hidden_of(result) for result in results]
    try:
        together = joined(calls)
        whole = split(module(*together.args, **dict(together.kwargs)), calls)
        joins = all(_close(hidden_of(a), b) for a, b in zip(whole, single, strict=True))
    except (UnlikeCallsError, RuntimeError, IndexError, ValueError):
        joins = False
    call = joined(calls if joins else calls[:1])
    return _Kind(module, record(module, call, own), call, results[0], joins)


def _alone(call: Call) -> Call:
    return joined([call])


def _run(module: nn.Module, call: Call) -> Any:
    """What a block returns; what it adds to a dictionary is handed back."""
    own = _alone(call)
    result = module(*own.args, **own.kwargs)
    hand_back(own, [call])
    return result


def _close(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool((left - right).abs().max() <= CLOSE * right.abs().max())


def _block(sources: Sources, path: str, kind: _Kind, known: BlockAnatomy | None, sites: bool) -> BlockAnatomy:
    """The anatomy of a block; ``known`` is that of the first block of its kind, with the same sites."""
    name, layout, weights, kept = _laid_out(sources, path, kind)
    if known is not None and known.layout == layout:
        return replace(known, name=name, path=path, weights=weights, kept=kept)
    linears = [linear for weight in weights for linear in linears_of(weight, name)]
    groups = tuple(_groups(layout, kind.recording, linears))
    proven = find_sites(kind.module, layout, groups, kind.call) if sites else ()
    return BlockAnatomy(name, path, Topology(groups, proven), layout, weights, kept, kind.joins)


def linears_of(weight: Weight, block: str) -> list[str]:
    """The linears of a weight, by their names in the block: one, or one for each expert."""
    name = weight.name.removeprefix(f"{block}.")
    return [f"{name}.{expert}" for expert in range(weight.slices)] if weight.stacked else [name]


_Matrices = dict[str, dict[int | None, tuple[Place, ...]]]
"""The places of the matrices of a tensor: one, or one for each expert."""


def _laid_out(sources: Sources, path: str, kind: _Kind) -> tuple[str, Layout, tuple[Weight, ...], dict[str, str]]:
    """How a block's tensors lie in its module, which are linears, and why the other matrices are none."""
    parameters = {name: p.dim() for name, p in kind.module.named_parameters()}
    tensors = {tensor for name in parameters for tensor in sources.tensors(f"{path}.{name}")}
    block = _common(tensors)
    whole = {tensor: name for name in parameters if (tensor := sources.whole(f"{path}.{name}")) is not None}
    names = {tensor.removeprefix(f"{block}."): name for tensor, name in whole.items()}
    views, weights, kept = dict[str, tuple[Place, ...]](), list[Weight](), dict[str, str]()
    products = [name for name, dim in parameters.items() if dim in (2, 3) and not name.endswith("bias")]
    matrices = _matrices(sources, path, products)
    for tensor in sorted(matrices, key=lambda t: (list(parameters).index(_first(matrices[t]).parameter), _order(t))):
        reason, transposed = _examined(kind, tensor, matrices[tensor], whole)
        shape = sources.checkpoint.entry(tensor).shape
        if reason is None and (min(shape[-2:]) < SMALLEST or is_router(tensor)):
            reason = ROUTER if is_router(tensor) else SMALL
        if reason is not None:
            kept[tensor] = reason
            continue
        weight = Weight(tensor, tensor.removesuffix(".weight"), shape, transposed)
        weights.append(weight)
        if tensor in whole and not weight.stacked and not transposed:
            continue
        for linear, placed in zip(linears_of(weight, block), matrices[tensor].values(), strict=True):
            views[linear] = _multiplying(placed, kind, shape, transposed)
            names.pop(tensor.removeprefix(f"{block}."), None)
    biases = {tensor for tensor in tensors if tensor.endswith("bias")}
    kept |= dict.fromkeys(sorted(tensors - matrices.keys() - whole.keys() - biases), REORDERED)
    return block, Layout(names, views), tuple(weights), kept


def _matrices(sources: Sources, path: str, parameters: Sequence[str]) -> _Matrices:
    matrices: _Matrices = {}
    for name in parameters:
        if f"{path}.{name}" not in sources.conversions:
            continue
        for (tensor, expert), places in sources.places(f"{path}.{name}").items():
            inside = tuple(replace(p, parameter=p.parameter.removeprefix(f"{path}.")) for p in places)
            matrices.setdefault(tensor, {})[expert] = inside
    return {tensor: dict(sorted(own.items(), key=lambda pair: pair[0] or 0)) for tensor, own in matrices.items()}


def _examined(
    kind: _Kind, tensor: str, matrices: Mapping[int | None, tuple[Place, ...]], whole: Mapping[str, str]
) -> tuple[str | None, bool]:
    """Why a tensor is no linear, None if it is one; and whether it is stored [I, O]."""
    places = [place for own in matrices.values() for place in own]
    turned = set[bool]()
    for place in places:
        orientations = kind.orientation(place.parameter)
        if place.parameter in kind.recording.others or (orientations is not None and len(orientations) > 1):
            return OTHERWISE, False
        if orientations is None:
            return NOT_READ, False
        if (taker := kind.taken_from(place.parameter)) is not None:
            return f"read by {taker} without its linear", False
        turned.add(place.transposed != next(iter(orientations)))
    transposed = turned == {True}
    if len(turned) > 1 or (transposed and any(len(own) > 1 for own in matrices.values())):
        return REORDERED, False
    if next(iter(matrices)) is None and not tensor.endswith(".weight"):
        return UNNAMED, False
    return None, transposed


def _multiplying(places: tuple[Place, ...], kind: _Kind, shape: tuple[int, ...], transposed: bool) -> tuple[Place, ...]:
    """Places with rows as they multiply."""
    turned = [next(iter(kind.orientation(place.parameter) or {False})) for place in places]
    if transposed:  # rows of the tensor are inputs
        return (replace(places[0], rows=(0, shape[-1], 1), transposed=turned[0]),)
    return tuple(replace(place, transposed=way) for place, way in zip(places, turned, strict=True))


def _groups(layout: Layout, recording: Recording, linears: Sequence[str]) -> Iterator[LinearGroup]:
    """The linears that read one tensor each, in the order in which data flows; experts by their numbers."""
    reading: dict[str, dict[int | None, list[str]]] = {}
    for (parameter, index), names in readers(layout, linears).items():
        reading.setdefault(parameter, {})[index] = names
    by_input: dict[object, list[tuple[str, Product]]] = {}
    seen = set[str]()
    for product in recording.products:
        factor, x = product.factor, product.inputs
        own = reading.get(factor.parameter, {})
        for index in own if factor.index is None else [factor.index] if factor.index in own else []:
            place = (x.untyped_storage().data_ptr(), x.storage_offset(), x.shape[-1])
            key = (*place, index if factor.index is None else None)
            fresh = [name for name in own[index] if name not in seen]
            by_input.setdefault(key, []).extend((name, product) for name in fresh)
            seen.update(fresh)
    groups = [_group(members) for members in by_input.values() if members]
    order = {group.stage: place for place, group in reversed(list(enumerate(groups)))}
    groups += list(_alike(groups, [name for name in linears if name not in seen]))
    yield from sorted(groups, key=lambda group: (order.get(group.stage, len(order)), _order(group.linears[0])))


def readers(layout: Layout, linears: Sequence[str]) -> dict[tuple[str, int | None], list[str]]:
    """Linears by the parameter, and the expert in it, that holds their rows."""
    reading: dict[tuple[str, int | None], list[str]] = {}
    for linear in linears:
        whole = (Place(layout.names.get(f"{linear}.weight", ""), None, (0, 0, 1)),)
        for place in layout.linears.get(linear, whole):
            reading.setdefault((place.parameter, place.index), []).append(linear)
    return reading


def _group(members: Sequence[tuple[str, Product]]) -> LinearGroup:
    linears, stage = tuple(name for name, _ in members), starred(f"{members[0][0]}.")
    if len(linears) == 1:
        return LinearGroup(linears, linears[0], stage)
    common = set.intersection(*({name for name, same in product.modules if same} for _, product in members))
    return LinearGroup(linears, max(common - {""}, key=len, default=""), stage)


def _alike(groups: Sequence[LinearGroup], linears: Sequence[str]) -> Iterator[LinearGroup]:
    """The groups of experts that no token reached: as those of the others."""
    patterns = {group.stage: [starred(f"{name}.") for name in group.linears] for group in groups}
    left = {(starred(f"{name}."), _numbers(name)): name for name in linears}
    for stage, stars in patterns.items():
        for numbers in sorted({numbers for star, numbers in left if star in stars}):
            members = tuple(left[star, numbers] for star in stars if (star, numbers) in left)
            yield LinearGroup(members, members[0] if len(members) == 1 else "", stage)


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def _order(name: str) -> tuple[tuple[int, int, str], ...]:
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("."))


def _first(matrices: Mapping[int | None, tuple[Place, ...]]) -> Place:
    return next(iter(matrices.values()))[0]


def _common(names: set[str]) -> str:
    """The longest path that all names begin with."""
    split_names = [name.split(".") for name in names]
    shared = []
    for parts in zip(*split_names, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
