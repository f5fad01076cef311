"""Measurements of written folders and files: perplexity, divergence from the original, tasks, speed."""
