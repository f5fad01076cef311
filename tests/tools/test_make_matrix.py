"""The environments of the matrix have the versions that they are called after."""

import re
from pathlib import Path

import make_matrix

ROOT = Path(make_matrix.__file__).parents[1]
LIBRARIES = ("transformers", "compressed-tensors")


def pinned(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert all("==" in line for line in lines)
    return dict(line.split("==") for line in lines)


def test_the_oldest_releases_are_those_that_the_project_allows() -> None:
    project, oldest = (ROOT / "pyproject.toml").read_text(), pinned(make_matrix.REQUIREMENTS / "oldest.txt")
    for library in LIBRARIES:
        (least,) = re.findall(rf'^    "{library}>=([0-9.]+)', project, re.MULTILINE)
        assert oldest[library] == f"{least}.0"


def test_the_locked_releases_are_those_of_the_lock() -> None:
    lock, locked = pinned(ROOT / "requirements/constraints.txt"), pinned(make_matrix.REQUIREMENTS / "locked.txt")
    assert all(lock[library] == locked[library] for library in (*LIBRARIES, "torch"))


def test_the_table_has_a_column_for_each_and_bitwright_loads_all() -> None:
    table = (ROOT / "benchmarks/results/matrix.md").read_text(encoding="utf-8")
    assert "| format | scheme | loaded by | oldest | locked | newest |" in table
    ours = [line for line in table.splitlines() if re.search(r"\| (bitwright\.load|transformers after)", line)]
    assert len(ours) > 20 and not any("**" in line for line in ours)
