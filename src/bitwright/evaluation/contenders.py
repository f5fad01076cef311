"""What bench may measure: an engine that runs the model, and an original beside it that is the same model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.core.errors import CheckpointError, RecipeError, nearest
from bitwright.core.registry import find
from bitwright.engines.table import engines
from bitwright.formats.gguf.header import MAGIC
from bitwright.model.config import apart
from bitwright.model.source import open_checkpoint

ENGINES = ("transformers", "llama.cpp")
GGUF_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}
"""Dimensions by the names that config.json has for them, and GGUF's."""


def chosen_engine(model: Path, named: str | None) -> str:
    """The engine that was named, or the one for this kind of model. Raises UserError where they do not go together."""
    if named in {engine.name for engine in engines()} - {*ENGINES}:
        raise RecipeError(f"bench measures in {' and '.join(ENGINES)}, not in {named}; leave --engine {named} out")
    if named is not None and named not in ENGINES:
        raise RecipeError(f"bench knows no engine '{named}'; {nearest(named, ENGINES)}")
    if model.is_dir():
        if named == "llama.cpp":
            raise RecipeError(
                f"llama.cpp runs .gguf files, and {model} is a folder: bitwright export {model} --format gguf --output "
                f"{model.name}.gguf writes one, then bitwright bench {model.name}.gguf"
            )
        return "transformers"
    require_gguf(model)
    if named == "transformers":
        raise RecipeError(f"engine transformers runs folders, and {model} is a GGUF file: --engine llama.cpp runs it")
    return "llama.cpp"


def refuse_idle(engine: str, **asked: Path | str | None) -> None:
    """Raises RecipeError for what is asked of the other engine."""
    idle = ("python", "library") if engine == "transformers" else ("device", "dtype")
    for name in idle:
        if asked[name] not in (None, "auto"):
            builds = "; llama.cpp runs where it was built for: --library takes a build of your own"
            instead = builds if name == "device" else ""
            raise RecipeError(f"engine {engine} has no use for --{name} {asked[name]}; leave it out{instead}")


def require_gguf(path: Path) -> None:
    """Raises CheckpointError for what is no GGUF file."""
    if not path.is_file():
        raise CheckpointError(f"there is no {path}; bench takes a folder of a model or a .gguf file")
    with path.open("rb") as file:
        found = file.read(len(MAGIC))
    if found != MAGIC:
        raise CheckpointError(
            f"{path} is neither the folder of a model nor a GGUF file: it begins with {found!r}, not {MAGIC!r}. Name "
            "the folder that holds config.json, or a file that bitwright export --format gguf wrote"
        )


def require_same_folders(model: Path, against: Path) -> None:
    """Raises CheckpointError where two folders have another architecture, or other dimensions."""
    _require_same(model, against, open_checkpoint(model).config, open_checkpoint(against).config)


def require_same_in_files(model: Path, against: Path) -> None:
    """The same of a .gguf file, and of another or an unquantized folder. Raises RecipeError for a folder that GGUF has
    no words for, CheckpointError for a damaged file."""
    theirs = _of_folder(against) if against.is_dir() else _of_file(against)
    _require_same(model, against, _of_file(model), theirs)


def _require_same(model: Path, against: Path, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    if found := apart(here, there):
        raise CheckpointError(
            f"--against {against} is another model than {model}: {found}. Name the original that it was made of, or "
            "leave --against out"
        )


def _of_folder(folder: Path) -> dict[str, Any]:
    """What config.json says, the architecture as GGUF calls it."""
    config = open_checkpoint(folder).config
    return {**config, "model_type": find("formats", "gguf").architecture(config).name}


def _of_file(path: Path) -> dict[str, Any]:
    """What a .gguf file says, by config.json's names; the vocabulary is as many tokens as it lists."""
    says = find("formats", "gguf").opened(path).header.says
    named = says.get("general.architecture")
    found = {key: says.get(f"{named}.{theirs}") for key, theirs in GGUF_KEYS.items()}
    tokens = getattr(says.get("tokenizer.ggml.tokens"), "count", None)
    return {**found, "model_type": named, "vocab_size": tokens}
