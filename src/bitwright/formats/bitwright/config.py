"""The quantization_config of a folder in the bitwright format, checked field by field."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from bitwright.core.errors import CheckpointError, SchemeError
from bitwright.core.grid import MAX_BITS, MIN_BITS, Grid, Tile, Zero

Extent = Literal[-1] | PositiveInt
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class _Described(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Integers(_Described):
    """The integers that codes are drawn from.

    They are 0 to 2^bits - 1 with a zero point of the same range, or, if symmetric, -2^(bits-1) to 2^(bits-1) - 1
    without one.
    """

    bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
    symmetric: bool

    @property
    def grid(self) -> Grid:
        """The grid of these integers."""
        return Grid.integers(self.bits, self.symmetric)


class Weights(Integers):
    """The weights of every converted linear.

    There are their integers, the rows and columns that share a scale (-1: all of them), and the dtype of scales and
    outliers, in which a weight is computed. With ``signed_scale`` symmetric codes are one higher than without,
    -2^(bits-1) + 1 to 2^(bits-1), scales may be negative, and the last tile of a row may be cut short. With
    ``real_minimum`` a weight is code * scale + minimum, computed in float32, and there is a minimum of the scales'
    dtype for each tile instead of a zero point.
    """

    tile: tuple[Extent, Extent]
    dtype: Dtype
    signed_scale: bool = False
    real_minimum: bool = False

    @property
    def grid(self) -> Grid:
        """The grid of these weights."""
        if self.signed_scale:
            return replace(Grid.with_signed_scale(self.bits), zero=Zero.NONE if self.symmetric else Zero.CODE)
        grid = Grid.integers(self.bits, self.symmetric)
        return replace(grid, zero=Zero.REAL) if self.real_minimum else grid

    @model_validator(mode="after")
    def _is_one(self) -> "Weights":
        try:
            _ = self.grid
        except SchemeError as error:
            raise ValueError(str(error)) from None
        return self


class Exceptional(_Described):
    """A weight that differs from the others.

    There are its own tile, the count of its numbers that are stored exactly, and its integers if they are not those of
    the other weights. For a weight that is stacked over experts, the tile is that of a slice, the outliers are those of
    all slices.
    """

    tile: tuple[Extent, Extent]
    outliers: NonNegativeInt
    bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)] | None = None
    symmetric: bool | None = None
    real_minimum: bool | None = None


class Config(_Described):
    """The quantization_config of a folder in the bitwright format.

    Every linear of the model is converted but those that are named. Names are those of the folder. Inputs of linears
    are quantized per token, queries, keys and values per token and head, as the model runs; null leaves them alone.
    """

    quant_method: Literal["bitwright"]
    version: Literal[1]
    weights: Weights
    exceptions: dict[str, Exceptional]
    activations: Integers | None
    queries: Integers | None
    keys_values: Integers | None
    modules_to_not_convert: tuple[str, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "Config":
        """Read the config of a folder. Raises CheckpointError for one that no Bitwright of this version has written."""
        try:
            return cls.model_validate_json(json.dumps(dict(config)))
        except (ValidationError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"the quantization_config of this bitwright folder cannot be read: {_first(error)}. It is damaged, or "
                "a newer Bitwright wrote it: update Bitwright, or quantize the model again"
            ) from None

    def tile(self, linear: str) -> Tile:
        """The tile of a linear or of a slice of stacked experts, by its name in the folder."""
        tile = self.exceptions[linear].tile if linear in self.exceptions else self.weights.tile
        return Tile(*tile, ragged=self.weights.signed_scale)

    def grid(self, linear: str) -> Grid:
        """The grid of a linear or of stacked experts, by its name in the folder."""
        own = self.exceptions.get(linear)
        if own is None or own.bits is None:
            return self.weights.grid
        grid = Grid.integers(own.bits, bool(own.symmetric))
        return replace(grid, zero=Zero.REAL) if own.real_minimum else grid

    def outliers(self, linear: str) -> int:
        """The number of weights of a linear, or of all slices of stacked experts, that are stored exactly."""
        return self.exceptions[linear].outliers if linear in self.exceptions else 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of scales and outliers, and of the weights that they make."""
        dtype: torch.dtype = getattr(torch, self.weights.dtype)
        return dtype


def schema() -> dict[str, Any]:
    """The JSON schema of ``Config``, draft 2020-12."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Config.model_json_schema()


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    value = "" if first["type"] == "missing" else f", found {first['input']!r:.60}"
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}{value}"
