"""Models of the hub: taken from the local cache by their names, and fetched only on request."""

import shutil
import socket
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from tests.conftest import Checkpoints

import bitwright
from bitwright import Recipe
from bitwright.core.errors import CheckpointError
from bitwright.core.progress import Progress
from bitwright.model import hub
from bitwright.model.source import find_folder

NAME = "Somebody/Tiny-1B"
WEIGHTS = "model.safetensors"
Keep = Callable[..., Path]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and an empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def keep(home: Path) -> Keep:
    """A function that puts a model's files into the cache as huggingface_hub does: links to blobs."""

    def put(model: Path, commit: str = "a" * 40) -> Path:
        place = home / f"models--{NAME.replace('/', '--')}"
        for folder in ("blobs", "refs", f"snapshots/{commit}"):
            (place / folder).mkdir(parents=True, exist_ok=True)
        for path in model.iterdir():
            shutil.copy(path, place / "blobs" / f"{commit}-{path.name}")
            (place / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{commit}-{path.name}")
        (place / "refs" / "main").write_text(commit)
        return place / "snapshots" / commit

    return put


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever opens a connection fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_every_call_takes_the_newest_snapshot(tiny: Checkpoints, keep: Keep, tmp_path: Path) -> None:
    keep(tiny("float32"), "b" * 40)
    snapshot = keep(tiny())
    recipe = Recipe(NAME, "W8A16")
    assert bitwright.plan(recipe).model == NAME
    bitwright.quantize(recipe, tmp_path / "name")
    bitwright.quantize(Recipe(str(tiny()), "W8A16"), tmp_path / "folder")
    assert (tmp_path / "name" / WEIGHTS).read_bytes() == (tmp_path / "folder" / WEIGHTS).read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "name").iterdir())
    assert bitwright.inspect(NAME).path == str(snapshot)
    assert bitwright.verify(tmp_path / "name", NAME).passed
    measured = bitwright.evaluate(tmp_path / "name", windows=1, seqlen=32, reference=NAME).measurement
    assert measured is not None and measured.kl_divergence is not None
    assert bitwright.load(NAME).config.vocab_size == 256


def test_blocks_find_the_tokenizer_too(tiny: Checkpoints, keep: Keep, tmp_path: Path) -> None:
    keep(tiny())
    recipe = Recipe(NAME, "W4A16g32", "gptq", calibration="builtin", samples=2, seqlen=32)
    bitwright.quantize(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_folder_of_that_name_takes_precedence(tiny: Checkpoints, keep: Keep) -> None:
    keep(tiny())
    here = Path(shutil.copytree(tiny("float32"), Path(NAME)))
    assert find_folder(here) == here and bitwright.download(NAME) == here


@pytest.mark.parametrize("part", [WEIGHTS, None])
def test_what_the_cache_lacks_is_said(part: str | None, tiny: Checkpoints, keep: Keep, tmp_path: Path) -> None:
    if part is not None:
        (keep(tiny()) / part).unlink()
    with pytest.raises(CheckpointError, match=f"no whole model of that name .* --download .* hf download {NAME}"):
        bitwright.quantize(Recipe(NAME, "W4A16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["a/b/c", "/nowhere/x", "--x/y", "x..y/z", "a b/c"])
def test_what_is_no_name_is_not_looked_up(path: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cached", lambda name: pytest.fail(f"looked up {name}"))
    with pytest.raises(CheckpointError, match=r"no such folder|there is no folder"):
        bitwright.inspect(path)
    assert bitwright.download(path) == Path(path)


def test_download_fetches_what_is_needed_and_no_code(
    tiny: Checkpoints, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, steps = list[dict[str, Any]](), list[Progress]()
    before = huggingface_hub.snapshot_download

    def fetch(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return str(before(name, **options))
        asked.append({"name": name} | options)
        with options["tqdm_class"](total=0, unit="B", name="huggingface_hub.snapshot_download") as bar:
            for done in (40, 60):
                bar.total = 100
                bar.update(done)
        list(options["tqdm_class"](range(3), desc="Fetching 3 files"))
        return str(keep(tiny()))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = bitwright.download(NAME, listener=steps.append)
    assert bitwright.download(NAME) == folder and len(asked) == 1  # what is there is not fetched again
    assert bitwright.inspect(NAME).parameters
    assert [(step.stage, step.done, step.total) for step in steps] == [("download", 40, 100), ("download", 100, 100)]

    def fetched(file: str) -> bool:
        kept = any(fnmatch(file, pattern) for pattern in asked[0]["allow_patterns"])
        return kept and not any(fnmatch(file, pattern) for pattern in asked[0]["ignore_patterns"])

    assert all(map(fetched, ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                             "tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "LICENSE.txt",
                             "additional_chat_templates/tool_use.jinja")))  # fmt: skip
    assert not any(map(fetched, ("modeling_tiny.py", "tokenizer.py", "tokenizer/tokenization.py", "model.gguf",
                                 "pytorch_model.bin", "original/tokenizer.model", "consolidated.safetensors",
                                 "onnx/model.safetensors", "x.pth", "README.md")))  # fmt: skip


def test_offline_nothing_is_downloaded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids"):
        bitwright.download(NAME)


def test_what_goes_wrong_is_one_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        raise FileNotFoundError if options.get("local_files_only") else OSError("404: no such repository\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded .*: OSError: 404: no such repository\. Is"):
        bitwright.download(NAME)
