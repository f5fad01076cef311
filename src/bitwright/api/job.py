"""A recipe made ready to run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxtyping import Int
from torch import Tensor

from bitwright.api.format_choice import encoder, expected, settled
from bitwright.api.parameters import LearnedParameters, belonging
from bitwright.api.source import (
    DTYPES,
    Source,
    blaming_the_config,
    check_vocabulary,
    pick_device,
    pick_dtype,
    sequence_length,
    text_of,
    tokenize,
)
from bitwright.calibration.segments import segments
from bitwright.core.errors import CheckpointError, RecipeError, SchemeError
from bitwright.core.method import Learned, Method
from bitwright.core.quantized import WrittenModel, departures
from bitwright.core.recipe import Recipe
from bitwright.core.registry import find, names
from bitwright.core.scheme import UNQUANTIZED_BITS, Scheme
from bitwright.core.settings import Settings, settle
from bitwright.methods import TRANSFORM, compose, fit, learned, used
from bitwright.stream.skeleton import Skeleton


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked. ``tokens`` is None where no calibration text was named.

    ``format`` makes the tensors; ``expected`` is the format as far as it is known before the methods have decided.
    """

    recipe: Recipe
    scheme: Scheme
    method: str
    methods: tuple[Method, ...]
    settings: Settings
    format: ModuleType
    expected: str
    source: Source
    skeleton: Skeleton
    tokens: Int[Tensor, "N T"] | None
    note: str | None
    learned: LearnedParameters | None

    def written(self, reports: Sequence[dict[str, Any]] = ()) -> WrittenModel:
        """What config.json has to say once these blocks are done."""
        config, scheme = self.source.config, self.scheme
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found = departures(scheme, [row for report in reports for row in report["linears"]])
        dtype = self.source.checkpoint.dtype_of_weights
        return WrittenModel(scheme, self.source.family, width, dtype, self.recipe.quantize_lm_head, found)

    def settled_format(self, reports: Sequence[dict[str, Any]]) -> str:
        """The format of the result, its blocks done."""
        return settled(self.recipe.format, self.written(reports))

    def left_out(self, name: str) -> str | None:
        """What the config of a format cannot say of the scheme, in words."""
        grid = find("formats", name).queries_left_out(self.scheme)
        if grid is None:
            return None
        cache = self.scheme.kv.bits if self.scheme.kv else UNQUANTIZED_BITS
        return (
            f"format {name} has no place for queries at {grid.bits} bits beside keys and values at {cache}: "
            "transformers alone leaves the queries as they are; bitwright.load(OUTPUT) quantizes them, and "
            "--format bitwright has a place for them"
        )

    @property
    def belonging(self) -> dict[str, str]:
        """What learned parameters of this job belong to."""
        sites = self.settings.sites if TRANSFORM in self.method.split("+") else ""
        return belonging(self.source.checkpoint, str(self.scheme), self.method, sites)

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and shape [O, I] of every linear that will be quantized."""
        for index in range(len(self.skeleton.block_names)):
            block = self.skeleton.meta_block(index)
            for name in block.topology.linears:
                rows, columns = block.weight(name).shape
                yield block.path(name), (rows, columns)
        if self.recipe.quantize_lm_head:
            rows, columns = self.skeleton.model.get_parameter(f"{self.source.family.head}.weight").shape
            yield self.source.family.head, (rows, columns)

    def outside(self) -> tuple[str, ...]:
        """The checkpoint's tensors that are in no block and are passed through: embedding, final norm, output layer."""
        blocks = tuple(f"{name}." for name in self.skeleton.block_names)
        head = {f"{self.source.family.head}.weight"} if self.recipe.quantize_lm_head else set()
        return tuple(n for n in self.source.checkpoint.names if not n.startswith(blocks) and n not in head)

    def units(self) -> tuple[str, ...]:
        """What is written one by one: tensors outside of the blocks, the blocks, and an output layer of its own."""
        head = (self.source.family.head,) if self.recipe.quantize_lm_head else ()
        return self.outside() + self.skeleton.block_names + head


def prepare(recipe: Recipe, device: str = "auto") -> Job:
    """Checks a recipe against the model without reading any weight. Raises UserError."""
    scheme = Scheme.parse(recipe.scheme)
    chosen = encoder(recipe.format)
    compose(recipe.settled_method)
    source = Source.open(Path(recipe.model))
    where = pick_device(device)
    dtype = pick_dtype("auto", where, source.checkpoint.dtype_of_weights)
    with blaming_the_config(source.checkpoint.folder):
        skeleton = Skeleton(source.checkpoint, source.config, source.family, dtype, where)
    method, note = fit(recipe.settled_method, scheme, source.family.topology, recipe.sites)
    methods = compose(method)
    settings = _settings(recipe, scheme, method, methods)
    known = expected(recipe.format, scheme, methods, settings)
    job = Job(recipe, scheme, method, methods, settings, chosen, known, source, skeleton, None, note, None)
    chosen.quantization_config(job.written())  # refuses a scheme that it has no words for
    _check_dtypes(job)
    _check_tiles(job)
    if recipe.load_parameters is not None:
        job = replace(job, learned=_load_parameters(job, recipe.load_parameters))
    return replace(job, tokens=_calibration(recipe, source, methods))


def _settings(recipe: Recipe, scheme: Scheme, method: str, methods: tuple[Method, ...]) -> Settings:
    """What the methods are told. Raises RecipeError for a setting that would change nothing."""
    idle = [key for key, value in recipe.settings.items() if value is not None and key not in used(methods)]
    if idle:
        listening = [name for name in names("methods") if idle[0] in used(compose(name))]
        raise RecipeError(
            f"{method} has no use for {idle[0]}; leave it out, or take a method that has: {', '.join(listening)}"
        )
    refines = [m.refines for m in methods if isinstance(m, Learned)]
    return settle(recipe.training, scheme, recipe.seed, recipe.settings, closed=all(refines))


def _calibration(recipe: Recipe, source: Source, methods: tuple[Method, ...]) -> Int[Tensor, "N T"] | None:
    seqlen = sequence_length(recipe.seqlen, source.config)
    if recipe.calibration is None:
        if any(method.needs_text for method in methods):
            raise RecipeError(
                f"{recipe.settled_method} learns from text and none was named; "
                "give --calibration FILE.txt, or --calibration builtin"
            )
        return None
    text = text_of(recipe.calibration, "calibration")
    tokens = tokenize(source.checkpoint.folder, text)
    check_vocabulary(tokens, source.config, source.checkpoint.folder)
    return segments(tokens, recipe.samples, seqlen, recipe.seed, recipe.calibration)


def _load_parameters(job: Job, path: str) -> LearnedParameters:
    if not learned(job.methods):
        raise RecipeError(f"{job.method} learns nothing, so it has no use for --load-parameters {path}")
    return LearnedParameters(Path(path), job.belonging)


def _check_dtypes(job: Job) -> None:
    """Refuses weights that are no ordinary floating-point numbers, such as the float8 of models quantized already."""
    checkpoint, known = job.source.checkpoint, set(DTYPES.values())
    for name in [f"{job.source.family.embedding}.weight", *(f"{name}.weight" for name, _ in job.linears())]:
        found = checkpoint.entry(job.skeleton.source(name)).dtype
        if found not in known:
            raise CheckpointError(
                f"{name} in {checkpoint.folder} is stored as {str(found).removeprefix('torch.')}; Bitwright quantizes "
                f"{', '.join(DTYPES)}. Start from the original, or convert the model with transformers"
            )


def _check_tiles(job: Job) -> None:
    """Every linear must divide into the scheme's tiles, and into those that were asked for in their place."""
    tiles = [job.scheme.tile]
    if job.settings.axis == "ic":
        tiles += [tile for m in job.methods for tile in m.tiles(job.scheme, job.settings)]
    for (name, shape), tile in product(job.linears(), tiles):
        try:
            tile.counts(shape)
        except SchemeError as error:
            raise SchemeError(f"{name} {list(shape)} under scheme {job.scheme}: {error}") from None
