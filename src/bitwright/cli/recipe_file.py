"""Recipes as YAML files: their keys are the flags of ``quantize``."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from bitwright.cli.options import BESIDE
from bitwright.core.errors import RecipeError, nearest, shown
from bitwright.core.recipe import Recipe
from bitwright.core.small_files import require_regular

OUTPUT = "output"
LARGEST_FILE, MOST_VALUES = 2**18, 100_000
"""The most bytes of a recipe, and the most values in it once its aliases are written out."""
ENDLESS = 10**18
EXAMPLES = {
    "include": "a pattern, include: '*.router.weight'",
    "exclude": "a pattern, exclude: '*.down_proj', or a list of them",
    "scheme_for": "a scheme for a pattern, scheme_for: {'*.down_proj': W8A16g128}",
}
"""Keys that hold patterns, and how they are written."""


class OnceEach(yaml.SafeLoader):
    """A YAML loader that refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build the mapping of a node. Raises ConstructorError for a key that stands twice, and for no patterns."""
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value).replace("-", "_")
            if name in seen:
                both = f" (as {name} and {name.replace('_', '-')}, which are one)" if "_" in name else ""
                problem = f"the key '{name}' stands twice{both}; leave one out"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
            if name in EXAMPLES and not value.value:  # empty, unlike null
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{name}' is empty; leave it out, or write {EXAMPLES[name]}", key.start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build the value of a node. Raises ConstructorError, which names the line, for a value that is none."""
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # PyYAML's own code raises what it meets: no such month, no match of an expression
            value = shown(node.value) if isinstance(node, yaml.ScalarNode) else "this"
            problem = f"{value} is no {node.tag.rpartition(':')[2][:40]}: {error}"
            raise yaml.constructor.ConstructorError(None, None, problem[:300], node.start_mark) from None

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Build a whole number. Raises ValueError for one that no setting has, and that no message could show."""
        number: int = super().construct_yaml_int(node)
        if abs(number) >= 2**64:
            raise ValueError(f"the number {str(node.value)[:20]}... is out of bounds")
        return number

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """Take a date for the text that it is: no key takes one, and the error of its key tells more."""
        return str(self.construct_scalar(node))


OnceEach.add_constructor("tag:yaml.org,2002:int", OnceEach.construct_yaml_int)
OnceEach.add_constructor("tag:yaml.org,2002:timestamp", OnceEach.construct_text)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the keys of a YAML recipe, with underscores for hyphens.

    Raises RecipeError for an unknown key; the message names the nearest known one.
    """
    written, known = parsed(path), (*Recipe.keys(), *BESIDE)
    for key in written:
        if key not in known:
            raise RecipeError(f"recipe {path}: there is no key '{key}'; {nearest(key, known)}")
    output = written.get(OUTPUT)
    if output is not None and not isinstance(output, str):
        raise RecipeError(f"recipe {path}: key '{OUTPUT}' is {shown(output)}; it takes the path of a folder")
    return written


def _unreadable(path: Path, error: Exception) -> RecipeError:
    """The error of a file that is no YAML."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None and "alias" in str(error):
        return RecipeError(
            f"recipe {path}, line {mark.line + 1}: YAML takes a text that begins with * for an alias; put patterns in "
            "quotes: '*.down_proj'"
        )
    problem = getattr(error, "problem", None)
    if mark is None or problem is None:
        return RecipeError(f"recipe {path} cannot be read as YAML: {error}")
    place = f"recipe {path}, line {mark.line + 1}"
    if isinstance(error, yaml.constructor.ConstructorError) and error.context is None:
        return RecipeError(f"{place} cannot be read as YAML: {problem}" if "tag" in problem else f"{place}: {problem}")
    context = f"{error.context}, " if isinstance(error, yaml.error.MarkedYAMLError) and error.context else ""
    return RecipeError(f"{place} cannot be read as YAML: {context}{problem}")


def _content(path: Path) -> Any:
    """Read the values of a YAML file. Raises RecipeError for aliases that stand for more than ``MOST_VALUES``."""
    loader = OnceEach(path.read_text(encoding="utf-8"))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (values := _values(node, {})) > MOST_VALUES:
            count = "endlessly many" if values == ENDLESS else f"{values:,}"
            raise RecipeError(
                f"recipe {path} stands for {count} values, its aliases (*name) written out, and {MOST_VALUES:,} are "
                "the most; write it without aliases"
            )
        return loader.construct_document(node)
    except (KeyError, TypeError, AttributeError, IndexError) as error:  # PyYAML does not look at what tags stand before
        raise yaml.YAMLError(f"a tag (!!set, !!omap) stands before something else: {str(error)[:100]}") from None
    finally:
        loader.dispose()


def _values(node: yaml.Node, counted: dict[int, int]) -> int:
    """The number of values that a node stands for, each alias written out; one within itself is endless."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = ENDLESS
        inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        counted[id(node)] = min(ENDLESS, 1 + sum(_values(part, counted) for part in inner))
    return counted[id(node)]


def parsed(path: Path) -> dict[str, Any]:
    """Parse a YAML file, with underscores for hyphens in its keys. Raises RecipeError if it is no mapping."""
    try:
        require_regular(path, RecipeError)
        if path.stat().st_size > LARGEST_FILE:
            raise RecipeError(
                f"recipe {path} has {path.stat().st_size:,} bytes, and {LARGEST_FILE:,} are the most; schemes of many "
                "linears go into a file for --allocation"
            )
        content = _content(path)
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}; --recipe takes a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or an impossible number or date
        raise _unreadable(path, error) from None
    except RecursionError:
        raise RecipeError(f"recipe {path} is nested too deeply to be a recipe") from None
    if not isinstance(content, dict) or not content:
        raise RecipeError(f"recipe {path} holds no keys; it reads like: 'scheme: W4A16g128'")
    return {str(key).replace("-", "_"): value for key, value in content.items()}
