"""A recipe made ready to run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bitwright.core.configuration import Configuration
from bitwright.core.errors import RecipeError
from bitwright.core.format import FileFormat, Format, TensorFormat, WriteOptions
from bitwright.core.grid import Tile
from bitwright.core.quantized import WrittenModel, departures
from bitwright.core.recipe import Recipe
from bitwright.core.registry import format_of
from bitwright.core.scheme import UNQUANTIZED_BITS, Scheme
from bitwright.methods import composed_for
from bitwright.model.arithmetic import pick_arithmetic
from bitwright.model.source import Source
from bitwright.prepare.checks import check_dtypes, check_names, check_scheme, check_shapes, check_weights_alone
from bitwright.prepare.format_choice import encoder, expected, is_single, refuse_idle, settled, target
from bitwright.prepare.parameters import LearnedParameters, belonging
from bitwright.prepare.work import Work, foreseen, opened


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked.

    ``format`` makes the tensors; ``target`` is what they end in, which differs where files are made of a finished
    folder; ``expected`` is the format as far as it is known before the methods have decided.
    """

    recipe: Recipe
    scheme: Scheme
    configuration: Configuration
    format: TensorFormat
    target: Format
    expected: str
    source: Source
    work: Work
    note: str | None
    learned: LearnedParameters | None

    @property
    def method(self) -> str:
        """The methods that are really run: ``let+lwc``."""
        return self.configuration.name

    @property
    def tokens(self) -> Int[Tensor, "N T"] | None:
        """The calibration segments, None where no text was named."""
        return self.work.tokens

    @cached_property
    def scales(self) -> torch.dtype:
        """The dtype that scales and outliers are stored in: the format's, or the scheme's, or one that holds the
        weights of all linears."""
        if self.target.scales is not None:
            return self.target.scales
        if (own := self.scheme.weight.scales.dtype) is not None:
            dtype: torch.dtype = getattr(torch, own)
            return dtype
        checkpoint = self.source.checkpoint
        dtypes = {checkpoint.entry(w.tensor).dtype for w in self.work.weights if w.tensor in checkpoint}
        return reduce(torch.promote_types, dtypes) if dtypes else checkpoint.dtype_of_weights

    def written(self, reports: Sequence[dict[str, Any]] = ()) -> WrittenModel:
        """What config.json has to say once these blocks are done."""
        rows = [row for report in reports for row in report["linears"]]
        return WrittenModel(
            self.scheme,
            self.source.family,
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
        grid = format_of(name).queries_left_out(self.scheme)
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
        training = self.configuration.training
        if training is None or not training.epochs or self.learned is not None:
            return None
        return pick_arithmetic(training.precision, self.work.device, self.work.dtype)

    @property
    def belonging(self) -> dict[str, str]:
        """What learned parameters of this job belong to."""
        return belonging(self.source.checkpoint, str(self.scheme), self.method, self.configuration.shape)


def prepare(recipe: Recipe, device: str = "auto") -> Job:
    """Checks a recipe against the model without reading any weight. Raises UserError."""
    chosen, goal = encoder(recipe.format), target(recipe.format)
    refuse_idle(recipe.format, recipe.embeddings, recipe.base, recipe.shard_size)
    scheme, composition = Scheme.parse(recipe.scheme), composed_for(recipe)
    if isinstance(goal, FileFormat):
        check_weights_alone(recipe.format, scheme)
        scheme = goal.adapted(scheme)
    source, work = opened(recipe, composition, device, tokenizer=needs_tokenizer(recipe))
    topology = source.family.topology if source.family else None
    fitted, note = composition.fitted(scheme, topology, recipe.settings)
    configuration = fitted.settled(recipe.training, scheme, recipe.settings)
    format = expected(recipe.format, configuration, work.only_ours(scheme))
    job = Job(recipe, scheme, configuration, chosen, goal, format, source, work, note, None)
    check_scheme(source, scheme)
    check_dtypes(source, work)
    chosen.config(job.written())  # refuses a scheme that it has no words for
    check_names(source, work, chosen)
    check_shapes(work, scheme, _tiles(job), goal)
    if isinstance(goal, FileFormat):
        model, known = source.checkpoint, foreseen(source, work, scheme)
        goal.check(model.config, model.folder, write_options(recipe), known)
    if recipe.load_parameters is not None:
        job = replace(job, learned=_load_parameters(job, recipe.load_parameters))
    return replace(job, work=work.with_text(recipe))


def needs_tokenizer(recipe: Recipe) -> bool:
    """Whether the model's folder has to have a tokenizer: not where the result is a file that takes that of its base,
    and no text is read."""
    return recipe.calibration is not None or recipe.base is None or not is_single(recipe.format)


def write_options(recipe: Recipe, account: Mapping[str, Any] | None = None) -> WriteOptions:
    """What a recipe asks of a file format."""
    base = None if recipe.base is None else Path(recipe.base)
    return WriteOptions(embeddings=recipe.embeddings, base=base, account=account or {})


def _load_parameters(job: Job, path: str) -> LearnedParameters:
    if not job.configuration.learns:
        raise RecipeError(f"{job.method} learns nothing, so it has no use for --load-parameters {path}")
    return LearnedParameters(Path(path), job.belonging)


def _tiles(job: Job) -> Iterator[Tile]:
    """The scheme's, and those that were asked for in its place."""
    yield job.scheme.tile
    for freedom in job.configuration.freedoms():
        if not freedom.compared:
            yield from freedom.tiles
