import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitwright.checkpoint.output import OutputFolder, refuse_existing, refuse_overlap, require_free, work_folder
from bitwright.core.errors import OutputError

KilledAt = Callable[[int, Callable[[], object]], bool]


def fill(claimed: OutputFolder, text: str) -> None:
    """A result of two files, one of them in a folder, and some work beside it."""
    (claimed.path / "sub").mkdir(exist_ok=True)
    (claimed.path / "sub" / "a").write_text(text)
    (claimed.path / "b").write_text(text)
    (claimed.work / "journal.jsonl").write_text(text)


def make(output: Path, text: str, overwrite: bool = False) -> None:
    with OutputFolder.claim(output, overwrite=overwrite) as claimed:
        fill(claimed, text)
        claimed.publish()


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def whole(text: str) -> dict[str, str]:
    return {"sub/a": text, "b": text}


def test_a_result_appears_whole_and_alone(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er" / "out"
    with OutputFolder.claim(output) as claimed:
        fill(claimed, "new")
        (claimed.path / ".x.tmp").touch()
        assert not output.exists()
        claimed.publish()
    assert contents(output) == whole("new")
    assert list(output.parent.iterdir()) == [output]


def test_discarded_nothing_is_left_but_work_that_can_go_on(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with OutputFolder.claim(tmp_path / "out", overwrite=True) as claimed:
        (claimed.path / "half").touch()
        claimed.discard()
    assert contents(tmp_path) == {f"out/{name}": text for name, text in whole("old").items()}
    with OutputFolder.claim(tmp_path / "other") as claimed:
        fill(claimed, "half")
        claimed.discard()
        assert (claimed.work / "journal.jsonl").exists() and (claimed.path / "b").exists()


def test_what_exists_is_kept(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with pytest.raises(OutputError, match=r"out: exists and is kept as it is; .*--overwrite"):
        OutputFolder.claim(tmp_path / "out")
    assert contents(tmp_path / "out") == whole("old")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_overwriting_replaces_at_the_end(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with OutputFolder.claim(tmp_path / "out", overwrite=True) as claimed:
        fill(claimed, "new")
        assert contents(tmp_path / "out") == whole("old")
        claimed.publish()
    assert contents(tmp_path / "out") == whole("new")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_work_goes_on_or_is_emptied_on_restart(tmp_path: Path) -> None:
    with OutputFolder.claim(tmp_path / "out") as claimed:
        fill(claimed, "begun")
    with OutputFolder.claim(tmp_path / "out") as claimed:
        assert contents(claimed.path) == whole("begun")
        assert (claimed.work / "journal.jsonl").read_text() == "begun"
    with OutputFolder.claim(tmp_path / "out", restart=True) as claimed:
        assert not contents(claimed.path)
        assert [path.name for path in claimed.work.iterdir() if path.is_file()] == [".lock"]


def test_a_restart_that_is_killed_leaves_work_that_counts_or_none(tmp_path: Path, killed_at: KilledAt) -> None:
    step = 0
    while True:
        with OutputFolder.claim(tmp_path / "out", restart=True) as claimed:
            fill(claimed, "begun")
        killed = killed_at(step, lambda: OutputFolder.claim(tmp_path / "out", restart=True).release())
        with OutputFolder.claim(tmp_path / "out") as claimed:
            if contents(claimed.path):
                assert contents(claimed.path) == whole("begun")
                assert (claimed.work / "journal.jsonl").exists()
            else:
                assert not (claimed.work / "journal.jsonl").exists()
        if not killed:
            break
        step += 1
    assert step >= 5


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with OutputFolder.claim(tmp_path / "out") as claimed:
        fill(claimed, "begun")
        for restart in (False, True):
            with pytest.raises(OutputError, match=r"another run is working on it \(it holds .*\.lock\)"):
                OutputFolder.claim(tmp_path / "out", restart=restart)
        assert contents(claimed.path) == whole("begun")
    OutputFolder.claim(tmp_path / "out").release()


def test_the_lock_of_a_killed_process_falls(tmp_path: Path) -> None:
    OutputFolder.claim(tmp_path / "out").release()
    lock = tmp_path / "out.partial" / ".lock"
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    command = [sys.executable, "-I", "-c", code, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another run is working on it"):
            OutputFolder.claim(tmp_path / "out")
        holder.kill()
    OutputFolder.claim(tmp_path / "out").release()


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file: is a file"):
        OutputFolder.claim(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        OutputFolder.claim(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="root of the file system"):
        OutputFolder.claim(Path("/"), overwrite=True)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OutputError, match="cannot be written"):
        OutputFolder.claim(tmp_path / "circle")


def test_overwriting_never_takes_the_floor_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path("."), Path(".."), tmp_path):
        with pytest.raises(OutputError, match="--overwrite would remove"):
            refuse_existing(output, overwrite=True)
        with pytest.raises(OutputError, match="exists and is kept"):
            refuse_existing(output, overwrite=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    (tmp_path / "home" / "me").mkdir(parents=True)
    with pytest.raises(OutputError, match="--overwrite would remove"):
        refuse_existing(tmp_path / "home", overwrite=True)


def test_a_folder_of_that_name_which_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").touch()
    for restart in (False, True):
        with pytest.raises(OutputError, match="was not made by a run of Bitwright"):
            OutputFolder.claim(tmp_path / "out", restart=restart)
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["thesis.tex"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with OutputFolder.claim(tmp_path / "out") as claimed:
        fill(claimed, "new")
        (tmp_path / "out").mkdir()
        with pytest.raises(OutputError, match="exists and is kept"):
            claimed.publish()
        assert contents(claimed.path) == whole("new")


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    make(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == whole("new")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rename_that_fails_puts_the_old_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    make(tmp_path / "out", "old")
    real, count = os.rename, 0

    def rename(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == failing + 1:
            raise OSError(5, "Input/output error")
        real(source, target)

    with OutputFolder.claim(tmp_path / "out", overwrite=True) as claimed:
        fill(claimed, "new")
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", rename)
            with pytest.raises(OutputError, match="cannot be written"):
                claimed.publish()
        assert contents(tmp_path / "out") == whole("old")
        assert contents(claimed.path) == whole("new")
        claimed.publish()
    assert contents(tmp_path / "out") == whole("new")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_step_of_publishing(tmp_path: Path, killed_at: KilledAt, overwrite: bool) -> None:
    """Whatever is found afterwards goes on to the new result; the former one is lost at no moment."""
    step, output = 0, tmp_path / "out"
    former = {"old"} if overwrite else set()
    while True:
        if overwrite:
            make(output, "old", overwrite=True)
        claimed = OutputFolder.claim(output, overwrite=overwrite)
        fill(claimed, "new")
        killed = killed_at(step, claimed.publish)
        claimed.release()  # as the system does when a process ends
        if not killed:
            break
        check_after_kill(output, former)
        step += 1
    assert contents(output) == whole("new")
    assert list(tmp_path.iterdir()) == [output]
    assert step >= (8 if overwrite else 6)


def check_after_kill(output: Path, former: set[str]) -> None:
    """OUTPUT is old or new and whole, or a claim brings the old one back; the work on a missing new one is there."""
    if output.exists() and contents(output) == whole("new"):
        with pytest.raises(OutputError, match="exists and is kept"):
            OutputFolder.claim(output)
        make(output, "newer", overwrite=True)
        assert contents(output) == whole("newer")
    else:
        with OutputFolder.claim(output, overwrite=bool(former)) as claimed:
            assert output.exists() == bool(former)
            assert all(contents(output) == whole(text) for text in former)
            assert contents(claimed.path) == whole("new")
            assert (claimed.work / "journal.jsonl").read_text() == "new"
            claimed.publish()
        assert contents(output) == whole("new")
    assert list(output.parent.iterdir()) == [output]
    for path in sorted(output.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    output.rmdir()


def test_a_former_result_comes_back_even_without_overwrite(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / "out.old-bitwright")
    with pytest.raises(OutputError, match="exists and is kept"):
        OutputFolder.claim(tmp_path / "out")
    assert contents(tmp_path / "out") == whole("old")


def test_the_model_is_not_written_over(tmp_path: Path) -> None:
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for output in (model, tmp_path / "models", tmp_path, model / ".." / "m", tmp_path / "link"):
        with pytest.raises(OutputError, match="would be replaced by the result"):
            refuse_overlap(model, output)
    for name in ("out.partial", "out.old-bitwright"):
        with pytest.raises(OutputError, match="would be replaced by the result"):
            refuse_overlap(tmp_path / name, tmp_path / "out")
    refuse_overlap(model, model / "out")
    refuse_overlap(model, tmp_path / "models" / "m2")
    assert work_folder(model) == tmp_path / "models" / "m.partial"


def test_room_is_asked_for_beforehand(tmp_path: Path) -> None:
    require_free(tmp_path / "not" / "yet", 1)
    with pytest.raises(
        OutputError, match=r"1000000000000000000 bytes are needed, \d+ are free .*; make room for \d+ more"
    ):
        require_free(tmp_path / "not" / "yet", 10**18)


@pytest.mark.parametrize("place", [".lock", "journal.jsonl", "part-0.safetensors", "result/config.json", "any/x"])
def test_no_run_waits_for_a_pipe_in_its_work(place: str, tmp_path: Path) -> None:
    with OutputFolder.claim(tmp_path / "out") as claimed:
        fill(claimed, "half")
    pipe = tmp_path / "out.partial" / place
    pipe.parent.mkdir(exist_ok=True)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    signal.alarm(30)  # ends the tests rather than wait for ever
    with pytest.raises(OutputError, match="a named pipe, not a regular file"):
        OutputFolder.claim(tmp_path / "out")
    signal.alarm(0)
    pipe.unlink()
    (tmp_path / "out.partial" / ".lock").touch()
    OutputFolder.claim(tmp_path / "out").release()


def test_a_device_behind_a_link_is_no_part(tmp_path: Path) -> None:
    with OutputFolder.claim(tmp_path / "out") as claimed:
        fill(claimed, "half")
    (tmp_path / "out.partial" / "part").symlink_to("/dev/zero")
    (tmp_path / "out.partial" / "nothing").symlink_to("nowhere")
    with pytest.raises(OutputError, match="part: a device or a socket"):
        OutputFolder.claim(tmp_path / "out")
