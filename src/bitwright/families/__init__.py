"""Where things sit in a block: one short file per architecture.

A file is named after the ``model_type`` of a model's config.json and has one function,
``describe(config: PretrainedConfig-like mapping) -> Family``.
"""
