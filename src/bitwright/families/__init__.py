"""Descriptions of architectures: one short file each, named after the ``model_type`` of a model's config.json.

A file ends with ``ARCHITECTURE = Architecture(decoder, family)``; either may be left out. ``decoder`` reads the
config.json of a decoder like Llama's (``core/decoder.py``): GGUF and MLC files are written from it. ``family`` says
which linears read the same input and where equivalent transformations go (``core/block.py``): methods that work on
whole blocks need it. ``opt.py`` has a family alone, the others both. A block that is Llama's but for biases and norms
takes ``llama.blocks``.
"""
