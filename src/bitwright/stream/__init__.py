"""One block in memory at a time."""
