"""Tensors to and from disk: headers are checked, memory is bounded, no file is left half-written."""
