"""A recipe made ready to run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.api.arithmetic import pick_arithmetic
from bitwright.api.block_work import BlockWork
from bitwright.api.format_choice import encoder, expected, is_file_format, settled, target
from bitwright.api.parameters import LearnedParameters, belonging
from bitwright.api.source import DTYPES, FAMILIES, Source
from bitwright.api.tensor_work import TensorWork
from bitwright.core.errors import CheckpointError, RecipeError, SchemeError
from bitwright.core.method import DataFree, Learned, Method
from bitwright.core.quantized import WriteOptions, WrittenModel, departures
from bitwright.core.recipe import Recipe
from bitwright.core.registry import find, names
from bitwright.core.scheme import UNQUANTIZED_BITS, Scheme
from bitwright.core.settings import Settings, settle
from bitwright.core.weight import Weight
from bitwright.methods import TRANSFORM, compose, fit, learned, used
from bitwright.stream.budget import Budget


class Work(Protocol):
    """How the model is gone through: block by block (``BlockWork``), or tensor by tensor (``TensorWork``)."""

    def with_text(self, recipe: Recipe, methods: Sequence[Method]) -> "Work":
        """The same with the segments of the text that was named."""

    @property
    def tokens(self) -> Int[Tensor, "N T"] | None:
        """The calibration segments, None where no text was named."""

    @property
    def device(self) -> torch.device:
        """Where the arithmetic is done."""

    @property
    def dtype(self) -> torch.dtype:
        """What it is done in."""

    @property
    def weights(self) -> Sequence[Weight]:
        """What will be quantized, in the order of the model."""

    @property
    def kept(self) -> Mapping[str, str]:
        """The tensors that stay as they are, and why."""

    @property
    def outside(self) -> Sequence[str]:
        """Names of the tensors that are written one by one as they are, before everything else."""

    @property
    def units(self) -> Sequence[str]:
        """Names of what is written part by part after that, in the order of the model."""

    @property
    def blocks(self) -> int:
        """How many decoder blocks there are."""

    @property
    def copied_head(self) -> bool:
        """Whether an output layer that shares its weight with the embedding gets a weight of its own."""

    @property
    def kept_linears(self) -> Sequence[str]:
        """The linears of the model that stay as they are, by their names in it."""

    def only_ours(self, scheme: Scheme) -> str | None:
        """A weight for whose sake transformers needs our plugin, whatever its codes."""

    def budget(self, settings: Settings, trained: bool) -> Budget:
        """The memory that it needs."""


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked.

    ``format`` makes the tensors; ``target`` is what they end in, which differs where files are made of a finished
    folder; ``expected`` is the format as far as it is known before the methods have decided.
    """

    recipe: Recipe
    scheme: Scheme
    method: str
    methods: tuple[Method, ...]
    settings: Settings
    format: ModuleType
    target: ModuleType
    expected: str
    source: Source
    work: Work
    note: str | None
    learned: LearnedParameters | None

    @property
    def tokens(self) -> Int[Tensor, "N T"] | None:
        """The calibration segments, None where no text was named."""
        return self.work.tokens

    @property
    def scales(self) -> torch.dtype:
        """The dtype that scales are stored in: the format's, or the scheme's, or that of the checkpoint."""
        own = torch.float16 if self.scheme.float16_scales else self.source.checkpoint.dtype_of_weights
        return self.target.SCALES or own

    def written(self, reports: Sequence[dict[str, Any]] = ()) -> WrittenModel:
        """What config.json has to say once these blocks are done."""
        rows = [row for report in reports for row in report["linears"]]
        return WrittenModel(
            self.scheme,
            self.source.family,
            self.source.head_dim,
            self.scales,
            tuple(self.work.kept_linears),
            departures(self.scheme, rows),
            self.work.only_ours(self.scheme) is not None,
        )

    def settled_format(self, reports: Sequence[dict[str, Any]]) -> str:
        """The format of the result, its blocks done."""
        return settled(self.recipe.format, self.written(reports))

    def named_format(self, reports: Sequence[dict[str, Any]]) -> str:
        """What the result is called: the format that was named, or that was settled for."""
        return self.recipe.format or self.settled_format(reports)

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
    def arithmetic(self) -> torch.dtype | None:
        """What the steps of the training multiply in; None where nothing is trained."""
        if not learned(self.methods) or not self.settings.epochs or self.learned is not None:
            return None
        return pick_arithmetic(self.settings.precision, self.work.device, self.work.dtype)

    @property
    def belonging(self) -> dict[str, str]:
        """What learned parameters of this job belong to."""
        sites = self.settings.sites if TRANSFORM in self.method.split("+") else ""
        return belonging(self.source.checkpoint, str(self.scheme), self.method, sites)

    @property
    def units(self) -> tuple[str, ...]:
        """What is written one by one: tensors outside of the blocks, the blocks, and an output layer of its own."""
        return (*self.work.outside, *self.work.units)


def prepare(recipe: Recipe, device: str = "auto") -> Job:
    """Checks a recipe against the model without reading any weight. Raises UserError."""
    chosen, goal = encoder(recipe.format), target(recipe.format)
    scheme = Scheme.parse(recipe.scheme)
    methods = compose(recipe.settled_method)
    free = recipe.calibration is None and all(isinstance(method, DataFree) for method in methods)
    source = Source.open(Path(recipe.model), to_build=not free)
    if is_file_format(goal):
        _check_weights_alone(recipe, scheme)
        scheme = goal.adapted(scheme)
        goal.check(source.checkpoint.config, source.checkpoint.folder, write_options(recipe))
    work: Work = (TensorWork if free else BlockWork).of(recipe, source, device)
    topology = source.family.topology if source.family else None
    method, note = fit(recipe.settled_method, scheme, topology, recipe.sites)
    methods = compose(method)
    settings = _settings(recipe, scheme, method, methods)
    known = expected(recipe.format, scheme, methods, settings, work.only_ours(scheme))
    job = Job(recipe, scheme, method, methods, settings, chosen, goal, known, source, work, note, None)
    _check_scheme(job)
    chosen.quantization_config(job.written())  # refuses a scheme that it has no words for
    _check_dtypes(job)
    _check_tiles(job)
    if recipe.load_parameters is not None:
        job = replace(job, learned=_load_parameters(job, recipe.load_parameters))
    return replace(job, work=work.with_text(recipe, methods))


def _check_weights_alone(recipe: Recipe, scheme: Scheme) -> None:
    if scheme.activations or scheme.kv:
        raise RecipeError(
            f"format {recipe.format} holds weights alone, and scheme {scheme} quantizes activations or KV cache too; "
            f"take W{scheme.weight.bits}A16, or --format compressed-tensors"
        )


def write_options(recipe: Recipe, account: Mapping[str, Any] | None = None) -> WriteOptions:
    """What a recipe asks of a file format."""
    base = None if recipe.base is None else Path(recipe.base)
    return WriteOptions(embeddings=recipe.embeddings, base=base, account=account or {})


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


def _load_parameters(job: Job, path: str) -> LearnedParameters:
    if not learned(job.methods):
        raise RecipeError(f"{job.method} learns nothing, so it has no use for --load-parameters {path}")
    return LearnedParameters(Path(path), job.belonging)


def _check_dtypes(job: Job) -> None:
    """Refuses weights that are no ordinary floating-point numbers, such as the float8 of models quantized already."""
    checkpoint, known = job.source.checkpoint, set(DTYPES.values())
    embedding = [f"{job.source.family.embedding}.weight"] if job.source.family else []
    for name in [*embedding, *(weight.tensor for weight in job.work.weights)]:
        found = checkpoint.entry(name).dtype
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
    for weight, tile in product(job.work.weights, tiles):
        try:
            weight.tile(tile).counts(weight.slice)
        except SchemeError as error:
            instead = "" if job.source.family else f". Or leave it as it is: --exclude '{weight.name}'"
            what = f"{weight.name} {list(weight.shape)} under scheme {job.scheme}: {error}"
            raise SchemeError(what + instead) from None


def _check_scheme(job: Job) -> None:
    """Refuses what has to know the architecture where nobody has described it."""
    if job.source.family is None and (job.scheme.activations or job.scheme.kv):
        raise RecipeError(
            f"scheme {job.scheme} quantizes activations, which takes an architecture that Bitwright knows, and "
            f"'{job.source.model_type}' is none ({', '.join(FAMILIES)}); take a scheme with A16"
        )
