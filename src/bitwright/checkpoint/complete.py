"""Whether a checkpoint holds what its configuration calls for, no more blocks and no fewer."""

from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError
from bitwright.core.outline import Outline


def require_complete(checkpoint: Checkpoint, outline: Outline) -> None:
    """Raises CheckpointError for a tensor that is missing or has another shape, and for blocks that are not counted."""
    for name, wanted in outline.shapes.items():
        stored = outline.source(name)
        if stored not in checkpoint:
            raise CheckpointError(
                f"{checkpoint.folder} has no tensor '{stored}', which its config.json calls for; "
                "the checkpoint is incomplete or belongs to another configuration: download it again"
            )
        found = checkpoint.entry(stored).shape
        if found != wanted:
            raise CheckpointError(
                f"tensor '{stored}' in {checkpoint.folder} has shape {list(found)}, but its config.json "
                f"calls for {list(wanted)}; config and weights belong to different models: download both again"
            )
    _require_no_more_blocks(checkpoint, outline)


def _require_no_more_blocks(checkpoint: Checkpoint, outline: Outline) -> None:
    """A block that the configuration does not count would stay in full precision without a word."""
    prefix, known = f"{outline.family.blocks}.", tuple(f"{name}." for name in outline.blocks)
    extra = [name for name in checkpoint.names if name.startswith(prefix) and not name.startswith(known)]
    if extra:
        raise CheckpointError(
            f"{checkpoint.folder} holds '{extra[0]}', but its config.json counts {len(outline.blocks)} blocks; config "
            "and weights belong to different models: download both again"
        )
