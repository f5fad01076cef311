"""What a folder can lack, have too much of, or say wrongly, found without running the model."""

import json
import re
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Checkpoints, changed
from torch import Tensor

import bitwright
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core.errors import CheckpointError, OutputError
from bitwright.core.recipe import Recipe
from bitwright.verification import folder as verifying
from bitwright.verification import soundness
from bitwright.verification.findings import Verification

FORMATS = ("compressed-tensors", "bitwright", "gptq", "awq")
Q, ALSO_Q = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
WIDE = {"num_key_value_heads": 4}
Tensors = dict[str, Tensor]
Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def folders(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """``folders(format, scheme)``: the tiny model in this format; nobody writes to it."""
    made: dict[tuple[str, str], Path] = {}

    def of(format: str = "compressed-tensors", scheme: str = "W4A16g32") -> Path:
        if (format, scheme) not in made:
            made[format, scheme] = tmp_path_factory.mktemp("made") / "out"
            bitwright.quantize(Recipe(str(tiny(**WIDE)), scheme, "rtn", format), made[format, scheme])
        return made[format, scheme]

    return of


def failed(found: Verification) -> dict[str, str]:
    return {check.name: check.found for check in found.checks if check.passed is False}


def config_changed(folder: Path, place: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    copy = Path(shutil.copytree(folder, place))
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def by_others(folder: Path) -> Path:
    """The folder without what Bitwright says of it."""
    (folder / "bitwright.json").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(("format", "leaf", "says"), [
    ("compressed-tensors", "weight_zero_point", r"zero points for \[64, 2\] tiles, scales for \[64, 1\]"),
    ("bitwright", "weight_zero_point", r"weight_zero_point is .* \[8, 2\], the others call for int32 \[8, 1\]"),
    ("gptq", "qzeros", r"qzeros is torch.int32 \[2, 8\], the others call for int32 \[1, 8\]"),
    ("awq", "qzeros", r"qzeros is torch.int32 \[2, 8\], the others call for int32 \[1, 8\]"),
])  # fmt: skip
def test_zero_points_of_another_shape_than_scales(
    format: str, leaf: str, says: str, folders: Folders, tmp_path: Path
) -> None:
    def twice(tensors: Tensors) -> None:
        zero = tensors[f"{Q}.{leaf}"]
        tensors[f"{Q}.{leaf}"] = torch.cat([zero, zero], dim=int(leaf != "qzeros"))

    damaged = changed(folders(format, "W4A16"), tmp_path / "damaged", twice)
    for logits in (False, True):
        with pytest.raises(CheckpointError, match=rf"tensors of {Q} do not fit together .*{says}"):
            bitwright.verify(damaged, logits=logits)


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_zero_point"])
def test_words_that_are_too_few(leaf: str, folders: Folders, tmp_path: Path) -> None:
    """They used to be read as codes of 0."""

    def cut(tensors: Tensors) -> None:
        words = tensors[f"{Q}.{leaf}"]
        tensors[f"{Q}.{leaf}"] = (words[:, :-1] if leaf == "weight_packed" else words[:-1]).contiguous()

    damaged = changed(folders("bitwright"), tmp_path / "damaged", cut)
    with pytest.raises(CheckpointError, match=rf"do not fit together .*{leaf} is .*, the others call for"):
        bitwright.verify(damaged, logits=False)


def _says_groups_of_16(config: dict[str, Any]) -> None:
    said = config["quantization_config"]
    match said["quant_method"]:
        case "compressed-tensors":
            said["config_groups"]["group_0"]["weights"]["group_size"] = 16
        case "bitwright":
            said["weights"]["tile"] = [1, 16]
        case _:
            said["group_size"] = 16


@pytest.mark.parametrize("format", FORMATS)
def test_a_config_with_another_group_size(format: str, folders: Folders, tmp_path: Path) -> None:
    assert bitwright.verify(folders(format), logits=False).passed
    lying = config_changed(folders(format), tmp_path / "lying", _says_groups_of_16)
    with pytest.raises(CheckpointError, match=r"1 x 32 weights share a scale, config.json says 1 x 16"):
        bitwright.verify(lying, logits=False)


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_a_group_that_is_wider_than_the_weight(format: str, folders: Folders, tmp_path: Path) -> None:
    """128 in a weight with 64 inputs is one group of 64, as GPTQModel has it; in one with 192 it is not."""
    wide = config_changed(
        folders(format, "W4A16"), tmp_path / "wide", lambda c: c["quantization_config"].update(group_size=128)
    )
    with pytest.raises(
        CheckpointError, match=r"down_proj do .*1 x 192 weights share a scale, config.json says 1 x 128"
    ):
        bitwright.verify(wide, logits=False)


def test_rules_with_groups_of_their_own(folders: Folders, tmp_path: Path) -> None:
    lying = config_changed(
        folders("gptq"),
        tmp_path / "lying",
        lambda c: c["quantization_config"].update(dynamic={r"+:.*v_proj": {"group_size": 64}}),
    )
    with pytest.raises(CheckpointError, match=r"v_proj do not .*1 x 32 weights share a scale, config.json says 1 x 64"):
        bitwright.verify(lying, logits=False)


def test_another_model(folders: Folders, tiny: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "logits_of", lambda *_: pytest.fail("a model was run"))
    other = tiny(vocab_size=128, **WIDE)
    said = r"weight is \[128, 64\] there and \[256, 64\] here; config.json: vocab_size 128 there and 256"
    with pytest.raises(CheckpointError, match=rf"{other} is another model than .* was made of: .*{said} here"):
        bitwright.verify(folders(), other)


def test_a_folder_that_is_no_original(folders: Folders) -> None:
    with pytest.raises(CheckpointError, match=r"is quantized itself \(gptq\); --against takes the original"):
        bitwright.verify(folders(), folders("gptq"))


@pytest.mark.parametrize(("change", "check", "says"), [
    (lambda t: t.pop("model.norm.weight"), "complete", "model.norm.weight is not there"),
    (lambda t: t["model.norm.weight"].__setitem__(3, torch.nan), "scales and shapes", "model.norm.weight: NaN or inf"),
    (lambda t: t["model.embed_tokens.weight"].__setitem__((250, 3), torch.inf), "scales and shapes", "embed_tokens"),
    (lambda t: t.update({"foo.bar": torch.zeros(1024, 1024)}), "complete",
     "foo.bar ([1024, 1024], 4,194,304 bytes) is no tensor of the "),
    (lambda t: t.update({f"{Q}.bias": torch.ones(64)}), "complete", f"{Q}.bias ([64], 256 bytes) is no tensor of the "),
    (lambda t: t[f"{Q}.weight_scale"].neg_(), "scales and shapes", "128 of 128 scales are negative"),
    (lambda t: t[f"{Q}.weight_scale"][3, 1].neg_(), "scales and shapes", "1 of 128 scales are negative"),
], ids=["no norm", "nan", "infinite", "foreign", "bias", "negative", "one negative"])  # fmt: skip
def test_tensors(
    change: Callable[[Tensors], object], check: str, says: str, folders: Folders, tiny: Checkpoints, tmp_path: Path
) -> None:
    damaged = changed(folders(), tmp_path / "damaged", change)
    for against in (None, tiny(**WIDE)):
        assert says in failed(bitwright.verify(damaged, against, logits=False))[check]
    with pytest.raises(OutputError, match="not sound, and is not published"):
        soundness.require_sound(damaged, Checkpoint.open(tiny(**WIDE)).shapes)


def test_a_large_tensor_is_looked_at_in_places(
    folders: Folders, tiny: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soundness, "WHOLE_BYTES", 2048)
    shapes = Checkpoint.open(tiny(**WIDE)).shapes
    assert "14 linears, each once" in soundness.require_sound(folders(), shapes)
    damaged = changed(folders(), tmp_path / "damaged", lambda t: t["lm_head.weight"].fill_(torch.nan))
    with pytest.raises(OutputError, match=r"lm_head\.weight: NaN or infinite"):
        soundness.require_sound(damaged, shapes)


@pytest.mark.parametrize(("change", "says"), [
    (lambda c: c.update(hidden_size=128), "config.json calls for [256, 128]"),
    (lambda c: c.update(num_hidden_layers=1), "is no tensor of the architecture, and 8 others"),
    (lambda c: c.update(num_hidden_layers=3), "is not there, and 8 others"),
    (lambda c: c.update(num_hidden_layers=10**9), "config.json counts 1000000000 blocks"),
], ids=["hidden_size", "fewer blocks", "more blocks", "no such number"])  # fmt: skip
def test_a_config_of_another_model(
    change: Callable[[dict[str, Any]], None], says: str, folders: Folders, tiny: Checkpoints, tmp_path: Path
) -> None:
    lying = config_changed(folders(), tmp_path / "lying", change)
    for against in (None, tiny(**WIDE)):
        assert says in failed(bitwright.verify(lying, against, logits=False))["complete"]


def test_what_others_write_differently(folders: Folders, tmp_path: Path) -> None:
    """A bias of zeros that the architecture has not, a scale with a sign."""

    def as_others(tensors: Tensors) -> None:
        tensors[f"{Q}.bias"] = torch.zeros(64)
        tensors[f"{Q}.weight_scale"][3, 1].neg_()

    theirs = by_others(changed(folders(), tmp_path / "theirs", as_others))
    assert bitwright.verify(theirs, logits=False).passed
    negative = changed(theirs, tmp_path / "negative", lambda t: t[f"{Q}.weight_scale"].abs_().neg_())
    assert "128 of 128 scales are negative" in failed(bitwright.verify(negative, logits=False))["scales and shapes"]


def _random(tensors: Tensors) -> None:
    words = next(name for name in (f"{Q}.weight_packed", f"{Q}.qweight") if name in tensors)
    generator = torch.Generator().manual_seed(0)
    tensors[words] = torch.randint(-(2**31), 2**31, tensors[words].shape, generator=generator).int()


def _exchanged(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(f"{Q}.")]:
        other = name.replace(Q, ALSO_Q)
        tensors[name], tensors[other] = tensors[other], tensors[name]


@pytest.mark.parametrize("change", [_random, _exchanged])
@pytest.mark.parametrize("format", FORMATS)
def test_other_codes_than_were_decided(
    format: str, change: Callable[[Tensors], None], folders: Folders, tiny: Checkpoints, tmp_path: Path
) -> None:
    """By what bitwright.json says of the bytes; in folders of others, by the original's weights."""
    assert "as decided" in {check.name for check in bitwright.verify(folders(format), logits=False).checks}
    damaged = changed(folders(format), tmp_path / "damaged", change)
    found = failed(bitwright.verify(damaged, logits=False))
    assert found.keys() == {"as decided"} and found["as decided"].startswith(f"{Q} is not what bitwright.json says")
    found = failed(bitwright.verify(by_others(damaged), tiny(**WIDE), logits=False))
    assert found.keys() == {"weights"} and "self_attn.q_proj is not the original's" in found["weights"]


def _unlike(format: str, said: dict[str, Any]) -> None:
    """The same tensors by another grid, or, of gptq, another version's zero points."""
    match format:
        case "compressed-tensors":
            said["config_groups"]["group_0"]["weights"]["symmetric"] = True
        case "bitwright":
            said["activations"] = {"bits": 8, "symmetric": True}
        case _:
            said["checkpoint_format"] = "gptq"


@pytest.mark.parametrize(("format", "says"), [
    ("gptq", "config.json says checkpoint_format 'gptq' (written: 'gptq_v2')"),
    ("compressed-tensors", "config.json says config_groups {"),
    ("bitwright", "config.json says activations {'bits': 8, 'symmetric': True} (written: None)"),
])  # fmt: skip
def test_a_config_that_gives_codes_another_meaning(
    format: str, says: str, folders: Folders, tiny: Checkpoints, tmp_path: Path
) -> None:
    """The bytes are all there; zero points less one ruin the model, and keep every error small."""
    lying = config_changed(folders(format), tmp_path / "lying", lambda c: _unlike(format, c["quantization_config"]))
    for against in (None, tiny(**WIDE)):
        found = failed(bitwright.verify(lying, against, logits=False))
        assert found.keys() == {"as decided"} and found["as decided"].startswith(says)
    account = json.loads((lying / "bitwright.json").read_text())
    del account["quantization_config"]  # as an earlier Bitwright wrote it
    (lying / "bitwright.json").write_text(json.dumps(account))
    assert bitwright.verify(lying, logits=False).passed


@pytest.mark.parametrize("format", FORMATS)
def test_a_config_that_others_wrote_anew(format: str, folders: Folders, tmp_path: Path) -> None:
    """Keys in another order, and such as tell a program how to run it, change no weight."""
    from transformers import AutoConfig

    again = config_changed(folders(format), tmp_path / "again", lambda c: c["quantization_config"].pop("meta", None))
    AutoConfig.from_pretrained(again).save_pretrained(again)
    assert bitwright.verify(again, logits=False).passed
    if format in ("gptq", "awq"):
        more = config_changed(again, tmp_path / "more", lambda c: c["quantization_config"].update(use_exllama=False))
        assert bitwright.verify(more, logits=False).passed


def test_what_an_export_says_of_its_codes_is_its_own(folders: Folders, tmp_path: Path) -> None:
    for format in ("awq", "dense"):
        bitwright.export(folders("gptq"), tmp_path / format, format=format)
    said, plain = (json.loads((tmp_path / name / "bitwright.json").read_text()) for name in ("awq", "dense"))
    assert (
        said["quantization_config"] == json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    )
    assert "quantization_config" not in plain
    assert bitwright.verify(tmp_path / "awq", logits=False).passed


def test_scales_that_were_moved_between_tensors(tiny: Checkpoints, tmp_path: Path) -> None:
    """Without logits it is the account that tells whether this is the original; without an account, nothing."""
    source, other = tiny(**WIDE), tmp_path / "other"
    bitwright.quantize(Recipe(str(source), "W4A16g32", "awq", calibration="builtin", samples=2, seqlen=32),
                       tmp_path / "out")  # fmt: skip
    changed(source, other, lambda t: [tensor.copy_(tensor.flip(0)) for tensor in t.values()])
    found = bitwright.verify(tmp_path / "out", source, logits=False)
    assert found.passed and any("scales were moved between tensors" in check.found for check in found.checks)
    assert bitwright.verify(tmp_path / "out", source).passed
    undecided = r"^not decided: .*norms are not the original's.*leave --no-logits out$"
    assert re.match(undecided, failed(bitwright.verify(tmp_path / "out", other, logits=False))["weights"])
    by_others(tmp_path / "out")
    assert re.match(undecided, failed(bitwright.verify(tmp_path / "out", source, logits=False))["weights"])
    assert bitwright.verify(tmp_path / "out", source).passed


def test_a_weight_that_is_not_quantized_and_not_the_original(
    folders: Folders, tiny: Checkpoints, tmp_path: Path
) -> None:
    def turned(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)

    damaged = changed(folders(), tmp_path / "out", turned)
    for _ in range(2):
        found = bitwright.verify(damaged, tiny(**WIDE), logits=False)
        assert "lm_head.weight is not the original's" in failed(found)["weights"]
        by_others(damaged)


def test_how_far_every_linear_is_from_the_original(folders: Folders, tiny: Checkpoints) -> None:
    """The errors are those that were measured when it was quantized."""
    found = bitwright.verify(folders(), tiny(**WIDE), logits=False)
    account = json.loads((folders() / "bitwright.json").read_text())
    errors = {row["name"]: row["weight_error"] for block in account["blocks"] for row in block["linears"]}
    assert found.largest_in == max(errors, key=errors.__getitem__)
    assert found.largest_error == pytest.approx(max(errors.values()), rel=0.01)
    assert found.mean_error == pytest.approx(sum(errors.values()) / 14, rel=0.01)


def digest_by_hand(tensors: Tensors, linear: str) -> str:
    found = blake2b(digest_size=16)
    for name in sorted(name for name in tensors if name.startswith(f"{linear}.")):
        tensor = tensors[name]
        found.update(f"{name.removeprefix(linear + '.')} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()))
    return found.hexdigest()


@pytest.mark.parametrize(
    "how", [{"method": "rtn"}, {"method": "gptq", "calibration": "builtin", "samples": 2, "seqlen": 32}]
)
def test_digests(how: dict[str, Any], tiny: Checkpoints, tmp_path: Path) -> None:
    """Tensor by tensor and block by block: of the tensors in the folder; an export has its own."""
    bitwright.quantize(Recipe(str(tiny(**WIDE)), "W4A16g32", **how), tmp_path / "out")
    account = json.loads((tmp_path / "out" / "bitwright.json").read_text())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    rows = [row for block in account["blocks"] for row in block["linears"]]
    assert len(rows) == 14
    for row in rows:
        assert row["digest"] == digest_by_hand(stored, row["name"])
    bitwright.export(tmp_path / "out", tmp_path / "gptq", format="gptq")
    account = json.loads((tmp_path / "gptq" / "bitwright.json").read_text())
    stored = load_file(tmp_path / "gptq" / "model.safetensors")
    again = [row for block in account["blocks"] for row in block["linears"]]
    assert len(again) == len(account["export"]["linears"]) == 14 and not any("digest" in row for row in again)
    for row in account["export"]["linears"]:
        assert row["digest"] == digest_by_hand(stored, row["name"])
    assert bitwright.verify(tmp_path / "gptq", tiny(**WIDE), logits=False).passed


def test_a_copied_output_layer(tiny: Checkpoints, tmp_path: Path) -> None:
    source = tiny(tied=True)
    bitwright.quantize(Recipe(str(source), "W4A16g32", "rtn", quantize_lm_head=True), tmp_path / "out")
    found = bitwright.verify(tmp_path / "out", source, logits=False)
    assert found.passed and found.linears == 15


@pytest.mark.parametrize(("format", "leaf"), [
    ("compressed-tensors", "weight_packed"), ("compressed-tensors", "weight_scale"), ("bitwright", "weight_packed"),
    ("bitwright", "weight_zero_point"), ("gptq", "scales"), ("gptq", "qweight"), ("awq", "qzeros"),
])  # fmt: skip
def test_a_tensor_that_is_missing_is_named(format: str, leaf: str, folders: Folders, tmp_path: Path) -> None:
    damaged = changed(folders(format), tmp_path / "damaged", lambda t: t.pop(f"{Q}.{leaf}"))
    with pytest.raises(CheckpointError, match=rf"no tensor {Q}\.{leaf}, of {Q} there are (weight_|q|scales)"):
        bitwright.verify(damaged, logits=False)


def test_findings_in_words() -> None:
    from bitwright.verification.findings import first, lacking

    assert [lacking(["a", "b", "c"][:n]) for n in range(4)] == [
        "", "a is not there", "a is not there, and 1 other", "a is not there, and 2 others",
    ]  # fmt: skip
    assert first(["x"]) == "x" and first([]) == ""


def test_a_config_that_names_no_architecture(folders: Folders, tmp_path: Path) -> None:
    nameless = config_changed(folders("gptq"), tmp_path / "nameless", lambda config: config.pop("model_type"))
    assert failed(bitwright.verify(nameless)) == {
        "logits": "config.json says model_type None: no program can load this"
    }


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "pytorch_model.bin"])
def test_weights_that_were_left_beside_the_model(name: str, folders: Folders, tmp_path: Path) -> None:
    crowded = Path(shutil.copytree(folders("gptq"), tmp_path / "crowded"))
    shutil.copy(crowded / "model.safetensors", crowded / name)
    assert f"{name} lies beside the weights" in failed(bitwright.verify(crowded, logits=False))["size on disk"]


def test_an_account_that_was_cut_off(folders: Folders, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(folders("gptq"), tmp_path / "cut"))
    account = cut / "bitwright.json"
    account.write_bytes(account.read_bytes()[:100])
    assert "bitwright.json cannot be read" in failed(bitwright.verify(cut, logits=False))["as decided"]


def test_settings_that_the_original_has_otherwise(folders: Folders, tiny: Checkpoints, tmp_path: Path) -> None:
    edited = config_changed(folders("gptq"), tmp_path / "edited", lambda config: config.update(rms_norm_eps=0.5))
    found = failed(bitwright.verify(edited, tiny(**WIDE), logits=False))
    assert list(found) == ["settings"] and re.fullmatch(r"rms_norm_eps 1e-0[56] there and 0.5 here", found["settings"])
