"""What changes between a kill and the next run, or during a run: the result is right, or there is none."""

import json
import os
from pathlib import Path

import pytest
from tests.checkpoint.conftest import Killed
from tests.conftest import Checkpoints, contents
from tests.written.test_resume import partial, stop_at

import bitwright
from bitwright.core.errors import ChangedError, CheckpointError, OutputError
from bitwright.core.progress import Progress
from bitwright.core.recipe import Recipe

WAYS = ("block by block", "tensor by tensor")


@pytest.fixture
def recipe(tiny: Checkpoints, text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Recipe:
    """A model of one's own to change, gone through in one of the two ways."""
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny().iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    if request.param == WAYS[1]:
        return Recipe(str(model), "W3A16g32", "rtn")
    return Recipe(str(model), "W3A16g32", "gptq", calibration=str(text), samples=4, seqlen=32)


def overwrite(path: Path, at: int, with_: bytes) -> None:
    """Change bytes of a file and set its times back."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(with_)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("recipe", WAYS, indirect=True)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_zeros_in_a_finished_part(share: float, recipe: Recipe, tmp_path: Path) -> None:
    bitwright.quantize(recipe, tmp_path / "whole")
    partial(recipe, tmp_path / "out", 2)
    for part in tmp_path.glob("out.partial/part-*.safetensors"):
        overwrite(part, int(part.stat().st_size * share), bytes(8))
    assert bitwright.quantize(recipe, tmp_path / "out").resumed == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("recipe", WAYS, indirect=True)
def test_weights_that_are_changed_and_their_time_kept(recipe: Recipe, tmp_path: Path) -> None:
    partial(recipe, tmp_path / "out", 1)
    weights = Path(recipe.model) / "model.safetensors"
    overwrite(weights, weights.stat().st_size // 3, b"\x01\x3c")  # in the samples of no fingerprint
    with pytest.raises(OutputError, match="begun from other files of the model than are there now"):
        bitwright.quantize(recipe, tmp_path / "out")


@pytest.mark.parametrize("recipe", WAYS, indirect=True)
def test_weights_that_are_changed_during_the_run_and_their_time_kept(recipe: Recipe, tmp_path: Path) -> None:
    weights, last = Path(recipe.model) / "model.safetensors", list[str]()

    def change(progress: Progress) -> None:
        if progress.stage == "quantize" and not last:
            last.append(progress.unit)
            overwrite(weights, weights.stat().st_size // 3, b"\x01\x3c")

    with pytest.raises(ChangedError, match="changed under the run"):  # seen as it is read, or at the end
        bitwright.quantize(recipe, tmp_path / "out", listener=change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", WAYS[:1], indirect=True)
def test_permissions_may_change_during_hours_of_work(recipe: Recipe, tmp_path: Path) -> None:
    def change(_: Progress) -> None:
        (Path(recipe.model) / "model.safetensors").chmod(0o600)

    assert bitwright.quantize(recipe, tmp_path / "out", listener=change).resumed == 0


@pytest.mark.parametrize("recipe", WAYS, indirect=True)
def test_files_beside_the_weights(recipe: Recipe, tmp_path: Path) -> None:
    tokenizer = Path(recipe.model) / "tokenizer.json"
    content = tokenizer.read_bytes()

    def remove_it(progress: Progress) -> None:
        if progress.stage == "quantize":
            tokenizer.unlink(missing_ok=True)

    with pytest.raises(CheckpointError, match=r"tokenizer\.json is gone since the run began.*Put it back"):
        bitwright.quantize(recipe, tmp_path / "out", listener=remove_it)
    assert not (tmp_path / "out").exists()
    tokenizer.write_bytes(content)
    assert bitwright.quantize(recipe, tmp_path / "out").resumed > 0
    assert (tmp_path / "out/tokenizer.json").read_bytes() == content
    (tmp_path / "other").mkdir()
    partial(recipe, tmp_path / "other/out", 1)
    tokenizer.write_bytes(content + b"\n")
    with pytest.raises(OutputError, match=r"beside_the_weights\.tokenizer\.json"):
        bitwright.quantize(recipe, tmp_path / "other/out")


@pytest.mark.parametrize("recipe", WAYS[1:], indirect=True)
def test_a_finished_shard_that_is_changed_is_not_published(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("bitwright.written.finishing.write_config", stop)
        with pytest.raises(Killed):
            bitwright.quantize(recipe, tmp_path / "out")
    (shard,) = tmp_path.glob("out.partial/result/*.safetensors")
    overwrite(shard, shard.stat().st_size // 2, b"\x00\xff")
    with pytest.raises(OutputError, match=r"model\.safetensors: not what was merged.*--restart"):
        bitwright.quantize(recipe, tmp_path / "out")


def test_the_size_of_a_result_does_not_count_an_earlier_attempt(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny("float16")), "W4A16g32sym", "rtn", "mlc")
    whole = bitwright.quantize(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        bitwright.quantize(recipe, tmp_path / "out", listener=stop_at(1))
    result = tmp_path / "out.partial/result"
    (result / "params_shard_7.bin").write_bytes(bytes(1000))
    again = bitwright.quantize(recipe, tmp_path / "out")
    assert again.bytes_out == whole.bytes_out
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("recipe", WAYS[:1], indirect=True)
@pytest.mark.parametrize("name", [None, [], {}])
def test_a_report_in_the_journal_that_no_run_has_written(name: object, recipe: Recipe, tmp_path: Path) -> None:
    partial(recipe, tmp_path / "out", 1)
    journal = tmp_path / "out.partial/journal.jsonl"
    first, unit, *_ = journal.read_text().splitlines()
    line = json.loads(unit)
    line["report"]["linears"][0]["name"] = name
    journal.write_text("\n".join([first, json.dumps(line), ""]))
    with pytest.raises(OutputError, match=r"the report of model\.layers\.0 is damaged: .*--restart"):
        bitwright.quantize(recipe, tmp_path / "out")
