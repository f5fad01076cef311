"""Sites: where channels of a block can be scaled without changing its output. They are found and proven by arithmetic.

Take a producer, a norm's gain or the rows of a linear, and divide its channels by random scales. A product reads them
if each channel of its inputs is divided by one of the scales, whatever the token; multiplying the columns of its weight
by the same scales makes good for it. If nothing else changes, and the block's output does not either, there is a site,
and which scale belongs to which channel has been read off. What lies between, attention with grouped heads or a gate,
need not be known. All is computed in float64, so a site that is none shows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from bitwright.core.block import Layout, LinearGroup, Side, Site
from bitwright.core.weight import starred
from bitwright.model.calls import Call
from bitwright.model.laboratory import (
    Laboratory,
    Readers,
    Run,
    close,
    index_of,
    laboratory,
    proven,
    readers_of,
    scales,
    site_of,
)
from bitwright.steps.transform import apply_site

OFFSETS = (0.0, 1.0)
"""What a norm adds to its weight: Gemma's have 1."""


@torch.no_grad()
def find_sites(module: nn.Module, layout: Layout, groups: Sequence[LinearGroup], call: Call) -> tuple[Site, ...]:
    """Find the sites of a block, in the order in which data flows. ``call`` is one that it was given."""
    try:
        lab = laboratory(module, layout, call)
        base = lab.run(lab.tensors)
    except (RuntimeError, TypeError, ValueError):  # a block that computes in one dtype only
        return ()
    order = {name: place for place, group in enumerate(groups) for name in group.linears}
    proposed = [*_behind_norms(lab, base), *_behind_linears(lab, base, groups), *_queries_and_keys(lab, base, groups)]
    proposed = [replace(site, shift=_takes_shift(lab, base, site)) for site in proposed]
    sites = [_told_apart(site, order) for site in proposed]
    sites = [site for site in sites if site.consumers or len(site.producers) > 1]
    sites.sort(key=lambda site: _place(site, order))
    return _named(sites)


def _behind_norms(lab: Laboratory, base: Run) -> Iterator[Site]:
    for name, part in lab.module.named_modules():
        weight = dict(part.named_parameters(recurse=False)).get("weight")
        producer = _named_in_block(lab.layout, f"{name}.weight")
        if weight is None or weight.dim() != 1 or producer is None:
            continue
        for offset in OFFSETS:
            side = Side(producer, offset=offset)
            readers = readers_of(lab, base, (side,), len(weight))
            if readers:
                yield site_of((side,), readers, len(weight))
                break


def _behind_linears(lab: Laboratory, base: Run, groups: Sequence[LinearGroup]) -> Iterator[Site]:
    stages: dict[str, list[str]] = {}
    for group in groups:
        for name in group.linears:
            stages.setdefault(starred(f"{name}."), []).append(name)
    shapes = {name: tensor.shape for name, tensor in lab.tensors.items()}
    for names in stages.values():
        rows = shapes[f"{names[0]}.weight"][0]
        if any(shapes[f"{name}.weight"][0] != rows for name in names):
            continue
        for chosen in _subsets(lab, base, names, rows):
            readers = readers_of(lab, base, _sides(names, chosen, rows), len(chosen))
            if readers:
                yield from _one_each(names, chosen, rows, readers)
                break


def _subsets(lab: Laboratory, base: Run, names: list[str], rows: int) -> Iterator[list[int]]:
    """Rows of a linear that may be a producer: all, those that token 0 shows, or one half beside a gate."""
    every = list(range(rows))
    yield every
    if len(names) == 1:
        yield from _values_in(lab, base, names[0], rows)
    widths = {x.shape[-1] for linears, x in base.products if not set(linears) & set(names)}
    if rows // 2 in widths:
        yield from (every[rows // 2 :], every[: rows // 2], every[1::2], every[::2])


def _values_in(lab: Laboratory, base: Run, name: str, rows: int) -> Iterator[list[int]]:
    """The rows of values in a linear that makes queries and keys too.

    The first token attends to itself alone, so what leaves attention there is its value, whatever its query and key.
    """
    scale = scales(rows, 1)
    run = lab.run(apply_site(lab.tensors, Site("", (Side(name),), (), rows), scale))
    tokens = lab.call.hidden.shape[-2]
    for (linears, x0), (_, x1) in zip(base.products, run.products, strict=False):
        if name not in linears and x0.shape == x1.shape and x0.numel() % (tokens * x0.shape[-1]) == 0:
            before, after = (x.reshape(-1, tokens, x.shape[-1])[:, 0] for x in (x0, x1))
            index = None if close(before, after) else index_of(before, after, scale)
            if index is not None and -1 not in index and len(set(index)) < rows:
                yield sorted(set(index))
                return


def _sides(names: Sequence[str], chosen: Sequence[int], rows: int) -> tuple[Side, ...]:
    """Producers; rows that are not chosen have no scale. Experts have the same scales."""
    index = [-1] * rows
    for place, row in enumerate(chosen):
        index[row] = place
    return tuple(Side(name, None if len(chosen) == rows else tuple(index)) for name in names)


def _one_each(names: Sequence[str], chosen: Sequence[int], rows: int, readers: Readers) -> Iterator[Site]:
    """A site for each producer; experts that no token reached are as the others."""
    for name in names:
        own = (
            readers if len(names) == 1 else {r: index for r, index in readers.items() if _numbers(r) == _numbers(name)}
        )
        if own:
            yield site_of(_sides([name], chosen, rows), own, len(chosen))


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdecimal()]


def _takes_shift(lab: Laboratory, base: Run, site: Site) -> bool:
    tensors = lab.tensors
    if not site.consumers or not all(f"{s.module}.bias" in tensors for s in (*site.producers, *site.consumers)):
        return False
    return proven(lab, base, site, 0.1 * scales(site.channels, 4))


def _queries_and_keys(lab: Laboratory, base: Run, groups: Sequence[LinearGroup]) -> Iterator[Site]:
    """Sites between queries and keys: a head's product does not change if one is divided by what the other gains."""
    heads = (getattr(part, "head_dim", None) for part in lab.module.modules())
    widths = {width for width in heads if isinstance(width, int)}
    shapes = {name: tensor.shape for name, tensor in lab.tensors.items()}
    named = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 1 and ".weight" in name]
    together = [*(group.linears for group in groups), tuple(named)]
    for names in together:
        starts = {name: name.rpartition(".")[2][:1] for name in names}
        pairs = [(q, k) for q in names for k in names if starts[q] == "q" and starts[k] == "k"]
        for queries, keys in pairs:
            rows = [shapes[f"{name}.weight"][0] for name in (queries, keys)]
            for offset in OFFSETS if names is together[-1] else (0.0,):
                proposed = (s for width in sorted(widths) for s in _tied_pairs(queries, keys, rows, width, offset))
                site = next((site for site in proposed if proven(lab, base, site)), None)
                if site is not None:
                    yield site
                    break


def _tied_pairs(queries: str, keys: str, rows: Sequence[int], width: int, offset: float) -> Iterator[Site]:
    """Sites q.k whose scales are tied as rotary positions mix channels: none, halves of a head, neighbours."""
    if any(count % width for count in rows) or rows[0] < rows[1] or rows[0] % rows[1]:
        return
    heads, kv_heads = (count // width for count in rows)
    for rotated, neighbours in ((0, False), (width, False), (width, True), (width // 2, False), (width // 4, False)):
        half = rotated // 2
        tied = [(c // 2 if neighbours else c % half) if c < rotated else c - half for c in range(width)]
        free = width - half
        key_index = tuple(h * free + tied[c] for h in range(kv_heads) for c in range(width))
        query_index = tuple((h * kv_heads // heads) * free + tied[c] for h in range(heads) for c in range(width))
        producers = (Side(queries, query_index, offset=offset), Side(keys, key_index, reciprocal=True, offset=offset))
        yield Site("q.k", producers, (), kv_heads * free)


def _told_apart(site: Site, order: Mapping[str, int]) -> Site:
    """A site whose readers are told apart: linears that can be quantized, and others."""
    consumers = sorted((side for side in site.consumers if side.module in order), key=lambda side: order[side.module])
    in_full = tuple(side for side in site.consumers if side.module not in order)
    return replace(site, consumers=tuple(consumers), in_full=in_full)


def _place(site: Site, order: Mapping[str, int]) -> tuple[float, ...]:
    if site.consumers:
        return (min(order[side.module] for side in site.consumers), 0)
    return (min(order.get(side.module, 0) for side in site.producers), 1)


def _named(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Sites with names, such as ``norm->qkv``, each once."""
    named = [replace(site, name=site.name or f"{_short(site.producers)}->{_short(site.consumers)}") for site in sites]
    names = [site.name for site in named]
    full = (f"{site.producers[0].module}->{_short(site.consumers)}" for site in named)
    return tuple(
        replace(site, name=long if names.count(site.name) > 1 else site.name, paper=_of_paper(site.name))
        for site, long in zip(named, full, strict=True)
    )


def _of_paper(name: str) -> bool:
    """Whether OmniQuant's authors transform a site of this kind: behind norms, and in attention."""
    return name.startswith(("norm", "q.k")) or name.partition("->")[0] in ("v", "qkv", "query_key_value")


def _short(sides: Sequence[Side]) -> str:
    leaf = _leaf(sides[0].module).lower() if sides else ""
    if "norm" in leaf or leaf.startswith("ln"):
        return "norm"
    words = [_leaf(side.module).removesuffix("_proj") for side in sides]
    words = ["o" if word == "out" else word for word in words]
    words = list(dict.fromkeys(words))
    return "".join(words) if all(len(word) == 1 for word in words) else ",".join(words)


def _leaf(name: str) -> str:
    """The last part of a name that is no number."""
    return next(part for part in reversed(name.split(".")) if not part.isdecimal())


def _named_in_block(layout: Layout, parameter: str) -> str | None:
    name = next((name for name, place in layout.names.items() if place == parameter), None)
    return None if name is None or not name.endswith(".weight") else name.removesuffix(".weight")
