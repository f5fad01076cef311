"""Which linears get a scheme of their own, as a recipe says it: by a file, by patterns, or both."""

from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bitwright.core.errors import CheckpointError, RecipeError, SchemeError, shown
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import NAMED, Allocation, Scheme, schemes_for
from bitwright.core.small_files import parse_object, require_regular
from bitwright.core.weight import starred
from bitwright.stream.units import block_of

LARGEST_FILE = 2**26
"""Bytes of an allocation file: room for hundreds of thousands of linears."""
SHOWN = 3
MOST_PATTERNS = 8
HEAD = "lm_head"


@dataclass(frozen=True)
class AllocationRules:
    """The rules by which a recipe gives each linear its scheme.

    ``patterns`` are those of ``--scheme-for``, with their schemes. ``file`` is the allocation file; ``named`` are the
    linears in it with their schemes, None for one that stays in full precision. ``default`` is the scheme of all
    linears that neither a pattern nor the file names. ``excluded`` are the patterns of ``--exclude``. If several rules
    fit a linear, ``excluded`` takes precedence over ``patterns``, and ``patterns`` take precedence over the file.
    """

    default: Scheme
    patterns: tuple[tuple[str, Scheme], ...] = ()
    file: str | None = None
    named: Mapping[str, Scheme | None] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe) -> "AllocationRules":
        """Read the rules of a recipe. Raises RecipeError for a file or an entry that says no scheme."""
        default, named = (None, {}) if recipe.allocation is None else _read(Path(recipe.allocation))
        if recipe.scheme is not None:
            default = Scheme.parse(recipe.scheme)
        if default is None:
            raise RecipeError(f"--allocation {recipe.allocation} says no scheme for the other linears; give --scheme")
        if recipe.quantize_lm_head and named.get(HEAD, default) is None:
            del named[HEAD]
        patterns = tuple(schemes_for(recipe.patterns("scheme_for")))
        rules = cls(default, patterns, recipe.allocation, named, recipe.patterns("exclude"))
        rules._refuse_mixtures()
        return rules

    @property
    def mixed(self) -> bool:
        """Whether anything is said of single linears."""
        return bool(self.patterns or self.named)

    @property
    def file_names(self) -> frozenset[str]:
        """The linears that the allocation file names."""
        return frozenset(self.named)

    def blocks_of_another(self, linears: Collection[str]) -> int | None:
        """The number of blocks of the model that the file may have been written for, if this model has more.

        It looks so if the file names the output layer and the first blocks, all of their ``linears``, and no other. A
        run writes such a file; nobody is sure to have meant it.
        """
        if HEAD not in self.named:
            return None
        blocks: dict[str | None, list[str]] = {}
        for linear in linears:
            blocks.setdefault(block_of(linear), []).append(linear)
        blocks.pop(None, None)
        whole = [all(linear in self.named for linear in inside) for inside in blocks.values()]
        some = [any(linear in self.named for linear in inside) for inside in blocks.values()]
        count = sum(whole)
        first = [True] * count + [False] * (len(whole) - count)
        return count if 0 < count < len(whole) and whole == some == first else None

    @property
    def left_out(self) -> frozenset[str]:
        """The linears that the file leaves in full precision, and no pattern quantizes."""
        names = (name for name, scheme in self.named.items() if scheme is None)
        return frozenset(name for name in names if not any(_fits(name, pattern) for pattern, _ in self.patterns))

    def allocation(self, linears: Collection[str], kept_linears: Collection[str], others: Iterable[str]) -> Allocation:
        """The scheme of every linear of a model.

        ``linears`` are quantized, ``kept_linears`` stay in full precision. ``others`` are further tensors that stay:
        norms and embeddings, but also linears of an architecture that nobody has described. The default of the result
        is the default that was asked for; if no linear has that, it is the scheme that most linears have.

        Raises RecipeError for a pattern that fits none of the ``linears``, for two patterns that give one of them
        different schemes, and for a file that names other linears.
        """
        kept = {*kept_linears, *others} - {*linears}
        self._refuse_strangers(linears, kept)
        schemes: dict[str, Scheme | None] = {name: self.named.get(name, self.default) for name in linears}
        given_by: dict[str, tuple[str, Scheme]] = {}
        for pattern, scheme in self.patterns:
            for name in self._fitting(pattern, linears, kept_linears, kept):
                other, before = given_by.setdefault(name, (pattern, scheme))
                if before != scheme:
                    remedy = self._told_apart([(other, before), (pattern, scheme)], linears)
                    raise RecipeError(
                        f"--scheme-for {other}={before} and --scheme-for {pattern}={scheme} both fit {name}, and "
                        f"disagree; {remedy}"
                    )
                schemes[name] = scheme
        counted = Counter(scheme for scheme in schemes.values() if scheme is not None)
        default = self.default if self.default in counted or not counted else counted.most_common(1)[0][0]
        asked = {name: text for name in linears if (text := self.asked_for(name)) is not None}
        return Allocation(default, schemes | dict.fromkeys(kept_linears), asked)

    def asked_for(self, linear: str) -> str | None:
        """What gives a linear its scheme: an entry of --scheme-for, or the file; None if it has the default."""
        for pattern, scheme in self.patterns:
            if _fits(linear, pattern):
                return f"--scheme-for {pattern}={scheme}"
        return f"--allocation {self.file}" if self.named.get(linear) is not None else None

    def replaced_by(self, advice: Iterable[tuple[str, Scheme]], linears: Collection[str]) -> str:
        """What becomes of the patterns that contradict an advice, to go on after it; nothing if none does.

        The advice is patterns with their schemes, as --scheme-for takes them.
        """
        replaced, narrowed = list[str](), list[str]()
        advice = list(advice)
        for pattern, scheme in self.patterns:
            unlike = [other for other, given in advice if given != scheme]
            fitting = [name for name in linears if _fits(name, pattern)]
            if any(_fits(name, *unlike) for name in fitting):
                whole = all(_fits(name, *(other for other, _ in advice)) for name in fitting)
                (replaced if whole else narrowed).append(f"--scheme-for {pattern}={scheme}")
        text = f", in the place of {', '.join(replaced)}" if replaced else ""
        return text + (f", and take these linears out of {', '.join(narrowed)}" if narrowed else "")

    def _fitting(
        self, pattern: str, linears: Collection[str], kept_linears: Collection[str], kept: Collection[str]
    ) -> list[str]:
        """The linears that a pattern fits. Raises RecipeError if there is none.

        ``kept`` are tensors that are not quantized; not all need be linears, as ``kept_linears`` are.
        """
        fitting = [name for name in linears if _fits(name, pattern)]
        if fitting:
            return fitting
        unquantized = [name for name in kept_linears if _fits(name, pattern)]
        unquantized = unquantized or sorted(name for name in kept if _fits(name, pattern))
        if unquantized:
            raise RecipeError(f"--scheme-for {pattern} fits {_some(unquantized)} alone, {_why_kept(unquantized)}")
        leaves = {linear.rpartition(".")[2]: linear for linear in linears}
        close = get_close_matches(pattern.rpartition(".")[2].strip("*"), leaves, n=SHOWN, cutoff=0.3)
        near = ", ".join(leaves[leaf] for leaf in close)
        hint = f"; near it: {near}" if near else f"; they are called like {next(iter(linears), '')}"
        raise RecipeError(f"--scheme-for {pattern} fits no linear{hint}; * stands for any text, dots too")

    def _told_apart(self, overlapping: Sequence[tuple[str, Scheme]], linears: Collection[str]) -> str:
        """What to do about two entries that overlap: the shortest patterns for what one of them fits alone."""
        for widen in (lambda name: f"*.{name.rpartition('.')[2]}", starred, str):
            ways = list[str]()
            for pattern, scheme in overlapping:
                others = [other for other, unlike in self.patterns if unlike != scheme]
                alone = {name for name in linears if _fits(name, pattern) and not _fits(name, *others)}
                patterns = list(dict.fromkeys(widen(name) for name in linears if name in alone))
                exact = alone == {name for name in linears if _fits(name, *patterns)}
                if exact and 0 < len(patterns) <= MOST_PATTERNS:
                    ways.append(f"--scheme-for '{','.join(patterns)}={scheme}' in the place of {pattern}={scheme}")
            if ways:
                return f"make one of the patterns narrower: {min(ways, key=len)}"
        return "leave one of them out; an --allocation file can name its linears one by one"

    def _refuse_strangers(self, linears: Collection[str], kept: Collection[str]) -> None:
        """Raise RecipeError if the allocation file names a tensor that this model does not have as a linear.

        Also if it gives a scheme to a linear that stays in full precision, unless --exclude asks for that.
        """
        known = {*linears, *kept}
        strange = [name for name in self.named if name not in known]
        if strange:
            close = get_close_matches(strange[0], list(known), n=1, cutoff=0.3)
            hint = f"; it has {close[0]}" if close else ""
            raise RecipeError(
                f"--allocation {self.file} is of another model: {_some(strange)} is no linear of this one{hint}. Take "
                "the allocation.json of this model, or write the names as bitwright inspect --linears shows them"
            )
        kept_by_file = [name for name, scheme in self.named.items() if scheme is not None and name not in linears]
        asked = [name for name in kept_by_file if not any(_fits(name, pattern) for pattern in self.excluded)]
        if asked:
            scheme = self.named[asked[0]]
            raise RecipeError(f"--allocation {self.file} gives {_some(asked)} {scheme}, {_why_kept(asked)}")

    def _refuse_mixtures(self) -> None:
        """Raise RecipeError for schemes that cannot be together in one model."""
        entries = [(f"--scheme-for {pattern}={scheme}", scheme) for pattern, scheme in self.patterns]
        named = {name: scheme for name, scheme in self.named.items() if scheme is not None}
        entries += [(f"--allocation {self.file}: {name} at {scheme}", scheme) for name, scheme in named.items()]
        grids = (self.default.activations, self.default.kv)
        for where, scheme in entries:
            if (scheme.activations, scheme.kv) != grids:
                own = scheme.with_activations(*(None if grid is None else grid.bits for grid in grids))
                raise RecipeError(
                    f"{where} has other activations or KV cache than {self.default}, which are the same in the whole "
                    f"model; write {own}"
                )
            if scheme != self.default and {scheme, self.default} & {*NAMED.values()}:
                raise RecipeError(
                    f"{where} beside {self.default}: the grid of an engine is that of the whole model; take one "
                    "scheme for all, or schemes such as W4A16g32sym"
                )


def _read(path: Path) -> tuple[Scheme | None, dict[str, Scheme | None]]:
    """The default scheme that an allocation file names, if any, and the schemes of its linears. Raises RecipeError."""
    form = '{"scheme": "W4A16g128", "linears": {"NAME": "W8A16g128", "NAME": null}}'
    try:
        require_regular(path, RecipeError)
        if path.stat().st_size > LARGEST_FILE:
            raise RecipeError(f"--allocation {path}: {path.stat().st_size} bytes are too many; it reads {form}")
        content = parse_object(path.read_bytes().removeprefix(BOM_UTF8), f"--allocation {path}")
    except OSError as error:
        raise RecipeError(
            f"--allocation {path} cannot be read: {error.strerror}; it takes a JSON file {form}"
        ) from None
    except CheckpointError as error:
        raise RecipeError(f"{error}; an allocation reads {form}") from None
    linears, default = content.get("linears"), content.get("scheme")
    if not content.keys() <= {"scheme", "linears"} or "linears" not in content:
        raise RecipeError(f"--allocation {path}: its keys are {shown(list(content))}; an allocation reads {form}")
    if not isinstance(linears, dict):
        raise RecipeError(f"--allocation {path}: its linears are {shown(linears)}; an allocation reads {form}")
    named = {name: None if text is None else _scheme(path, name, text) for name, text in linears.items()}
    return None if default is None else _scheme(path, "scheme", default), named


def _scheme(path: Path, name: str, text: Any) -> Scheme:
    if not isinstance(text, str):
        raise RecipeError(f"--allocation {path}: {shown(name)} is {shown(text)}; a scheme is a text such as W4A16g128")
    try:
        return Scheme.parse(text)
    except SchemeError as error:
        raise SchemeError(f"--allocation {path}: {shown(name)}: {error}") from None


def _fits(name: str, *patterns: str) -> bool:
    return any(fnmatchcase(spelling, pattern) for pattern in patterns for spelling in (name, f"{name}.weight"))


def _some(names: Collection[str]) -> str:
    """The first of these names, and how many there are beside it."""
    first = next(iter(names))
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _why_kept(names: Collection[str]) -> str:
    """The end of an error: why these linears are not quantized, and what to do. It follows their names and a comma."""
    if HEAD in names:
        return "which is not quantized; --quantize-lm-head quantizes it"
    if len(names) == 1:
        return "which stays in full precision: --exclude says so, or it is no linear that can be quantized"
    return "which stay in full precision: --exclude says so, or they are no linears that can be quantized"
