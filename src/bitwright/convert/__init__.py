"""Export: a quantized folder in another format, its codes kept."""
