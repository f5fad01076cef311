"""The stream: one decoder block, or one tensor, in memory at a time, in one process or many."""
