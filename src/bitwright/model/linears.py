"""The linears of a block: which matrices multiply, where their rows lie in the module, and which read one input."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from bitwright.core.block import Layout, LinearGroup, Place
from bitwright.core.weight import Weight, starred
from bitwright.model.discover import ROUTER, SMALL, SMALLEST, UNNAMED, is_router
from bitwright.model.kinds import Kind
from bitwright.model.recording import Product, Recording
from bitwright.model.sources import Sources

OTHERWISE = "read in another way than by a product"
NOT_READ = "not read in a forward pass"
REORDERED = "its rows are reordered as transformers loads it"


def linears_of(weight: Weight, block: str) -> list[str]:
    """The linears of a weight, by their names in the block: one, or one for each expert."""
    name = weight.name.removeprefix(f"{block}.")
    return [f"{name}.{expert}" for expert in range(weight.slices)] if weight.stacked else [name]


_Matrices = dict[str, dict[int | None, tuple[Place, ...]]]
"""The places of the matrices of a tensor: one, or one for each expert."""


def laid_out(sources: Sources, path: str, kind: Kind) -> tuple[str, Layout, tuple[Weight, ...], dict[str, str]]:
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
    kind: Kind, tensor: str, matrices: Mapping[int | None, tuple[Place, ...]], whole: Mapping[str, str]
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


def _multiplying(places: tuple[Place, ...], kind: Kind, shape: tuple[int, ...], transposed: bool) -> tuple[Place, ...]:
    """Places with rows as they multiply."""
    turned = [next(iter(kind.orientation(place.parameter) or {False})) for place in places]
    if transposed:  # rows of the tensor are inputs
        return (replace(places[0], rows=(0, shape[-1], 1), transposed=turned[0]),)
    return tuple(replace(place, transposed=way) for place, way in zip(places, turned, strict=True))


def groups_of(layout: Layout, recording: Recording, linears: Sequence[str]) -> Iterator[LinearGroup]:
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
