"""Read and write bitwright.json, the account in every folder that Bitwright writes."""

from pathlib import Path

from bitwright.checkpoint.reader import Checkpoint
from bitwright.checkpoint.writer import write_json
from bitwright.core.account import Account
from bitwright.core.errors import CheckpointError
from bitwright.core.small_files import parse_object, read_small

ACCOUNT = "bitwright.json"


def read_account(folder: Path) -> Account | None:
    """Read a folder's account. None if there is no account, or if it is damaged: a folder can be used without it."""
    try:
        return Account.from_json(parse_object(read_small(folder / ACCOUNT), ACCOUNT))
    except (CheckpointError, ValueError):
        return None


def write_account(folder: Path, account: Account) -> None:
    """Write a folder's account. Raises OutputError."""
    write_json(folder / ACCOUNT, account.to_json())


def is_made_of(account: Account | None, original: Checkpoint) -> bool:
    """Whether an account names the weight files of this original."""
    weights = {name: digest for name, digest in original.fingerprint().items() if name.endswith(".safetensors")}
    return bool(weights) and account is not None and weights.items() <= account.model.items()
