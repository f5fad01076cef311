"""The account that is given of a result: ``bitwright.json``, typed from the drivers to the file and back.

A value that comes from a file is distrusted: an account that cannot be read is none, since the tensors are what counts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from types import UnionType
from typing import Any, TypeVar, get_origin

from bitwright.core.small_files import plain

T = TypeVar("T")


@dataclass(frozen=True)
class LinearReport:
    """The account of one linear.

    ``tile`` is the rows and columns that share a scale, ``outliers`` how many weights are kept exactly,
    ``outlier_share`` their share of all. ``bits_per_weight`` and ``storage_bits`` count all that the format stores for
    it, scales, zeros and outliers too. ``weight_error`` is ``|W - Wq|^2 / |W|^2``; ``output_error`` is
    ``|XW' - XWq'|^2 / |XW'|^2`` on the calibration tokens as the full-precision blocks produce them, None without
    calibration data. ``digest`` is that of the tensors that the linear was stored as, "" before it is. ``scheme`` is
    set if it is not the scheme of the whole model. An export compares with the weight that it read, Wq instead of W,
    and ``codes_kept`` says whether that kept its codes.
    """

    name: str
    shape: tuple[int, int]
    tile: tuple[int, int]
    bits_per_weight: float
    storage_bits: int
    weight_error: float
    output_error: float | None
    outliers: int = 0
    outlier_share: float = 0.0
    digest: str = ""
    scheme: str = ""
    codes_kept: bool = True

    @property
    def weights(self) -> int:
        """The number of weights."""
        return self.shape[0] * self.shape[1]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "LinearReport":
        """Read a report that ``to_json`` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        row = {key.name: value[key.name] for key in fields(cls) if key.name in value}
        error = value["weight_error"]  # JSON has no word for infinity
        return _typed(cls(**row | {"shape": _pair(value["shape"]), "tile": _pair(value["tile"])}
                          | {"weight_error": inf if error is None else float(error)}))  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is usual is left out."""
        usual = {"digest": "", "scheme": "", "codes_kept": True}
        return {key: value for key, value in asdict(self).items() if key not in usual or value != usual[key]}


@dataclass(frozen=True)
class BlockReport:
    """The account of one block.

    ``output_error`` is the relative squared error of the block's output against the full-precision path,
    with everything before it quantized too. ``fallbacks`` are shown at the end of a run, never only logged.
    """

    name: str
    linears: tuple[LinearReport, ...]
    output_error: float | None = None
    fallbacks: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "BlockReport":
        """Read a report that ``to_json`` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        linears = tuple(map(LinearReport.from_json, value["linears"]))
        return cls(str(value["name"]), linears, value["output_error"], tuple(value["fallbacks"]))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"linears": [row.to_json() for row in self.linears]}


@dataclass(frozen=True)
class Totals:
    """Sums over all quantized linears; ``per_ic`` have groups along their output. Bytes are those of weight files."""

    linears: int
    per_ic: int
    outliers: int
    quantized_weights: int
    bits_per_weight: float
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class CalibrationData:
    """The segments that a run was calibrated on, and the sha256 of their tokens.

    ``begins_with`` is the token in front of each, such as ``<bos>``; None if the tokenizer puts none there.
    """

    segments: int
    seqlen: int
    tokens_sha256: str
    begins_with: str | None = None


@dataclass(frozen=True)
class ExportedLinear:
    """What became of a linear on its way into another format; see ``core.format.Difference``."""

    name: str
    codes: bool
    error: float
    digest: str = ""


@dataclass(frozen=True)
class ExportAccount:
    """What an export added: the format that was read, and its linears."""

    read_as: str
    linears: tuple[ExportedLinear, ...]


@dataclass(frozen=True)
class Account:
    """``bitwright.json``: the same recipe, seed and machine give the same bytes of it.

    ``recipe`` and ``settings`` are the plain values that were asked for and settled. ``model`` and ``versions`` are the
    fingerprint of the original's files and the versions of libraries. ``quantization_config`` is what config.json says
    of the linears, which somebody may edit there. ``totals`` is None in a file that says its own size.
    """

    bitwright: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    scheme: str = ""
    method: str = ""
    format: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)
    calibration: CalibrationData | None = None
    totals: Totals | None = None
    notes: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    blocks: tuple[BlockReport, ...] = ()
    quantization_config: Mapping[str, Any] | None = None
    verified: str = ""
    export: ExportAccount | None = None

    @property
    def linears(self) -> Iterable[LinearReport]:
        """The reports of all linears that the run quantized."""
        return (row for block in self.blocks for row in block.linears)

    @property
    def digests(self) -> dict[str, str]:
        """The digest of every quantized linear as it is stored, by its name without ``.weight``.

        They are those of the export, if there is one, else of the run. Folders of others, and of an earlier Bitwright,
        have none.
        """
        rows = self.linears if self.export is None else self.export.linears
        return {row.name.removesuffix(".weight"): row.digest for row in rows if row.digest}

    @property
    def without_digests(self) -> "Account":
        """This account for linears that are stored in another way."""
        blocks = tuple(
            replace(block, linears=tuple(replace(row, digest="") for row in block.linears)) for block in self.blocks
        )
        return replace(self, blocks=blocks, quantization_config=None, export=None)

    def stored_as(self, scheme: str, rows: Iterable[LinearReport], bytes_out: int) -> "Account":
        """This account for an export that stored the linears as ``rows`` say.

        ``scheme`` is that of the whole model, ``bytes_out`` the bytes of the new weight files. Tiles, bits and schemes
        are the new ones; errors stay those of the run, which compared with the original.
        """
        stored = {row.name: row for row in rows}
        account = self.without_digests
        blocks = tuple(
            replace(block, linears=tuple(_stored_as(row, stored.get(row.name), scheme) for row in block.linears))
            for block in account.blocks
        )
        return replace(account, scheme=scheme, blocks=blocks, totals=_totals_of(self.totals, blocks, bytes_out))

    @classmethod
    def from_json(cls, value: object) -> "Account | None":
        """Read what ``to_json`` wrote, or an earlier Bitwright; None for anything else."""
        if not isinstance(value, Mapping):
            return None
        try:
            recipe = value.get("recipe") or {}
            account = cls(
                **{key: value[key] for key in ("bitwright", "scheme", "method", "seed", "verified") if key in value},
                recipe=recipe,
                format=value.get("format") or recipe.get("format") or "",  # Bitwright 0.1.0 says it there alone
                settings=value.get("settings") or {},
                versions=value.get("versions") or {},
                model=value.get("model") or {},
                calibration=_optional(value.get("calibration"), lambda data: _typed(CalibrationData(**data))),
                totals=_optional(value.get("totals"), lambda totals: _typed(Totals(**totals))),
                notes=tuple(value.get("notes") or ()),
                fallbacks=tuple(value.get("fallbacks") or ()),
                blocks=tuple(map(BlockReport.from_json, value.get("blocks") or ())),
                quantization_config=value.get("quantization_config"),
                export=_optional(value.get("export"), _export),
            )
            return _typed(account)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def to_json(self) -> dict[str, Any]:
        """Plain values as they stand in the file; an infinite error is null."""
        written: dict[str, Any] = {key.name: getattr(self, key.name) for key in fields(self)}
        for key in ("calibration", "totals", "export"):
            written[key] = None if written[key] is None else asdict(written[key])
        written["blocks"] = [block.to_json() for block in self.blocks]
        absent = {key for key in ("totals", "quantization_config", "export", "verified") if not written[key]}
        result: dict[str, Any] = plain({key: value for key, value in written.items() if key not in absent})
        return result


def _stored_as(row: LinearReport, stored: LinearReport | None, scheme: str) -> LinearReport:
    """The report of a linear that is stored in another way now."""
    if stored is None:
        return row
    own = "" if stored.scheme == scheme else stored.scheme
    keys = ("tile", "bits_per_weight", "storage_bits", "outliers", "outlier_share")
    return replace(row, scheme=own, **{key: getattr(stored, key) for key in keys})


def _totals_of(totals: Totals | None, blocks: Iterable[BlockReport], bytes_out: int) -> Totals | None:
    """The sums over linears that are stored in another way now."""
    rows = [row for block in blocks for row in block.linears]
    weights = sum(row.weights for row in rows)
    if totals is None or not weights:
        return totals
    return replace(
        totals,
        per_ic=sum(columns == 1 < rows_ for rows_, columns in (row.tile for row in rows)),
        outliers=sum(row.outliers for row in rows),
        bits_per_weight=sum(row.storage_bits for row in rows) / weights,
        bytes_out=bytes_out,
    )


def _typed(value: T) -> T:
    """Require that the fields of a dataclass have the types that they are declared with, as far as one type says it.

    Raises TypeError.
    """
    for key in fields(value):  # type: ignore[arg-type]  # T is a dataclass
        kind: Any = get_origin(key.type) or key.type
        if kind in (UnionType, Any):
            continue
        if not isinstance(getattr(value, key.name), (int, float) if kind is float else kind):
            raise TypeError(f"{key.name} is no {kind}")
    return value


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)


def _optional(value: Any, read: Callable[[Any], T]) -> T | None:
    return None if value is None else read(value)


def _export(value: Mapping[str, Any]) -> ExportAccount:
    known = {key.name for key in fields(ExportedLinear)}
    rows = tuple(_typed(ExportedLinear(**{k: v for k, v in row.items() if k in known})) for row in value["linears"])
    return ExportAccount(str(value["read_as"]), rows)
