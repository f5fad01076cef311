"""What is known of architectures: one short file each, named after the ``model_type`` of a model's config.json.

A file ends with ``ARCHITECTURE = Architecture(decoder, family)``. ``decoder`` reads the config.json of a decoder like
Llama's (``core/decoder.py``); ``family`` says which linears read the same input and where equivalent transformations
go (``core/block.py``). Either may be left out.
"""
