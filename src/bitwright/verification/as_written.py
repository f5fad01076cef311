"""A check that config.json still gives the codes of a folder the meaning they were written with."""

from collections.abc import Mapping
from typing import Any

from bitwright.core.account import Account
from bitwright.core.errors import UserError
from bitwright.core.format import TensorFormat
from bitwright.core.quantized import Described
from bitwright.core.registry import format_of
from bitwright.formats import CONFIG, QuantizedFolder

METHOD = "quant_method"
SHOWN = 60
"""Characters of a value that are shown."""


def edited(model: QuantizedFolder, account: Account | None) -> str | None:
    """How config.json gives the codes another meaning than they were written with, in words.

    None if it does not, and if nobody wrote down what it said. Keys that change no weight may differ: those that say
    how to run it, and which linears there are.
    """
    was, now = None if account is None else account.quantization_config, model.checkpoint.config.get(CONFIG)
    if was is None or not isinstance(now, dict) or model.described is None:
        return None
    try:
        before = _described(was)
    except UserError:  # of a Bitwright that knows more
        return None
    if before is None:
        return None
    if was.get(METHOD) == now.get(METHOD) and _meaning(model, before) == _meaning(model, model.described):
        return None
    return f"config.json says {_differences(was, now)}, so that its codes are other weights than were written"


def _described(config: Mapping[str, Any]) -> Described | None:
    """The description in a quantization_config; None for a format whose folders are not read. Raises UserError."""
    format = format_of(str(config.get(METHOD)))
    return format.reader.described(config) if isinstance(format, TensorFormat) and format.reader else None


def _meaning(model: QuantizedFolder, described: Described) -> tuple[Any, ...]:
    """The settings that codes are read by; groups are checked against the tensors themselves."""
    grids = [described.grid_of(name) for name in (*model.linears, *model.stacks)]
    return described.variant, described.activations, described.kv, grids


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
    return ", ".join(f"{key} {now.get(key)!r:.{SHOWN}} (written: {was.get(key)!r:.{SHOWN}})" for key in keys)
