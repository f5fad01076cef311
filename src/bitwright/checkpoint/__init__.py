"""The checkpoint room: tensors <-> disk, with checked headers, bounded memory and no half-written file."""
