"""bitwright.json, the account that lies in every folder that Bitwright wrote."""

import json
from pathlib import Path
from typing import Any

from bitwright.checkpoint.reader import Checkpoint

REPORT = "bitwright.json"
SAID = "quantization_config"
"""What config.json said of the linears when they were written, under its own name."""


def account_of(folder: Path) -> dict[str, Any]:
    """bitwright.json, or nothing where there is none that can be read: the tensors are what counts."""
    try:
        found = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def digests_of(folder: Path) -> dict[str, str]:
    """The digest of what every quantized linear was stored as, by its name without ``.weight``.

    Nothing where no account says them: of folders of others, and of an earlier Bitwright.
    """
    try:
        rows = _rows(account_of(folder))
        return {str(row["name"]).removesuffix(".weight"): str(row["digest"]) for row in rows}
    except (KeyError, TypeError):
        return {}


def is_ours(folder: Path) -> bool:
    """Whether Bitwright quantized a folder, or what it was exported from."""
    return bool(account_of(folder).get("blocks"))


def as_written(said: dict[str, Any] | None) -> dict[str, Any]:
    """What an account keeps of config.json, which may be edited; nothing where nothing is said."""
    return {} if said is None else {SAID: said}


def said_of(folder: Path) -> dict[str, Any] | None:
    """The quantization_config that a folder was written with; None where no account has it, as of an earlier
    Bitwright."""
    found = account_of(folder).get(SAID)
    return found if isinstance(found, dict) else None


def is_made_of(folder: Path, original: Checkpoint) -> bool:
    """Whether the account names the weight files of this original."""
    told, found = account_of(folder).get("model"), original.fingerprint()
    weights = {name: digest for name, digest in found.items() if name.endswith(".safetensors")}
    return bool(weights) and isinstance(told, dict) and weights.items() <= told.items()


def without_digests(account: dict[str, Any]) -> dict[str, Any]:
    """An account that goes along with linears that are stored otherwise."""
    account = {key: value for key, value in account.items() if key != SAID}
    try:
        blocks = [
            block | {"linears": [{key: row[key] for key in row if key != "digest"} for row in block["linears"]]}
            for block in account["blocks"]
        ]
    except (KeyError, TypeError):  # of somebody else, or none
        return account
    return account | {"blocks": blocks}


def _rows(account: dict[str, Any]) -> list[Any]:
    """The linears of a folder: those that an export wrote, else those of the run."""
    if "export" in account:
        return list(account["export"]["linears"])
    return [row for block in account["blocks"] for row in block["linears"]]
