"""Which engine bench measures in, and what is asked of the other one."""

from pathlib import Path

from bitwright.api.engine_table import engines
from bitwright.core.errors import CheckpointError, RecipeError, nearest
from bitwright.formats.gguf.header import MAGIC

ENGINES = ("transformers", "llama.cpp")


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
