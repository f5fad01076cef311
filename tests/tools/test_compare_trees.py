"""What the comparison of two trees reports: nothing where nothing differs, else the file, and what in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file

from compare_cases import EMBEDDED, METHODS, OUTCOME, Case, cases
from compare_trees import Side, origins, prepare, run, shares, verdict, with_needs

ROOT = Path(__file__).resolve().parents[2]
CASE = Case("case", EMBEDDED, {"scheme": "W4A16g128"})
ACCOUNT = {"bitwright": "0.1.0", "recipe": {"seed": 0}, "totals": {"linears": 14},
           "blocks": [{"linears": [{"name": "q", "weight_error": 0.125}]}]}  # fmt: skip
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Side, Side]:
    """Two trees that have written the same for a case, with another clock."""
    for name in ("before", "after"):
        out = tmp_path / name / CASE.name / "out"
        out.mkdir(parents=True)
        (out / "bitwright.json").write_text(json.dumps(ACCOUNT))
        (out / "bitwright-timings.json").write_text(name)
        (out / "config.json").write_text('{"a": 1, "b": 2}')
        (out / "params.bin").write_bytes(b"bytes")
        save_file({"x": torch.zeros(4), "y": torch.ones(2)}, out / "model.safetensors")
        write_gguf(out / "model.gguf")
        (out.parent / OUTCOME).write_text('{"result": {"linears": 1}}')
    return Side("before", ROOT, tmp_path), Side("after", ROOT, tmp_path)


def write_gguf(path: Path, account: dict[str, Any] = ACCOUNT, weight: float = 1, name: str = "model") -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.name", name)
    writer.add_string("bitwright.account", json.dumps(account))
    writer.add_tensor("w", np.full((2, 32), weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def out(sides: tuple[Side, Side]) -> Path:
    """What the second tree wrote."""
    return sides[1].folder / CASE.name / "out"


def changed(change: Change) -> dict[str, Any]:
    account: dict[str, Any] = json.loads(json.dumps(ACCOUNT))
    change(account)
    return account


def test_the_same(sides: tuple[Side, Side]) -> None:
    assert verdict(CASE, sides) == ("same", [])
    (out(sides) / "bitwright.json").write_text(json.dumps(dict(reversed(ACCOUNT.items())), indent=1))
    assert verdict(CASE, sides) == ("same", []), "of the account the values count"


def test_a_changed_byte(sides: tuple[Side, Side]) -> None:
    (out(sides) / "params.bin").write_bytes(b"bites")
    save_file({"x": torch.zeros(4), "y": torch.full((2,), 2.0)}, out(sides) / "model.safetensors")
    (out(sides) / "config.json").write_text('{"b": 2, "a": 1}')
    word, said = verdict(CASE, sides)
    assert word == "differs"
    assert [one.split()[:2] for one in said] == [
        ["out/config.json:", "<bytes>"], ["out/model.safetensors:", "y.data"], ["out/params.bin:", "<bytes>"],
    ]  # fmt: skip


def test_a_file_that_is_missing_and_one_too_many(sides: tuple[Side, Side]) -> None:
    (out(sides) / "bitwright-timings.json").unlink()
    (out(sides) / "more.txt").write_text("more")
    (out(sides) / "allocation.json").write_text("{}")
    assert verdict(CASE, sides) == ("differs", [
        "out/bitwright-timings.json: <file> 6 -> (absent)", "out/more.txt: <file> (absent) -> 4",
    ])  # fmt: skip
    (out(sides) / "more.txt").unlink()
    (out(sides) / "bitwright-timings.json").write_text("")
    assert verdict(CASE, sides) == ("listed", ["what a run allocated is said"])


@pytest.mark.parametrize(("change", "word", "says"), [
    (lambda a: a.update(bitwright="0.2.0"), "listed", "Bitwright's version"),
    (lambda a: a.update(allocation={"q": 4}), "listed", "what a run allocated is said"),
    (lambda a: a["recipe"].update(target=3), "listed", "a key that a recipe has gained"),
    (lambda a: a["recipe"].update(seed=1), "differs", "recipe.seed 0 -> 1"),
    (lambda a: a["recipe"].pop("seed"), "differs", "recipe.seed 0 -> (absent)"),
    (lambda a: a["totals"].update(linears=13), "differs", "totals.linears 14 -> 13"),
    (lambda a: a["blocks"][0]["linears"][0].update(weight_error=0.12500001), "listed", "computed in one place"),
    (lambda a: a["blocks"][0]["linears"][0].update(weight_error=0.126), "differs",
     "blocks.0.linears.0.weight_error 0.125 -> 0.126"),
    (lambda a: a["blocks"].append({}), "differs", "blocks.1 (absent) -> {}"),
])  # fmt: skip
def test_the_account_in_a_folder_and_in_a_gguf_file(
    change: Change, word: str, says: str, sides: tuple[Side, Side]
) -> None:
    writers: dict[str, Callable[[], object]] = {
        "out/bitwright.json": lambda: (out(sides) / "bitwright.json").write_text(json.dumps(changed(change))),
        "out/model.gguf/bitwright.json": lambda: write_gguf(out(sides) / "model.gguf", changed(change)),
    }
    for name, write in writers.items():
        write()
        found, said = verdict(CASE, sides)
        assert (found, said[0 if word == "listed" else -1]) == (word, says if word == "listed" else f"{name}: {says}")


def test_a_gguf_file_with_another_tensor_or_another_key(sides: tuple[Side, Side]) -> None:
    write_gguf(out(sides) / "model.gguf", changed(lambda a: a.update(bitwright="0.2.0")), weight=2, name="other")
    word, said = verdict(CASE, sides)
    assert word == "differs" and len(said) == 2, "the version is listed"
    assert said[0].startswith("out/model.gguf: general.name.") and said[-1].startswith("out/model.gguf: w.2 256 bytes")


@pytest.mark.parametrize(("outcomes", "refused", "word", "says"), [
    (({"refused": "no"}, {"refused": "no"}), True, "same", ""),
    (({"refused": "no"}, {"refused": "never"}), True, "differs", "outcome.json: refused 'no' -> 'never'"),
    (({"refused": "no"}, {"result": {}}), True, "failed", "after: was not refused"),
    (({"refused": "no"}, {"refused": "no"}), False, "failed", "before: no"),
    (({"result": {}}, {"failed": "KeyError: 1"}), False, "failed", "after: KeyError: 1"),
    (({"result": {"fallbacks": ["a"]}}, {"result": {"fallbacks": []}}), False, "differs",
     "outcome.json: result.fallbacks.0 'a' -> (absent)"),
])  # fmt: skip
def test_what_calls_return(
    outcomes: tuple[dict[str, Any], ...], refused: bool, word: str, says: str, sides: tuple[Side, Side]
) -> None:
    for side, outcome in zip(sides, outcomes, strict=True):
        (side.folder / CASE.name / OUTCOME).write_text(json.dumps(outcome))
    assert verdict(Case(CASE.name, refused=refused), sides) == (word, [says] if says else [])


def test_the_cases_stand_after_those_that_they_need() -> None:
    every = cases([EMBEDDED, "other"])
    names = [case.name for case in every]
    assert len(set(names)) == len(names) and len([case for case in every if case.refused]) >= 15
    assert all(need in names[:at] for at, case in enumerate(every) for need in case.needs)
    assert {case.how.get("method") for case in every if case.model == "other"} == set(METHODS)
    chosen = with_needs([case for case in every if case.name == "loaded/let"], every)
    assert [case.name for case in chosen] == ["saved/let", "loaded/let"]
    shared = shares(every, 3)
    assert sorted(case.name for share in shared for case in share) == sorted(names)
    for share in shared:
        assert all(set(case.needs) <= {before.name for before in share[:at]} for at, case in enumerate(share))


def test_a_tree_is_the_same_as_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = Case("refused", EMBEDDED, {"scheme": "W4A16g96"}, refused=True)
    prepare(tmp_path, ROOT, [], [])
    assert run(ROOT, ROOT, tmp_path, [CASE, refused], jobs=1, reuse=False) == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "before: 2 cases to run, 0 kept", "same    case", "same    refused", "same    the embedded model itself",
    ]  # fmt: skip
    assert (tmp_path / "after/case/out/model.safetensors").is_file()
    assert "what divides them" in json.loads((tmp_path / "after/refused" / OUTCOME).read_text())["refused"]
    (tmp_path / "before/case/out/config.json").write_text("{}")
    sides = Side("before", ROOT, tmp_path), Side("after", ROOT, tmp_path)
    assert verdict(CASE, sides)[1][0].startswith("out/config.json: architectures (absent) -> ")
    made_of = origins([CASE, refused], tmp_path, ROOT)
    assert sides[0].missing([CASE, refused], made_of) == [], "with --reuse-before these are kept"
    assert sides[0].missing([CASE, refused], made_of | {"case": "another model"}) == [CASE]
