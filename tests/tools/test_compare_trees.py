"""The comparison of two trees reports nothing if nothing differs, else the file, and the key in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file

from compare_allowed import ALLOWED, WHOLE
from compare_cases import EMBEDDED, METHODS, OUTCOME, Case, cases
from compare_files import ABSENT, Difference
from compare_side import Side, locked
from compare_trees import prepare, run, shares, verdict, with_needs

ROOT = Path(__file__).resolve().parents[2]
CASE = Case("case", EMBEDDED, {"scheme": "W4A16g128"})
LINEAR = {"name": "y", "shape": [1, 2], "storage_bits": 32, "bits_per_weight": 16.0, "weight_error": 0.125}
ACCOUNT = {"bitwright": "0.2.0", "scheme": "W4A16g128", "recipe": {"seed": 0}, "totals": {"linears": 14},
           "notes": ["rtn needs no calibration text; it is used to report output errors"],
           "blocks": [{"linears": [LINEAR]}]}  # fmt: skip
REST = "no linear of this architecture"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Side, Side]:
    """Two trees whose outputs of a case are the same, but for seconds and dates."""
    for name in ("before", "after"):
        out = tmp_path / name / CASE.name / "out"
        out.mkdir(parents=True)
        (out / "bitwright.json").write_text(json.dumps(ACCOUNT))
        (out / "bitwright-timings.json").write_text(name)
        (out / "journal.jsonl").write_text(name)
        (out / "config.json").write_text('{"a": 1, "b": 2}')
        (out / "params.bin").write_bytes(b"bytes")
        save_file({"x": torch.zeros(4), "y": torch.ones(2)}, out / "model.safetensors")
        write_gguf(out / "model.gguf")
        (out.parent / OUTCOME).write_text('{"result": {"linears": 1}}')
    return Side("before", ROOT, tmp_path), Side("after", ROOT, tmp_path)


def judged(sides: tuple[Side, Side], case: Case = CASE) -> tuple[str, list[str]]:
    judgement = verdict(case, *sides)
    return judgement.word, list(judgement.reasons)


def write_gguf(
    path: Path, account: dict[str, Any] = ACCOUNT, weight: float = 1, name: str = "model", tensor: str = "w"
) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.name", name)
    writer.add_string("bitwright.account", json.dumps(account))
    writer.add_tensor(tensor, np.full((2, 32), weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def out(sides: tuple[Side, Side]) -> Path:
    """The output of the second tree."""
    return sides[1].folder / CASE.name / "out"


def linear(account: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = account["blocks"][0]["linears"][0]
    return row


def changed(change: Change) -> dict[str, Any]:
    account: dict[str, Any] = json.loads(json.dumps(ACCOUNT))
    change(account)
    return account


def test_the_same(sides: tuple[Side, Side]) -> None:
    assert judged(sides) == ("same", [])
    (out(sides) / "bitwright.json").write_text(json.dumps(dict(reversed(ACCOUNT.items())), indent=1))
    assert judged(sides) == ("same", []), "of the account the values count"


def test_a_changed_byte(sides: tuple[Side, Side]) -> None:
    (out(sides) / "params.bin").write_bytes(b"bites")
    save_file({"x": torch.zeros(4), "y": torch.full((2,), 2.0)}, out(sides) / "model.safetensors")
    (out(sides) / "config.json").write_text('{"b": 2, "a": 1}')
    word, reasons = judged(sides)
    assert word == "differs"
    assert [reason.split()[:2] for reason in reasons] == [
        ["out/config.json:", "<bytes>"], ["out/model.safetensors:", "y.data"], ["out/params.bin:", "<bytes>"],
    ]  # fmt: skip


def test_a_file_that_is_missing_and_one_too_many(sides: tuple[Side, Side]) -> None:
    (out(sides) / "bitwright-timings.json").unlink()
    (out(sides) / "more.txt").write_text("more")
    assert judged(sides) == ("differs", [
        "out/bitwright-timings.json: <file> 6 -> (absent)", "out/more.txt: <file> (absent) -> 4",
    ])  # fmt: skip


def test_an_allocation_that_is_new(sides: tuple[Side, Side]) -> None:
    file = out(sides) / "allocation.json"
    file.write_text('{"scheme": "W4A16g128", "linears": {"y": "W4A16g128", "head": null}}')
    assert judged(sides) == ("listed", ["the schemes of linears are said"])
    file.write_text('{"scheme": "W4A16g128", "linears": {"y": "W4A16g128", "head": "W4A16g128"}}')
    assert judged(sides)[0] == "differs", "the account names no other linear than y"


@pytest.mark.parametrize(("change", "word", "says"), [
    (lambda a: a.update(bitwright="0.3.0"), "differs", "bitwright '0.2.0' -> '0.3.0'"),
    (lambda a: a.update(allocation={"q": 4}), "differs", "allocation (absent) -> {'q': 4}"),
    (lambda a: a["recipe"].update(scheme_for=None), "listed", "the schemes of linears are said"),
    (lambda a: a["recipe"].update(scheme_for="y=W3A16"), "differs", "recipe.scheme_for (absent) -> 'y=W3A16'"),
    (lambda a: a["recipe"].update(target=None), "differs", "recipe.target (absent) -> None"),
    (lambda a: a["recipe"].update(seed=1), "differs", "recipe.seed 0 -> 1"),
    (lambda a: a["recipe"].pop("seed"), "differs", "recipe.seed 0 -> (absent)"),
    (lambda a: a["totals"].update(linears=13), "differs", "totals.linears 14 -> 13"),
    (lambda a: linear(a).update(weight_error=0.125 + 2e-16), "listed", "sums in another order"),
    (lambda a: linear(a).update(weight_error=0.12500001), "differs",
     "blocks.0.linears.0.weight_error 0.125 -> 0.12500001"),
    (lambda a: linear(a).update(storage_bits=64), "listed", "bits are those that the format stores"),
    (lambda a: linear(a).update(storage_bits=48), "differs", "blocks.0.linears.0.storage_bits 32 -> 48"),
    (lambda a: linear(a).update(bits_per_weight=32.0), "listed", "bits are those that the format stores"),
    (lambda a: linear(a).update(bits_per_weight=8.0), "differs", "blocks.0.linears.0.bits_per_weight 16.0 -> 8.0"),
    (lambda a: a.update(notes=["rtn needs no calibration data; they are used to report output errors"]), "listed",
     "notes and refusals are worded anew"),
    (lambda a: a.update(notes=["rtn needs nothing"]), "differs",
     "notes.0 'rtn needs no calibration text; it is used to report output errors' -> 'rtn needs nothing'"),
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
        found, reasons = judged(sides)
        assert (found, reasons[0 if word == "listed" else -1]) == (
            word,
            says if word == "listed" else f"{name}: {says}",
        )


def test_a_gguf_file_with_another_tensor_or_another_key(sides: tuple[Side, Side]) -> None:
    write_gguf(
        out(sides) / "model.gguf", changed(lambda a: a["recipe"].update(allocation=None)), weight=2, name="other"
    )
    word, reasons = judged(sides)
    assert word == "differs" and len(reasons) == 2, "the key of the recipe is listed"
    assert reasons[0].startswith("out/model.gguf: general.name.") and reasons[-1].startswith(
        "out/model.gguf: w.2 256 bytes"
    )


@pytest.mark.parametrize(("outcomes", "refused", "word", "says"), [
    (({"refused": "no"}, {"refused": "no"}), True, "same", ""),
    (({"refused": "no"}, {"refused": "never"}), True, "differs", "outcome.json: refused 'no' -> 'never'"),
    (({"refused": "no"}, {"result": {}}), True, "failed", "after: was not refused"),
    (({"refused": "no"}, {"refused": "no"}), False, "failed", "before: no"),
    (({"result": {}}, {"failed": "KeyError: 1"}), False, "failed", "after: KeyError: 1"),
    (({"refused": "W4B16 [sym|asym], for example"}, {"refused": "W4B16 [sym|asym|real], for example"}), True, "listed",
     "notes and refusals are worded anew"),
    (({"result": {"fallbacks": ["a"]}}, {"result": {"fallbacks": []}}), False, "differs",
     "outcome.json: result.fallbacks.0 'a' -> (absent)"),
])  # fmt: skip
def test_what_calls_return(
    outcomes: tuple[dict[str, Any], ...], refused: bool, word: str, says: str, sides: tuple[Side, Side]
) -> None:
    for side, outcome in zip(sides, outcomes, strict=True):
        (side.folder / CASE.name / OUTCOME).write_text(json.dumps(outcome))
    assert judged(sides, Case(CASE.name, refused=refused)) == (word, [says] if says else [])


def allowed(difference: Difference, case: Case, outputs: Path) -> bool:
    return difference.reason(case, outputs, ALLOWED) is not None


def test_units_that_were_on_their_way_when_a_run_was_killed() -> None:
    def resumed(after: object, name: str = "killed/rtn", workers: int | None = None) -> bool:
        difference = Difference(OUTCOME, "result.resumed", 3, after)
        return allowed(difference, Case(name, workers=workers), Path("nowhere"))

    assert resumed(4) and resumed(5, workers=2)
    assert not resumed(5) and not resumed(4, name="small/rtn") and not resumed(None)


def test_bits_and_bytes_are_those_on_disk(tmp_path: Path) -> None:
    rows = [LINEAR | {"name": "model.layers.0.self_attn.q_proj", "shape": [2, 32], "storage_bits": 2048}]
    (tmp_path / "run").mkdir()
    write_gguf(tmp_path / "run/out.gguf", ACCOUNT | {"blocks": [{"linears": rows}]}, tensor="blk.0.attn_q.weight")
    (tmp_path / "export/out").mkdir(parents=True)
    (tmp_path / "export/out/weights.bin").write_bytes(bytes(100))
    (tmp_path / "export/out/tokenizer.json").write_bytes(bytes(7))
    run, export = Case("run"), Case("export", how={"format": "mlc"}, source="run")

    def bits(after: float, case: Case = run, key: str = "blocks.0.linears.0.bits_per_weight") -> bool:
        file = OUTCOME if key.startswith("result") else "out.gguf/bitwright.json"
        return allowed(Difference(file, key, 4.5, after), case, tmp_path)

    assert bits(32.0) and bits(32.0, key="totals.bits_per_weight") and bits(32.0, key="result.bits_per_weight")
    assert bits(32.0, export), "an engine's file tells of the run that made its source"
    assert not bits(31.0) and not bits(31.0, export) and not bits(31.0, key="totals.bits_per_weight")
    assert bits(100, export, "result.bytes_out") and not bits(107, export, "result.bytes_out")
    read = (tmp_path / "run/out.gguf").stat().st_size
    assert bits(read, export, "result.bytes_in") and not bits(read + 1, export, "result.bytes_in")
    assert not bits(read, run, "result.bytes_in"), "that of a run has not changed"


def test_the_bits_of_groups_of_forty(tmp_path: Path) -> None:
    """Rows of 128 weights are three groups of 40 and one of 8, each in 4 words of 32 bits with 16 bits of scale."""
    (tmp_path / "settings/mlc_three_bits/out").mkdir(parents=True)
    account = ACCOUNT | {"blocks": [{"linears": [LINEAR | {"shape": [128, 128]}]}]}
    (tmp_path / "settings/mlc_three_bits/out/bitwright.json").write_text(json.dumps(account))
    for bits, holds in ((4.5, True), (3.5, False)):
        difference = Difference("out/bitwright.json", "blocks.0.linears.0.bits_per_weight", 3.25, bits)
        assert allowed(difference, Case("settings/mlc_three_bits"), tmp_path) is holds


def whole_model(work: Path, format: str, **how: object) -> Callable[[str, object], bool]:
    """Say what is allowed of a run of 128 weights in float32, half of them the embedding's; 40 bytes are written."""
    (work / "models/m").mkdir(parents=True)
    tensors = {"model.embed_tokens.weight": torch.zeros(2, 32), "model.layers.0.q_proj.weight": torch.zeros(1, 32),
               "model.layers.0.o_proj.weight": torch.zeros(1, 32)}  # fmt: skip
    save_file(tensors, work / "models/m/model.safetensors")
    out = work / "after/run/out"
    out.mkdir(parents=True)
    (out / "weights.bin").write_bytes(bytes(40))
    rows = [LINEAR | {"name": "model.layers.0.q_proj", "shape": [1, 32]}]
    (out / "bitwright.json").write_text(json.dumps(ACCOUNT | {"format": format, "blocks": [{"linears": rows}]}))
    case = Case("run", "m", how)
    return lambda key, value: allowed(Difference(OUTCOME, f"result.{key}", ABSENT, value), case, work / "after")


def test_what_is_said_of_the_whole_model(tmp_path: Path) -> None:
    holds = whole_model(tmp_path, "gptq")
    assert holds("model_bits_per_weight", 8 * 40 / 128) and not holds("model_bits_per_weight", 16.0)
    assert holds("full_bits", 32) and not holds("full_bits", 16)
    o_proj = {"excluded by *.o_proj": 0.25}
    assert holds("left_alone", {"embedding": 0.5} | o_proj) and holds("left_alone", {REST: 0.75})
    wrong: tuple[object, ...] = ({}, o_proj, {"embedding": 0.25, "excluded by *.o_proj": 0.5}, {"nothing": 0.75},
                                 {"embedding": 0.75}, {"embedding": 0.5, REST: 0.25}, None, 0.75)  # fmt: skip
    assert not any(holds("left_alone", shares) for shares in wrong)
    assert not holds("more", 1), "another new key"


@pytest.mark.parametrize(("format", "how", "right", "fault", "wrong"), [
    ("dense", {}, {}, None, {REST: 0.75}),
    ("mlc", {}, {"excluded by *.o_proj": 0.25}, {REST: 0.75}, {"embedding": 0.5}),
    ("gguf", {"embeddings": "f16"}, {REST: 0.75}, {"excluded by *.o_proj": 0.25}, {}),
])  # fmt: skip
def test_what_stays_in_full_precision_in_other_formats(
    format: str, how: dict[str, Any], right: object, fault: object, wrong: object, tmp_path: Path
) -> None:
    def reason(shares: object) -> str | None:
        difference = Difference(OUTCOME, "result.left_alone", ABSENT, shares)
        return difference.reason(Case("run", "m", how), tmp_path / "after", ALLOWED)

    whole_model(tmp_path, format, **how)
    assert reason(right) == WHOLE and reason(wrong) is None
    assert fault is None or reason(fault) is None


def test_an_export_says_what_its_linears_are(tmp_path: Path) -> None:
    """Source: W3A16g64ic with outliers; export: 4 bits, asymmetric, groups of 32 along the input, and no outliers."""
    row = LINEAR | {"name": "q", "shape": [128, 64], "outliers": 0}
    config = {"bits": 4, "group_size": 32, "zero_point": True}

    def allows(scheme: str, tile: list[int], *checked: tuple[str, object], grid: object = config) -> bool:
        account = {"scheme": scheme, "quantization_config": grid, "blocks": [{"linears": [row | {"tile": tile}]}]}
        write_account(tmp_path / "export/x", account)
        case = Case("export/x", source="run")
        return all(allowed(Difference("out/bitwright.json", *key_values(key, new)), case, tmp_path)
                   for key, new in checked)  # fmt: skip

    def key_values(key: str, new: object) -> tuple[str, object, object]:
        return key, "what it was", new

    write_account(tmp_path / "run", {"scheme": "W3A16g64ic", "blocks": [{"linears": [row | {"tile": [64, 1]}]}]})
    right = ("scheme", "W4A16g32"), ("blocks.0.linears.0.tile.1", 32), ("totals.per_ic", 0)
    assert allows("W4A16g32", [1, 32], *right)
    for scheme, tile in (("W3A16g32", [1, 32]), ("W4A16g32sym", [1, 32]), ("W4A16g32", [32, 1]), ("W4A16g64", [1, 64])):
        assert not allows(scheme, tile, ("scheme", scheme)) and not allows(scheme, tile, right[1]), (scheme, tile)
    assert allows("W3A16", [1, 64], ("scheme", "W3A16"), grid=None), "weights: on the grid that was read"
    assert not allows("W4A16", [1, 64], ("scheme", "W4A16"), grid=None)
    assert allows("W3A16g64ic", [64, 1], ("totals.per_ic", 1)) and not allows("W3A16", [1, 64], ("totals.per_ic", 1))
    outliers = ("blocks.0.linears.0.outliers", 0), ("blocks.0.linears.0.outlier_share", 0.0), ("totals.outliers", 0)
    assert allows("W4A16g32", [1, 32], *outliers)
    assert not any(allows("W4A16g32", [1, 32], (key, 1)) for key, _ in outliers)
    save_file({"q.outlier_index": torch.zeros(1)}, tmp_path / "export/x/out/model.safetensors")
    assert not any(allows("W4A16g32", [1, 32], key) for key in outliers)
    no_export = Difference("out/bitwright.json", "scheme", "W4A16", "W4A16g32")
    assert not allowed(no_export, Case("small/x"), tmp_path)


def write_account(case: Path, account: dict[str, Any]) -> None:
    (case / "out").mkdir(parents=True, exist_ok=True)
    (case / "out/bitwright.json").write_text(json.dumps(account))


def test_a_call_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    def gone(file: str, case: str = "refused/x") -> bool:
        return allowed(Difference(file, "<file>", 3, ABSENT), Case(case, refused=True), tmp_path)

    assert gone("out.partial/.lock") and gone("out.gguf.partial/journal.jsonl")
    assert not gone("out/config.json") and not gone("out.partial/.lock", "small/x")
    (tmp_path / "refused/x/out.partial").mkdir(parents=True)
    assert not gone("out.partial/.lock"), "the folder itself is still there"


def test_folders_are_loaded_that_nobody_described(tmp_path: Path) -> None:
    def loaded(more: str, case: Case) -> bool:
        return allowed(Difference("out/bitwright.json", "verified", "shapes fit", f"shapes fit{more}"), case, tmp_path)

    exported = Case("export/experts/rtn/gptq", source="experts/rtn/default")
    assert loaded("; loads in transformers", Case("fused/x", "fused")) and loaded("; loads in transformers", exported)
    assert not loaded("; does not load", exported) and not loaded("; loads in transformers", Case("small/x", "small"))


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
    sides = Side.before(ROOT, tmp_path), Side.after(ROOT, tmp_path)
    assert run(*sides, [CASE, refused], jobs=1, reuse=False) == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "before: 2 cases to run, 0 kept", "same    case", "same    refused", "same    the embedded model itself",
    ]  # fmt: skip
    assert (sides[1].folder / "case/out/model.safetensors").is_file()
    assert "what divides them" in json.loads((sides[1].folder / "refused" / OUTCOME).read_text())["refused"]
    (tmp_path / "before/case/out/config.json").write_text("{}")
    assert judged(sides)[1][0].startswith("out/config.json: architectures (absent) -> ")
    origins = sides[0].origins([CASE, refused])
    assert sides[0].missing([CASE, refused], origins) == [], "with --reuse-before these are kept"
    assert sides[0].missing([CASE, refused], origins | {"case": "another model"}) == [CASE]
    assert run(*sides, [CASE, refused], jobs=1, reuse=True, reuse_after=True) == 1, "compared again, nothing is run"
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{side}: 0 cases to run, 2 kept" for side in ("before", "after")
    ]
    assert (tmp_path / "before/case/out/config.json").read_text() == "{}"


def test_each_tree_after_has_a_folder_of_its_own(tmp_path: Path) -> None:
    trees = [tmp_path / "mine/bitwright", tmp_path / "yours/bitwright"]
    folders = [Side.after(tree, tmp_path).folder for tree in trees]
    assert len(set(folders)) == 2 and all(folder.parent == tmp_path for folder in folders)
    assert folders[0].name.endswith("mine-bitwright") and folders[1].name.endswith("yours-bitwright")
    assert {Side.before(tree, tmp_path).folder for tree in trees} == {tmp_path / "before"}


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    refused = pytest.raises(SystemExit, match="another run works in")
    with locked(tmp_path / "after"), refused, locked(tmp_path / "after"):
        pass
    with locked(tmp_path / "before", shared=True):
        with locked(tmp_path / "before", shared=True):
            pass  # both read it
        with refused, locked(tmp_path / "before"):
            pass
    with locked(tmp_path / "before"):
        pass  # the others have ended


def test_a_run_leaves_alone_what_another_one_writes(tmp_path: Path) -> None:
    prepare(tmp_path, ROOT, [], [])
    sides = Side.before(ROOT, tmp_path), Side.after(ROOT, tmp_path)
    for side in sides:
        with locked(side.folder), pytest.raises(SystemExit, match=f"another run works in {side.folder}"):
            run(*sides, [CASE], jobs=1, reuse=False)
        assert not (side.folder / CASE.name).exists()
