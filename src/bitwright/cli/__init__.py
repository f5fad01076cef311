"""The command line: parses, calls ``api``, shows progress. Results go to standard output, everything else to error."""

from bitwright.cli.entry import Interrupted, main

__all__ = ["Interrupted", "main"]
