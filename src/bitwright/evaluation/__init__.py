"""Perplexity and divergence from the original; reads only exported folders. The function is ``bitwright.evaluate``."""
