"""Merge part files into the shards of a model folder by copying byte ranges; a killed merge can be run again.

Tensors that do not change need not be in a part: they are copied from the original checkpoint.

A merge is safe because it goes in this order:
1. The plan (which tensors of which parts make up which shard) is written beside the parts before anything else is.
   From then on the plan is followed, whatever is left of the parts.
2. Each shard is written atomically, so a shard that is there is whole, and is skipped.
3. A part is removed once the shard with its last tensor is durable. So the disk holds the parts and one shard, never
   the model twice, and a missing shard still has all of its parts.
4. The index comes last. The plan stays until the work folder is removed. It shows that missing parts have been merged.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from bitwright.checkpoint.header import Header, TensorEntry, build_header, file_order, read_header
from bitwright.checkpoint.layout import INDEX, SINGLE
from bitwright.checkpoint.ranges import Stored, file_digest
from bitwright.checkpoint.writer import Digested, atomic, sync_folder, write_json
from bitwright.core.errors import CheckpointError, OutputError, shown

PLAN, MERGED = "merge.json", "merged.json"
NO_PART = ""
METADATA = {"format": "pt"}  # transformers refuses a safetensors file that does not say so


@dataclass(frozen=True, slots=True)
class Shard:
    """One final file: its name, the sha256 of its header, its tensor data in bytes, and the part of each tensor.

    A tensor that is copied from the original has the part "".
    """

    file: str
    header_sha256: str
    data_bytes: int
    parts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a merge: the names of the part files in order, the size limit in bytes, the shards in order."""

    parts: list[str]
    shard_bytes: int
    shards: list[Shard]


def merge_begun(work: Path) -> bool:
    """Whether a merge of the parts in `work` has begun, so that missing parts have been merged."""
    return (work / PLAN).exists()


def merge_shards(parts: list[Path], folder: Path, shard_bytes: int, others: Sequence[Stored] = ()) -> None:
    """Merge part files into a model in `folder`, and remove the parts.

    `parts` are safetensors files of one folder; no tensor is in two of them. `others` are further tensors, which come
    first in the model; they are copied, and their files stay.

    The model is one file, `model.safetensors`, if all tensors together have at most `shard_bytes` bytes, else an index
    and shards, the first called model-00001-of-000NN.safetensors. A tensor larger than that has a shard of its own. At
    most 4 MiB are in memory. If it is killed at any moment, another call on what is left gives the same bytes.

    Raises OutputError for a disk that refuses, CheckpointError for parts that do not allow it, and ValueError for a
    call that makes no sense.
    """
    if not parts or shard_bytes < 1 or len({part.parent for part in parts}) != 1:
        raise ValueError(
            f"{len(parts)} parts, expected some, of one folder; shards of {shard_bytes} bytes, expected > 0"
        )
    work = parts[0].parent
    plan = _settled_plan(work, [part.name for part in parts], shard_bytes, others)
    if work.resolve() == folder.resolve() and {shard.file for shard in plan.shards} & set(plan.parts):
        raise ValueError(f"a part in {work} is called as a shard will be; keep parts elsewhere or name them otherwise")
    last_use = {part: number for number, shard in enumerate(plan.shards) for part in shard.parts.values()}
    digests = _digests_of_merged(work)
    for number, shard in enumerate(plan.shards):
        if not _is_finished(folder / shard.file, shard, digests.get(shard.file)):
            digests[shard.file] = _write_shard(work, folder, shard, others)
            write_json(work / MERGED, digests)
        _remove_parts(work, [part for part in plan.parts if last_use.get(part, 0) == number])
    if len(plan.shards) > 1:
        homes = {name: shard.file for shard in plan.shards for name in shard.parts}
        total = sum(shard.data_bytes for shard in plan.shards)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))})


def _settled_plan(work: Path, parts: list[str], shard_bytes: int, others: Sequence[Stored]) -> Plan:
    """The plan that a killed merge left, or else a new one, which is written to disk first."""
    path = work / PLAN
    if not path.exists():
        plan = _new_plan([read_header(work / part) for part in parts], shard_bytes, others)
        write_json(path, asdict(plan))
        return plan
    try:
        raw = json.loads(path.read_text("utf-8"))
        plan = Plan(raw["parts"], raw["shard_bytes"], [Shard(**shard) for shard in raw["shards"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path}: not the plan of a merge ({error}); begin anew with --restart") from error
    if (plan.parts, plan.shard_bytes) != (parts, shard_bytes):
        raise OutputError(
            f"{path}: a merge of {len(plan.parts)} parts into shards of {plan.shard_bytes} bytes has begun, now "
            f"{len(parts)} parts and {shard_bytes} bytes are asked; repeat the former settings, or add --restart"
        )
    return plan


def _new_plan(headers: list[Header], shard_bytes: int, others: Sequence[Stored]) -> Plan:
    """Fill shards in the order of the parts and of the tensors in them, each as far as `shard_bytes` allows."""
    sources = _sources(headers, others)
    groups: list[list[TensorEntry]] = [[]]
    room = shard_bytes
    inside = (sorted(header.entries.values(), key=lambda entry: (entry.start, entry.name)) for header in headers)
    for entry in chain((stored.entry for stored in others), *inside):
        if entry.nbytes > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(entry)
        room -= entry.nbytes
    shards = []
    for number, group in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        sha256 = hashlib.sha256(build_header(group, METADATA)).hexdigest()
        data_bytes = sum(entry.nbytes for entry in group)
        shards.append(Shard(file, sha256, data_bytes, {entry.name: sources[entry.name] for entry in group}))
    return Plan([header.path.name for header in headers], shard_bytes, shards)


def _sources(headers: list[Header], others: Sequence[Stored]) -> dict[str, str]:
    """The part that each tensor stands in. Raises CheckpointError for a tensor that stands in two."""
    sources = {stored.entry.name: NO_PART for stored in others}
    for header in headers:
        for name in header.entries:
            if name in sources:
                also = sources[name] or "the original"
                raise CheckpointError(
                    f"{header.path}: tensor {shown(name)} stands in {also} too; parts that share a tensor cannot be "
                    "merged; begin anew with --restart"
                )
            sources[name] = header.path.name
    return sources


def _digests_of_merged(work: Path) -> dict[str, str]:
    """The digests of the shards that a killed merge has finished, by file name; a shard without one is made again."""
    try:
        digests = json.loads((work / MERGED).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(digests) if isinstance(digests, dict) else {}


def _is_finished(path: Path, shard: Shard, digest: str | None) -> bool:
    """Whether `path` is this shard, with the bytes that it was written with."""
    try:
        header = read_header(path)
        with path.open("rb") as file:
            header_sha256 = hashlib.sha256(file.read(header.data_start)).hexdigest()
        return header_sha256 == shard.header_sha256 and digest == file_digest(path)
    except (CheckpointError, OSError):
        return False


def _write_shard(work: Path, folder: Path, shard: Shard, others: Sequence[Stored]) -> str:
    """Write one shard from its parts, all of which are still there; return its digest."""
    gone = [part for part in sorted(set(shard.parts.values()) - {NO_PART}) if not (work / part).exists()]
    if gone:
        raise OutputError(
            f"{folder / shard.file}: not what was merged, and its part {gone[0]} is gone; begin anew with --restart"
        )
    headers = [read_header(work / part) for part in sorted(set(shard.parts.values()) - {NO_PART})]
    tensors = {stored.entry.name: stored for stored in others}
    tensors |= {name: Stored(header, entry) for header in headers for name, entry in header.entries.items()}
    entries = [tensors[name].entry for name in shard.parts if name in tensors]
    start = build_header(entries, METADATA)
    if hashlib.sha256(start).hexdigest() != shard.header_sha256:
        raise OutputError(f"{work}: the parts of {shard.file} changed since the merge began; begin anew with --restart")
    with atomic(folder / shard.file, len(start) + shard.data_bytes) as plain:
        file = Digested(plain)
        file.write(start)
        for entry in file_order(entries):
            tensors[entry.name].copy_to(file)
            if shard.parts[entry.name] != NO_PART:
                tensors[entry.name].forget()
    return file.digest


def _remove_parts(work: Path, parts: list[str]) -> None:
    """Remove parts that are merged."""
    try:
        for part in parts:
            (work / part).unlink(missing_ok=True)
        if parts:
            sync_folder(work)
    except OSError as error:
        raise OutputError(f"{work}: a merged part cannot be removed: {error}; check its permissions") from error
