"""The drivers: they go through a model with one decoder block, or one tensor, in memory at a time."""
