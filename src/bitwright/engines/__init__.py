"""The engines, one file each: ``ENGINE`` (``core/engine.py``) says what the engine runs."""
