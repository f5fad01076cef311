from pathlib import Path

import pytest
from benchmarks.rows import Asked, Kept

from benchmarks import rows


@pytest.mark.parametrize(
    ("key", "asked"),
    [
        ("adadim+gptq:W2A16g128", Asked("bitwright", "adadim+gptq", "W2A16g128", 0, {})),
        ("lwc:W3A16:7", Asked("bitwright", "lwc", "W3A16", 7, {})),
        ("mlc-llm/own:mlc:q4f16_1", Asked("mlc-llm", "own", "mlc:q4f16_1", 0, {})),
        ("easyquant:mlc:q3f16_1:3:axis=oc", Asked("bitwright", "easyquant", "mlc:q3f16_1", 3, {"axis": "oc"})),
        (
            "gptqmodel/gptq:W4A16g128sym:0:desc_act=true,damp_percent=0.01",
            Asked("gptqmodel", "gptq", "W4A16g128sym", 0, {"desc_act": True, "damp_percent": 0.01}),
        ),
    ],
)
def test_a_row_is_read(key: str, asked: Asked) -> None:
    assert Asked.parse(key) == asked


@pytest.mark.parametrize("key", ["gptq", ":W4A16", "gptqmodel/:W4A16", "gptq:W4A16:x", "gptq:W4A16:0:desc_act"])
def test_what_is_no_row_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Asked.parse(key)


def test_a_row_is_measured_once_per_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(rows, "machine", lambda _: {"date": "2026-01-01"})
    measured = iter(range(9))
    asked = [("a", 1), ("b", 1), ("a", 1), ("a", 2)]
    found = [
        Kept("x", {"windows": windows}).row({"row": key}, lambda: {"kl": next(measured)})["kl"]
        for key, windows in asked
    ]
    assert found == [0, 1, 0, 2]
    assert len((tmp_path / "results/x.jsonl").read_text().splitlines()) == 3
    Kept("x", {}).write_table("", "Text.", ("a", "b"), [["1", "2"]])
    assert (tmp_path / "results/x.md").read_text() == "# x\n\nText.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
