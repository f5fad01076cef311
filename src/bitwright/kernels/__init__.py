"""Kernels: packed weights at run time. One reference is right, the others are fast."""
