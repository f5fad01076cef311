"""bitwright.json, the account that lies in every folder that Bitwright wrote."""

import json
from pathlib import Path
from typing import Any

REPORT = "bitwright.json"


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


def without_digests(account: dict[str, Any]) -> dict[str, Any]:
    """An account that goes along with linears that are stored otherwise."""
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
