"""The choices and checks of ``bench``: the engine, the program that times a model, and the original."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.core import child_process
from bitwright.core.child_process import python_command
from bitwright.core.engine import BenchInput, Engine, engines
from bitwright.core.errors import CheckpointError, RecipeError, UserError, in_shell, nearest
from bitwright.evaluation import llamacpp_speed
from bitwright.formats.gguf.architecture import architecture
from bitwright.formats.gguf.header import MAGIC
from bitwright.formats.gguf.reading import opened
from bitwright.formats.gguf.settings import dimensions
from bitwright.model.config import apart
from bitwright.model.source import open_checkpoint

IDLE = {BenchInput.FOLDER: ("python", "library"), BenchInput.GGUF: ("device", "dtype")}
"""Options of ``bench`` that an engine does not use."""
PROGRAM = str(Path(llamacpp_speed.__file__).resolve())


def chosen_engine(model: Path, name: str | None) -> Engine:
    """Choose the named engine, or else the first engine in which ``bench`` can run the model.

    Raises RecipeError if ``bench`` does not measure the named engine or if the engine does not load the model,
    CheckpointError if the model is neither a folder nor a GGUF file.
    """
    measured = {engine.name: engine for engine in engines() if engine.bench}
    if name is not None and name not in measured:
        if name in {engine.name for engine in engines()}:
            raise RecipeError(f"bench measures in {' and '.join(measured)}, not in {name}; leave --engine {name} out")
        raise RecipeError(f"bench knows no engine '{name}'; {nearest(name, measured)}")
    given = BenchInput.FOLDER if model.is_dir() else BenchInput.GGUF
    default = next(engine for engine in measured.values() if engine.bench is given)
    engine = default if name is None else measured[name]
    if given is BenchInput.GGUF:
        require_gguf(model)
        if engine.bench is not given:
            raise RecipeError(
                f"engine {engine.name} runs folders, and {model} is a GGUF file: --engine {default.name} runs it"
            )
    elif engine.bench is not given:
        raise RecipeError(
            f"{engine.name} runs .gguf files, and {model} is a folder: bitwright export {in_shell(model)} --format "
            f"gguf --output {in_shell(model.name + '.gguf')} writes one, then bitwright bench "
            f"{in_shell(model.name + '.gguf')}"
        )
    return engine


def refuse_idle(engine: Engine, **options: Path | str | None) -> None:
    """Raise RecipeError for an option that this engine does not use."""
    for name in IDLE[engine.bench] if engine.bench else ():
        if options[name] not in (None, "auto"):
            builds = f"; {engine.name} runs where it was built for: --library takes a build of your own"
            raise RecipeError(
                f"engine {engine.name} has no use for --{name} {options[name]}; leave it out"
                f"{builds if name == 'device' else ''}"
            )


def llama_cpp_command(python: Path | str | None, library: Path | str | None) -> tuple[tuple[str, ...], str | None]:
    """The command that times a GGUF file, and the path of its llama.cpp library, which is None for xllamacpp's.

    Raises UserError if ``python`` has no xllamacpp, if ``library`` is no llama.cpp, and if both are given.
    """
    if library is None:
        return _with_xllamacpp(python), None
    if python is not None:
        raise RecipeError(f"--library {library} needs no xllamacpp; leave --python {python} out")
    command = python_command(PROGRAM)
    process = child_process.run((*command, str(library)))
    if process.returncode:
        output = process.stderr.decode(errors="replace").strip()[-500:]
        raise UserError(
            f"--library {library} is no llama.cpp that can be measured: {output}; name the "
            "libllama.so (.dylib, .dll) of a build with -DBUILD_SHARED_LIBS=ON"
        )
    return command, str(Path(library).resolve())


def _with_xllamacpp(python: Path | str | None) -> tuple[str, ...]:
    """The command of an interpreter, by default this one. Raises UserError if it does not have xllamacpp."""
    if python is None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise UserError(
                "engine llama.cpp needs the package xllamacpp, which is not installed here: pip install "
                "'bitwright[llamacpp]', or give --python INTERPRETER of an environment that has it"
            )
        return python_command(PROGRAM)
    command = python_command(PROGRAM, python=str(python))
    try:
        process = child_process.run(command, other=True)
    except OSError as error:
        raise UserError(f"--python {python} cannot be run: {error.strerror}; name a Python interpreter") from None
    if process.returncode:
        output = process.stderr.decode(errors="replace").strip()
        raise UserError(
            f"--python {python} cannot import xllamacpp ({output.splitlines()[-1:]}); install it there: "
            f"{python} -m pip install xllamacpp"
        )
    return command


def require_gguf(path: Path) -> None:
    """Raise CheckpointError if a path is no GGUF file."""
    if not path.is_file():
        raise CheckpointError(f"there is no {path}; bench takes a folder of a model or a .gguf file")
    with path.open("rb") as file:
        beginning = file.read(len(MAGIC))
    if beginning != MAGIC:
        raise CheckpointError(
            f"{path} is neither the folder of a model nor a GGUF file: it begins with {beginning!r}, not {MAGIC!r}. "
            "Name the folder that holds config.json, or a file that bitwright export --format gguf wrote"
        )


def require_same_folders(model: Path, against: Path) -> None:
    """Raise CheckpointError if two folders differ in architecture or dimensions."""
    _require_same(model, against, open_checkpoint(model).config, open_checkpoint(against).config)


def require_same_in_files(model: Path, against: Path) -> None:
    """Raise CheckpointError if a GGUF file and another file, or an unquantized folder, are of different models.

    They are if they differ in architecture or dimensions. A damaged file is refused too. Raises RecipeError for a
    folder that GGUF cannot describe.
    """
    other = _folder_config(against) if against.is_dir() else _file_config(against)
    _require_same(model, against, _file_config(model), other)


def _require_same(model: Path, against: Path, config: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    if difference := apart(config, other):
        raise CheckpointError(
            f"--against {against} is another model than {model}: {difference}. Name the original that it was made of, "
            "or leave --against out"
        )


def _folder_config(folder: Path) -> dict[str, Any]:
    """Read config.json, with GGUF's name for the architecture."""
    config = open_checkpoint(folder).config
    return {**config, "model_type": architecture(config).name}


def _file_config(path: Path) -> dict[str, Any]:
    """Read the architecture and dimensions that a GGUF file states, under config.json's keys."""
    header = opened(path).header
    return {**dimensions(header), "model_type": header.metadata.get("general.architecture")}
