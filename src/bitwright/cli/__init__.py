"""The command line: it parses options, calls ``api`` and shows progress and results.

Results go to standard output, everything else to standard error.
"""

from bitwright.cli.entry import Interrupted, main

__all__ = ["Interrupted", "main"]
