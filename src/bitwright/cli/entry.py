"""The end of a command: the exit codes, and the messages for errors."""

import errno
import os
import select
import signal
import sys
import traceback
from importlib.metadata import version
from io import TextIOWrapper
from threading import Thread
from typing import NoReturn

from bitwright.cli.commands import app
from bitwright.cli.console import err
from bitwright.core.errors import NO_THREAD, MachineError, ReportedError, UserError, cut

MENDABLE, BUG, INTERRUPTED, UNREAD = 2, 1, 130, 141
MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
}
PANIC = "PanicException"
ISSUES = "Please report it with the lines above."


class Interrupted(BaseException):
    """Ctrl-C, as an exception that no library catches, as some do with KeyboardInterrupt."""


def main() -> NoReturn:
    """Run the command line and exit.

    The exit code is 0 for success, 2 for an error that a user can mend, 1 for a bug, 130 if interrupted, and 141 if the
    program that reads the output stops reading.
    """
    _open_standard_streams()
    signal.signal(signal.SIGINT, _interrupt)
    # compressed-tensors draws a bar for each loaded model with tqdm, which reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show is no reason to fail
    try:
        _run()
    except BrokenPipeError as error:
        if _silenced():
            sys.exit(UNREAD)
        _bug(error)
    except Interrupted:
        if (refusal := _no_thread()) is not None:  # OpenBLAS interrupts its process if it gets none
            _fail(refusal, MENDABLE)
        _fail("interrupted; quantize and evaluate --tasks, when repeated, continue where they stopped", INTERRUPTED)
    except ReportedError:
        sys.exit(MENDABLE)
    except Exception as error:
        message = _mendable(error)
        if message is not None:
            _fail(message, MENDABLE)
        _bug(error)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if type(error).__name__ != PANIC:
            raise
        _bug(error)
    sys.exit(0)


def _open_standard_streams() -> None:
    """Open what the caller has closed (``>&-``), so that no other file takes its number, and prints go nowhere."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _run() -> None:
    """Run the command line. Raises BrokenPipeError, also if click has turned it into an exit code."""
    try:
        app()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):
            raise ended.__context__ from None
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _silenced() -> bool:
    """Whether an output is no longer read; if so, what is still unwritten goes nowhere."""
    gone = [stream.fileno() for stream in (sys.stdout, sys.stderr) if _unread(stream.fileno())]
    for number in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(gone)


def _unread(number: int) -> bool:
    poll = select.poll()
    poll.register(number, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _mendable(error: Exception) -> str | None:
    """The message for an error that the user can mend; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    # Out of memory, torch raises its own RuntimeError on a GPU, and a plain one on a CPU.
    signs = ("MemoryError", "OutOfMemoryError", "can't allocate memory", "Cannot allocate memory")
    if any(sign in f"{type(error).__name__}: {error}" for sign in signs):
        return "out of memory; bitwright quantize --dry-run says how much a run needs"
    if NO_THREAD in str(error) or (isinstance(error, OSError) and error.errno == errno.EAGAIN):
        return str(MachineError.of(error))
    if isinstance(error, OSError) and error.errno in MACHINE:
        return f"the machine did not allow it: {error}; make room or check permissions, then try again"
    return None


def _no_thread() -> str | None:
    """The message if the system starts no more threads, else None."""
    thread = Thread(target=int)
    try:
        thread.start()
    except RuntimeError as error:
        return str(MachineError.of(error))
    thread.join()
    return None


def _interrupt(*_: object) -> NoReturn:
    raise Interrupted


def _bug(error: BaseException) -> NoReturn:
    traceback.print_exception(error)
    _fail(f"this is a bug in Bitwright {version('bitwright')}. {ISSUES}", BUG)


def _fail(message: str, code: int) -> NoReturn:
    err.print(f"error: {cut(message)}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
