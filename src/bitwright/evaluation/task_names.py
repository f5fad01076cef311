"""The tasks that lm-eval knows, and the tasks behind a name, from YAML files alone, without data or a model."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from bitwright.core.errors import UserError

Config = Mapping[str, Any]


def known_tasks(names: Sequence[str], files: Sequence[Path]) -> TaskManager:
    """Load lm-eval's task manager, with the tasks of local YAML files or folders added.

    Reading all of lm-eval's own task files takes many seconds; if the local files are enough, they are not read. Raises
    UserError for a file that is no task, and for an unknown name.
    """
    folders = [str(_folder_of(path)) for path in files]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if all(_is_whole(manager, name) for name in names):
        return manager
    for name, entry in _defaults().task_index.items():
        manager.task_index.setdefault(name, entry)
    for name in names:
        if name not in manager.task_index:
            raise UserError(_unknown(name, list(manager.task_index)))
    return manager


def leaves(manager: TaskManager, name: str) -> Iterator[tuple[str, Config]]:
    """The tasks behind the name of a task, a group or a tag, with their configurations, functions not loaded."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    members = list(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if entry.kind.name in ("TAG", "GROUP"):
        for member in members or ():
            inside = member if isinstance(member, str) else member.get("task") or member.get("group")
            yield from leaves(manager, str(inside))
    else:
        yield name, entry.cfg or {}


@cache
def _defaults() -> TaskManager:
    return TaskManager()


def _is_whole(manager: TaskManager, name: str) -> bool:
    """Whether a name is known, and, if it is a group, each of its members."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name != "GROUP":
        return entry is not None
    members = (entry.cfg or {}).get("task") or ()
    return all(isinstance(member, str) and _is_whole(manager, member) for member in members)


def _folder_of(path: Path) -> Path:
    """The folder of task files that a path means. Raises UserError if one of them cannot be read as a task."""
    files = sorted(path.glob("**/*.yaml")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{path}: no task file of lm-eval; --task-files takes a .yaml file or a folder of them")
    for file in files:
        try:
            config = load_yaml(file, resolve_func=False)
        except Exception as error:  # no YAML, no mapping, or an include that is missing or goes in circles
            raise UserError(f"{file} cannot be read as a task of lm-eval: {error}") from None
        if not {"task", "group"} & set(config):
            raise UserError(f"{file} is no task of lm-eval: it has neither the key 'task' nor 'group'")
    return path if path.is_dir() else path.parent


def _unknown(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {', or '.join(close)}? " if close else ""
    return f"lm-eval knows no task '{name}'; {hint}All {len(known)} names: lm-eval ls tasks"
