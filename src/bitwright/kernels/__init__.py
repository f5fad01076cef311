"""Packed weights at run time: one reference that is right, the others fast."""
