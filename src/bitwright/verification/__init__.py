"""Proof that a folder or a file is what it claims to be."""
