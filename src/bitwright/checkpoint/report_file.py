"""The account that every folder of Bitwright's holds (bitwright.json), read again."""

import json
from pathlib import Path
from typing import Any

from bitwright.checkpoint.reader import Checkpoint

REPORT = "bitwright.json"
WRITTEN_CONFIG = "quantization_config"
"""The account's key for the quantization_config that config.json had when the linears were written."""


def account_of(folder: Path) -> dict[str, Any]:
    """Read bitwright.json; empty if there is none that can be read, because the tensors are what counts."""
    try:
        account = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return account if isinstance(account, dict) else {}


def digests_of(folder: Path) -> dict[str, str]:
    """The digest of what every quantized linear was stored as, by its name without ``.weight``.

    Empty if the account names none: in folders of other tools, and of an earlier Bitwright.
    """
    try:
        rows = _rows(account_of(folder))
        return {str(row["name"]).removesuffix(".weight"): str(row["digest"]) for row in rows}
    except (KeyError, TypeError):
        return {}


def is_ours(folder: Path) -> bool:
    """Whether Bitwright quantized a folder, or what it was exported from."""
    return bool(account_of(folder).get("blocks"))


def as_written(config: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of the account that keeps a quantization_config, because config.json may be edited later."""
    return {} if config is None else {WRITTEN_CONFIG: config}


def written_config(folder: Path) -> dict[str, Any] | None:
    """The quantization_config that a folder was written with; None if no account has it (an earlier Bitwright)."""
    config = account_of(folder).get(WRITTEN_CONFIG)
    return config if isinstance(config, dict) else None


def is_made_of(folder: Path, original: Checkpoint) -> bool:
    """Whether the account names the weight files of this original."""
    recorded, present = account_of(folder).get("model"), original.fingerprint()
    weights = {name: digest for name, digest in present.items() if name.endswith(".safetensors")}
    return bool(weights) and isinstance(recorded, dict) and weights.items() <= recorded.items()


def without_digests(account: dict[str, Any]) -> dict[str, Any]:
    """An account without digests and config, for linears that are now stored in another way."""
    account = {key: value for key, value in account.items() if key != WRITTEN_CONFIG}
    try:
        blocks = [
            block | {"linears": [{key: row[key] for key in row if key != "digest"} for row in block["linears"]]}
            for block in account["blocks"]
        ]
    except (KeyError, TypeError):  # not an account of ours
        return account
    return account | {"blocks": blocks}


def _rows(account: dict[str, Any]) -> list[Any]:
    """The linears of a folder: those that an export wrote, else those of the run."""
    if "export" in account:
        return list(account["export"]["linears"])
    return [row for block in account["blocks"] for row in block["linears"]]
