import sys
from pathlib import Path

import pytest

import make_clients
from make_clients import ENVIRONMENTS, REQUIREMENTS, commands

ROOT = Path(make_clients.__file__).parents[1]


def test_every_worker_has_its_requirements_in_exact_versions() -> None:
    workers = {path.name.removesuffix("_worker.py") for path in (ROOT / "benchmarks/clients").glob("*_worker.py")}
    assert {path.stem for path in REQUIREMENTS.glob("*.txt")} == workers
    lines = [line for path in REQUIREMENTS.glob("*.txt") for line in path.read_text().splitlines()]
    assert lines and all("==" in line for line in lines)


def test_torch_goes_first_and_what_is_unwanted_goes_last() -> None:
    found = commands("vllm", ENVIRONMENTS / "vllm", REQUIREMENTS / "vllm.txt")
    assert [command[5:7] for command in found[1:]] == [
        ["install", "torch==2.13.0"],
        ["install", "-r"],
        ["uninstall", "-y"],
    ]


def test_one_that_cannot_be_made_is_left_out_and_the_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.txt").write_text("x==1\n")
    (tmp_path / "bad.txt").write_text("y==1\n")
    run: list[str] = []

    def asked(name: str, environment: Path, _: Path) -> list[list[str]]:
        run.append(name)
        code = f"import os, sys; os.makedirs({str(environment)!r}); sys.exit({int(name == 'bad')})"
        return [[sys.executable, "-c", code]]

    monkeypatch.setattr(make_clients, "REQUIREMENTS", tmp_path)
    monkeypatch.setattr(make_clients, "ENVIRONMENTS", tmp_path / "made")
    monkeypatch.setattr(make_clients, "commands", asked)
    make_clients.main([])
    assert "bad: left out" in capsys.readouterr().err
    assert not (tmp_path / "made/bad").exists()
    make_clients.main([])
    assert run == ["bad", "good", "bad"]  # what is ready is not made again
    with pytest.raises(SystemExit, match="no client 'none'"):
        make_clients.main(["none"])
    with pytest.raises(SystemExit, match="could be made"):
        make_clients.main(["bad"])
