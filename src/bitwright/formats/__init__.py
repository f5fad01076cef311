"""A quantized model and somebody's format: one file per format, each with read and write."""
