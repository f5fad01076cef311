"""Perplexity and divergence from the original; reads only exported folders. (``bitwright.evaluate`` is the function.)"""
