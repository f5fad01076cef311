"""A folder that is what it claims to be passes; one damaged in each way that is looked for does not."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import Checkpoints, changed
from torch import Tensor

import bitwright
from bitwright.core.errors import CheckpointError, OutputError
from bitwright.core.qtensor import QTensor
from bitwright.core.quantized import Described
from bitwright.core.recipe import Recipe

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def packed(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "out"
    result = bitwright.quantize(Recipe(str(tiny()), "W4A16g32", "rtn"), folder)
    assert "14 linears, each once" in result.verified
    return folder


@pytest.mark.parametrize("scheme", ["W4A16g32", "W3A16sym", "W4A16g32ic", "W4A4", "W4A8KV4", "mlc:q3f16_1"])
@pytest.mark.parametrize("format", [None, "bitwright"])
def test_sound(scheme: str, format: str | None, tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny()), scheme, "rtn", format), tmp_path / "out")
    found = bitwright.verify(tmp_path / "out", tiny())
    assert found.passed and found.linears == 14 and found.kl_divergence is not None and 0 < found.kl_divergence < 3
    assert {check.name for check in found.checks} >= {"logits", "against the original", "size on disk"}


@pytest.mark.parametrize(("change", "check", "says"), [
    (lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64)}), "no duplicates", "full precision too"),
    (lambda t: t[f"{Q}.weight_scale"].__setitem__((3, 0), torch.nan), "scales and shapes", "NaN or infinite"),
    (lambda t: t[f"{Q}.weight_scale"].zero_(), "scales and shapes", "a scale is zero"),
    (lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{Q}.")], "complete", f"{Q}.weight is not there"),
], ids=["twice", "nan", "zero", "missing"])  # fmt: skip
def test_damaged(
    change: Callable[[dict[str, Tensor]], None], check: str, says: str, packed: Path, tiny: Checkpoints, tmp_path: Path
) -> None:
    damaged = changed(packed, tmp_path / "damaged", change)
    for against in (None, tiny()):
        found = bitwright.verify(damaged, against)
        assert not found.passed
        assert [one.found for one in found.checks if one.name == check and not one.passed and says in one.found]


def test_tensors_that_do_not_fit_together(packed: Path, tmp_path: Path) -> None:
    damaged = changed(packed, tmp_path / "damaged", lambda t: t.update({f"{Q}.weight_packed": torch.ones(3, 2).int()}))
    with pytest.raises(CheckpointError, match=rf"the tensors of {Q} do not fit together"):
        bitwright.verify(damaged)


def test_codes_that_the_client_reads_otherwise(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.formats import compressed_tensors

    format = compressed_tensors.FORMAT
    reader = format.reader
    assert reader is not None

    def shifted(tensors: Mapping[str, Tensor], name: str, described: Described) -> QTensor:
        weight = reader.read(tensors, name, described)
        return replace(weight, codes=weight.codes.roll(1, 1))

    monkeypatch.setattr(compressed_tensors, "FORMAT", replace(format, reader=replace(reader, read=shifted)))
    found = bitwright.verify(packed)
    assert [check.name for check in found.checks if not check.passed] == ["logits"]


def test_not_the_original(packed: Path, tiny: Checkpoints) -> None:
    found = bitwright.verify(packed, tiny(num_hidden_layers=3))
    assert not found.passed and any("is not there" in check.found for check in found.checks)


def test_a_model_that_is_not_quantized(tiny: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="is not quantized"):
        bitwright.verify(tiny())


def test_what_is_not_sound_is_not_published(tiny: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.formats import bitwright as format

    encode = format.encode

    def forgetful(name: str, weight: QTensor) -> dict[str, Tensor]:
        return {} if name == Q else encode(name, weight)

    monkeypatch.setattr(format, "FORMAT", replace(format.FORMAT, encode=forgetful))
    with pytest.raises(OutputError, match=rf"not published: complete: {Q}\.weight is not there"):
        bitwright.quantize(Recipe(str(tiny()), "W4A16g32", "rtn", "bitwright"), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_beside_another_architecture_with_the_same_weights(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny()), "W4A16g32", "rtn"), tmp_path / "out")
    other = changed(tiny(), tmp_path / "other", lambda _: None)
    stated = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(stated | {"model_type": "mistral"}))
    found = {check.name: check for check in bitwright.verify(tmp_path / "out", other).checks}
    assert found["settings"].passed is False and found["settings"].found == "model_type mistral there and llama here"


def test_beside_a_model_with_more_tensors_weights_are_no_yes(tiny: Checkpoints, tmp_path: Path) -> None:
    bitwright.quantize(Recipe(str(tiny()), "W4A16g32", "rtn"), tmp_path / "out")
    more = {"model.layers.0.self_attn.k_norm.weight": torch.ones(16)}
    other = changed(tiny(), tmp_path / "other", lambda tensors: tensors.update(more))
    found = {check.name: check for check in bitwright.verify(tmp_path / "out", other).checks}
    assert found["complete"].passed is False and found["weights"].passed is None
    assert "names or config.json are another model's" in found["weights"].found
