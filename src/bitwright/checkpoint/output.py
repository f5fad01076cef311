"""The output of a run: made beside its final place, under a lock, and moved there once it is whole.

    OUTPUT.partial/         the work folder: lock, journal, parts, plan of the merge
    OUTPUT.partial/result/  what becomes OUTPUT, or holds the file that does if the result is a single file
    OUTPUT.old-bitwright/   the former OUTPUT while --overwrite replaces it

The result has its own folder, so that publishing is one rename. Whenever a run is killed, either OUTPUT is whole and
without files of the work, or everything that a run needs to go on is there.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from bitwright.checkpoint.writer import free_bytes, sync_folder
from bitwright.core.errors import OutputError
from bitwright.core.small_files import require_regular

LOCK = ".lock"
RESULT = "result"
REMOVED = "removed"


class OutputFolder:
    """An output that this run, and no other run, is making.

    `path` takes the result's files, `work` everything else. If the result is a single file, `file` is its path. As a
    context manager, it releases the lock at the end, and keeps the work for a run that goes on.
    """

    def __init__(self, output: Path, overwrite: bool, lock: FileLock, single: bool = False) -> None:
        """Take an output whose `lock` is held. Use `OutputFolder.claim`."""
        self.output = output
        self.work = work_folder(output)
        self.path = self.work / RESULT
        self.file = self.path / output.name
        self._overwrite, self._single = overwrite, single
        self._lock = lock

    @classmethod
    def claim(
        cls, output: Path, overwrite: bool = False, restart: bool = False, single: bool = False
    ) -> "OutputFolder":
        """Claim `output` for this run, and go on with what a killed run left of it; begin anew on `restart`.

        Raises OutputError if the output exists (with `overwrite` it is replaced when the new one is whole), is a file
        (with `single`: a folder), cannot be written, or is claimed by another run. Then nothing on disk is changed.
        """
        try:
            output = Path(output).resolve()
            refuse_existing(output, overwrite, single)
            lock = _locked(output)
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise _refused(output, error) from error
        try:
            _restore(output)
            refuse_existing(output, overwrite, single)
            _prepare(work_folder(output), restart)
        except BaseException as error:
            lock.release()
            if isinstance(error, OSError):
                raise _refused(output, error) from error
            raise
        return cls(output, overwrite, lock, single)

    def publish(self) -> None:
        """Make the result durable, move it to OUTPUT, and remove the work folder and the lock.

        Raises OutputError if that fails; a former OUTPUT is then back in its place, and the work is kept.
        """
        try:
            _remove_temporaries(self.path)
            _sync_tree(self.path)
            refuse_existing(self.output, self._overwrite, self._single)
            self._move_into_place()
        except OSError as error:
            raise _refused(self.output, error) from error
        _remove_tree(_old(self.output))
        _remove_work(self.work)
        self._lock.release()

    def empty_result(self) -> None:
        """Remove all files of the result, which is about to be made from the beginning."""
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def discard(self) -> None:
        """Remove the work folder if it holds nothing but an unfinished result; a run that can go on is kept."""
        if {path.name for path in self.work.iterdir()} <= {LOCK, RESULT}:
            _remove_work(self.work)

    def release(self) -> None:
        """Release the lock; the work stays for a run that goes on."""
        self._lock.release()

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _move_into_place(self) -> None:
        """Rename the result to OUTPUT, with a former OUTPUT out of the way, and back if that fails."""
        if self._single:  # a file is replaced in one step
            os.replace(self.file, self.output)
            sync_folder(self.output.parent)
            return
        old = _old(self.output)
        if self.output.exists():
            os.rename(self.output, old)
            sync_folder(self.output.parent)
        try:
            os.rename(self.path, self.output)
        except BaseException:
            _restore(self.output)
            raise
        sync_folder(self.output.parent)


def work_folder(output: Path) -> Path:
    """The folder for the work on `output`: beside it, because only there a rename is atomic."""
    return output.with_name(output.name + ".partial")


def begin_anew(work: Path) -> None:
    """Make the next run begin anew in a work folder, which it empties.

    This is one rename, so that a kill leaves all of the work or none of it.
    """
    shutil.rmtree(work / REMOVED, ignore_errors=True)
    with suppress(FileNotFoundError):  # another process of the same run was first
        os.rename(work / RESULT, work / REMOVED)


def refuse_overlap(model: Path, output: Path) -> None:
    """Raise OutputError if writing `output` would write over `model`.

    It would if the output, its work folder or its former version is the model's folder, or contains it.
    """
    source = model.resolve()
    for target in (output.resolve(), work_folder(output.resolve()), _old(output.resolve())):
        if target == source or target in source.parents:
            raise OutputError(
                f"{output}: the model that is read, {model}, is there, and would be replaced by the result; choose "
                "another output"
            )


def require_free(path: Path, nbytes: int) -> None:
    """Raise OutputError if the file system that `path` is, or will be, on has fewer than `nbytes` bytes free."""
    try:
        free = free_bytes(path)
    except OSError as error:
        raise _refused(path, error) from error
    if free < nbytes:
        raise OutputError(
            f"{path}: {nbytes} bytes are needed, {free} are free on its file system; make room for {nbytes - free} "
            "more, or choose another output"
        )


def refuse_existing(output: Path, overwrite: bool, single: bool = False) -> None:
    """Raise OutputError if something exists at OUTPUT that must not be replaced (by a file, if `single`)."""
    place = output.resolve()
    if not place.name:
        raise OutputError(f"{output}: is the root of the file system; name a folder for the result")
    if single and output.is_dir():
        raise OutputError(f"{output}: is a folder; the result is a file, choose another name for it")
    if not single and output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; the result is a folder, choose another name for it")
    if not output.exists():
        return
    if not overwrite:
        raise OutputError(f"{output}: exists and is kept as it is; choose another output, or add --overwrite")
    if single:
        return
    home = Path(os.path.expanduser("~"))
    precious = next((kept for kept in (Path.cwd(), home.resolve()) if place in (kept, *kept.parents)), None)
    if precious is not None:
        raise OutputError(f"{output}: --overwrite would remove {precious} with it; name a folder for the result alone")


def _locked(output: Path) -> FileLock:
    """Take the lock of OUTPUT's work folder, which is made if need be."""
    work = work_folder(output)
    try:
        if work.exists() and not (work / LOCK).exists() and any(work.iterdir()):
            raise OutputError(f"{work}: is in the way and was not made by a run of Bitwright; move it, or remove it")
        work.mkdir(parents=True, exist_ok=True)
        _require_files(work)
        lock = FileLock(work / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"{output}: another run is working on it (it holds {work / LOCK}); wait for it, or choose another output"
        ) from None
    return lock


def _require_files(work: Path) -> None:
    """Raise OutputError for a named pipe or a device in a work folder: whoever opens one may wait for ever."""
    for place, _, files in os.walk(work):
        for name in files:
            with suppress(FileNotFoundError):  # a link to nothing, or a file that another run removes
                require_regular(Path(place, name), OutputError)


def _restore(output: Path) -> None:
    """Put a former OUTPUT back if it was not replaced, else remove it. The lock must be held."""
    old = _old(output)
    if old.is_dir() and not output.exists():
        os.rename(old, output)
        sync_folder(output.parent)
    elif old.is_dir():
        _remove_tree(old)


def _prepare(work: Path, restart: bool) -> None:
    """Make the work folder ready; if it has no result folder, it is a rest of a published run, and is emptied."""
    if restart or not (work / RESULT).is_dir():
        _empty(work)
    (work / RESULT).mkdir(exist_ok=True)
    sync_folder(work)


def _empty(work: Path) -> None:
    """Remove everything but the lock: first the result, by a rename, because without it nothing else counts."""
    begin_anew(work)
    for path in work.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove_work(work: Path) -> None:
    """Remove a work folder, the lock last: if this is interrupted, the lock shows that the folder is ours."""
    try:
        _empty(work)
        (work / LOCK).unlink(missing_ok=True)
        work.rmdir()
    except OSError:
        return  # the result is in place; the next claim clears this up


def _remove_temporaries(result: Path) -> None:
    """Remove files that a killed run did not finish writing."""
    for path in result.rglob(".*.tmp"):
        path.unlink()


def _remove_tree(folder: Path) -> None:
    """Remove a former OUTPUT as far as that is possible; the next claim tries again."""
    shutil.rmtree(folder, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Make all files and folders of a tree durable."""
    for place, _, files in os.walk(folder):
        for name in files:
            with open(Path(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def _old(output: Path) -> Path:
    """The place of a former OUTPUT while it is replaced; a name that nobody else gives a folder."""
    return output.with_name(output.name + ".old-bitwright")


def _refused(output: Path, error: BaseException) -> OutputError:
    """The error for what the file system did not allow."""
    return OutputError(f"{output}: cannot be written: {error}; check the permissions, or choose another output")
