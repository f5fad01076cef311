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
