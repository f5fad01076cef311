"""A recipe made ready to run: everything that can be refused is refused here, before any weight is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.calibration.segments import Segments
from bitwright.core.account import LinearReport
from bitwright.core.configuration import Configuration
from bitwright.core.errors import RecipeError
from bitwright.core.format import FileFormat, Format, TensorFormat, WriteOptions
from bitwright.core.grid import Tile
from bitwright.core.quantized import WrittenModel, departures
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import UNQUANTIZED_BITS, Allocation, Scheme
from bitwright.core.weight import Weight
from bitwright.model.source import Source
from bitwright.prepare.block_way import BlockWay
from bitwright.prepare.checks import (
    check_activations,
    check_dtypes,
    check_names,
    check_scheme,
    check_shapes,
    fits_shapes,
)
from bitwright.prepare.format_choice import WIDELY_LOADED, expected, refuse_idle, refuse_wrongly_loaded, settled
from bitwright.prepare.learned_parameters import LearnedParameters, belonging
from bitwright.prepare.question import Question
from bitwright.prepare.tensor_way import TensorWay
from bitwright.prepare.way import Inventory, Way
from bitwright.stream.parts import Driver, PartWriter
from bitwright.stream.precision import pick_arithmetic
from bitwright.stream.ranks import Ranks
from bitwright.stream.run_plan import RunPlan
from bitwright.stream.worker_pool import WorkerPool


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, checked.

    ``expected`` is the format as far as it is known before the methods have decided. ``scales`` is the dtype that
    scales and outliers are stored in. ``note`` says which methods and rows of text are left out, None if none is.
    """

    question: Question
    source: Source
    way: Way
    segments: Segments | None
    allocation: Allocation
    configuration: Configuration
    expected: str
    scales: torch.dtype
    note: str | None
    learned: LearnedParameters | None

    @property
    def tokens(self) -> Int[Tensor, "N T"] | None:
        """The tokens of the calibration segments."""
        return None if self.segments is None else self.segments.tokens

    @property
    def recipe(self) -> Recipe:
        """The recipe that was asked for."""
        return self.question.recipe

    @property
    def scheme(self) -> Scheme:
        """The scheme of linears that have none of their own."""
        return self.allocation.default

    @property
    def format(self) -> TensorFormat:
        """The format that makes the tensors."""
        return self.question.format

    @property
    def target(self) -> Format:
        """The format of the result; another one if files are made of a finished folder."""
        return self.question.target

    @property
    def inventory(self) -> Inventory:
        """The model's tensors."""
        return self.way.inventory

    @property
    def method(self) -> str:
        """The methods that are really run: ``let+lwc``."""
        return self.configuration.name

    @property
    def arithmetic(self) -> torch.dtype | None:
        """The dtype that training multiplies in; None if nothing is trained."""
        training = self.configuration.training
        if training is None or not training.epochs or self.learned is not None:
            return None
        return pick_arithmetic(training.precision, self.way.device, self.way.dtype)

    @property
    def belonging(self) -> dict[str, str]:
        """What learned parameters of this run belong to."""
        return belonging(self.source.checkpoint, self.allocation, self.method, self.configuration.shape)

    @property
    def bytes_out(self) -> int:
        """The bytes of the result's weights, outliers left out."""
        checkpoint, weights = self.source.checkpoint, self.inventory.weights
        passed = self.inventory.foreseen(checkpoint.names, self.allocation).passed
        stored = (self.target.stored_bytes(weight.shape, self.scheme_of(weight), self.scales) for weight in weights)
        return sum(map(checkpoint.nbytes, passed)) + sum(stored)

    def scheme_of(self, weight: Weight) -> Scheme:
        """The scheme of a weight, its tile laid on slices as they are stored."""
        return weight.scheme(self.allocation.scheme(weight.name))

    def driver(self, folder: Path, workers: int, pool: WorkerPool | None, ranks: Ranks) -> Driver:
        """What makes the parts in a work folder."""
        plan = RunPlan(
            self.allocation,
            self.configuration.methods,
            self.scales,
            self.configuration.training,
            self.recipe.seed,
            self.learned,
            self.arithmetic,
            self.recipe.all_experts,
        )
        writer = PartWriter(folder, self.format, self.target)
        return self.way.driver(plan, writer, self.tokens, workers, pool, ranks)

    def written(self, linears: Sequence[LinearReport] = ()) -> WrittenModel:
        """What config.json has to say once these linears are quantized."""
        return _written(self.source, self.inventory, self.allocation, self.scales, linears)

    @property
    def allocated_in_part(self) -> str | None:
        """A note that the allocation file names only some of the linears; None if it names all, or if there is none."""
        rules, inventory = self.question.rules, self.inventory
        linears = {*inventory.linears, *inventory.kept_linears}
        others = {linear for linear in inventory.linears if linear not in rules.file_names}
        if not rules.file_names or not others:
            return None
        default = self.question.adapted(rules.default)
        note = f"the allocation file names {len(linears & rules.file_names)} of {len(linears)} linears"
        if any(rules.asked_for(linear) is None for linear in others):
            note += f"; the others get {default}"
        if (blocks := rules.blocks_of_another(inventory.linears)) is not None:
            note += f". It may be of a model with {blocks} blocks: it names all linears there, and the output layer"
        return note

    def left_out(self, format: Format) -> str | None:
        """What the config of a format cannot say of the scheme, in words."""
        grid = format.queries_left_out(self.scheme)
        if grid is None:
            return None
        cache = self.scheme.kv.bits if self.scheme.kv else UNQUANTIZED_BITS
        return (
            f"format {format.name} has no place for queries at {grid.bits} bits beside keys and values at {cache}: "
            "transformers alone leaves the queries as they are; bitwright.load(OUTPUT) quantizes them, and "
            "--format bitwright has a place for them"
        )


def opened(question: Question, device: str, *, tokenizer: bool) -> tuple[Source, Way]:
    """The model of a recipe, and the way that its methods take through it; no weight is read.

    Raises UserError, also, with ``tokenizer``, if the model has none.
    """
    source = Source.open(Path(question.recipe.model), to_build=not question.alone, tokenizer=tokenizer)
    if question.alone and (source.family is not None or not question.scheme.quantizes_activations):
        return source, TensorWay.open(question, source, device)
    return source, BlockWay.open(question, source, device)


def prepare(question: Question, device: str = "auto") -> Prepared:
    """Check a recipe against the model without reading any weight. Raises UserError."""
    recipe = question.recipe
    refuse_idle(recipe.format, recipe.embeddings, recipe.base, recipe.shard_size)
    source, way = opened(question, device, tokenizer=question.needs_tokenizer)
    inventory, checkpoint = way.inventory, source.checkpoint
    allocation = inventory.allocation(question)
    question = replace(question, scheme=allocation.default)
    fitted, note = question.composition.fitted(question.scheme, inventory.topology, recipe.settings)
    configuration = fitted.settled(recipe.training, question.scheme, recipe.settings)
    passes = partial(fits_shapes, inventory, format=question.target)
    format = expected(recipe.format, configuration, allocation, inventory.only_ours(allocation), passes)
    check_scheme(source, inventory.family, question.scheme)
    check_activations(inventory, question.scheme)
    check_dtypes(source, inventory)
    scales = _scales(question, source, inventory)
    if format.startswith(WIDELY_LOADED):
        refuse_wrongly_loaded(recipe, allocation, _written(source, inventory, allocation, scales))
    if recipe.format is not None:  # else one is taken that has words for everything
        question.format.config(_written(source, inventory, allocation, scales))
    check_names(source, inventory, question.format)
    check_shapes(inventory, allocation, lambda scheme: _tiles(configuration, scheme), question.target)
    if isinstance(question.target, FileFormat):
        known = inventory.foreseen(checkpoint.names, allocation)
        question.target.check(checkpoint.config, checkpoint.folder, write_options(recipe), known)
    learned = _learned(question, source, allocation, configuration)
    notes = [] if note is None else [note]
    segments = way.read_calibration(question, notes.append)
    note = "; ".join(notes) or None
    return Prepared(question, source, way, segments, allocation, configuration, format, scales, note, learned)


def settled_format(run: Prepared, linears: Sequence[LinearReport]) -> TensorFormat:
    """The format of the folder that is written, all linears quantized."""
    return settled(run.recipe.format, run.written(linears))


def write_options(recipe: Recipe, account: Mapping[str, Any] | None = None) -> WriteOptions:
    """What a recipe asks of a file format."""
    base = None if recipe.base is None else Path(recipe.base)
    return WriteOptions(embeddings=recipe.embeddings, base=base, account=account or {})


def _scales(question: Question, source: Source, inventory: Inventory) -> torch.dtype:
    """The dtype of scales: the target's, or the grid's, or one that holds the weights of all linears."""
    if question.target.scales is not None:
        return question.target.scales
    if (own := question.scheme.weight.scales.dtype) is not None:
        dtype: torch.dtype = getattr(torch, own)
        return dtype
    checkpoint = source.checkpoint
    dtypes = {checkpoint.entry(w.tensor).dtype for w in inventory.weights if w.tensor in checkpoint}
    return reduce(torch.promote_types, dtypes) if dtypes else checkpoint.dtype_of_weights


def _written(
    source: Source,
    inventory: Inventory,
    allocation: Allocation,
    scales: torch.dtype,
    linears: Sequence[LinearReport] = (),
) -> WrittenModel:
    return WrittenModel(
        allocation.default,
        inventory.family,
        scales,
        tuple(inventory.kept_linears),
        departures(allocation.default, allocation.own, linears),
        inventory.only_ours(allocation) is not None,
        allocation.own,
        allocation.asked,
    )


def _tiles(configuration: Configuration, scheme: Scheme) -> Iterator[Tile]:
    """The tile of a scheme, and those that methods take in its place."""
    yield scheme.tile
    for freedom in configuration.freedoms(scheme):
        if not freedom.compared:
            yield from freedom.tiles


def _learned(
    question: Question, source: Source, allocation: Allocation, configuration: Configuration
) -> LearnedParameters | None:
    """The parameters of an earlier training, if they are asked for. Raises RecipeError for those of another run."""
    path = question.recipe.load_parameters
    if path is None:
        return None
    if not configuration.learns:
        raise RecipeError(f"{configuration.name} learns nothing, so it has no use for --load-parameters {path}")
    owner = belonging(source.checkpoint, allocation, configuration.name, configuration.shape)
    return LearnedParameters(Path(path), owner)
