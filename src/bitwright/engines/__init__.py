"""What each engine runs, one file each: the file's ``ENGINE`` (``core/engine.py``) is all that has to be written."""
