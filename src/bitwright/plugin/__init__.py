"""The plugin that makes transformers load the bitwright format once both are imported."""
