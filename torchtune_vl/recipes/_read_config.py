"""Reading a config and checking it against its description, before anything is loaded."""

import argparse
import difflib
import inspect
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchtune_vl.recipes import config_path
from torchtune_vl.recipes._config import (
    NAMES_ELSEWHERE,
    AtLeast,
    Component,
    Config,
    Given,
    MoreThan,
)

_COMPONENT = "_component_"

# Keys that no recipe of torchtune has
KEYS_OF_OURS = {"rows", "rows_per_step", "activation_checkpointing"}


def read_config(arguments: Sequence[str], description: type = Config) -> DictConfig:
    """Read a config as the command line of a recipe names it.

    Args:
        arguments: ``--config``, with the name or the file of a config, and overrides:
            ``key=value``; ``key=path`` of another component for a key with one, which leaves its
            arguments; and ``~key`` to take a key out.
        description: dataclass whose fields are the keys.

    Returns:
        The config, with the defaults of absent keys, and ``dataset_val`` completed from
        ``dataset``.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if there is none, it cannot be read, or does not fit the description, with all
            errors.
    """
    parser = argparse.ArgumentParser(prog="tune-vl run", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="CONFIG")
    known, overrides = parser.parse_known_args(arguments)
    path = config_path(known.config)
    if not path.exists():
        raise ValueError(f"no config and no file is called {known.config!r}: see `tune-vl ls`")
    content = read_file(path)
    try:
        config = _override(content, overrides)
        _inherit(config)
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{known.config}: {_first_line(error)}") from error
    # A key that others refer to needs no other use
    referred = {*re.findall(r"\$\{(\w+)", OmegaConf.to_yaml(config))}
    unused = referred - {key.name for key in keys_of(description)}
    values = {key: value for key, value in values.items() if key not in unused}
    # torchtune's recipes that train all have this key; a config of ours may be no more than begun
    is_torchtunes = "resume_from_checkpoint" in values and not KEYS_OF_OURS & {*values}
    if is_torchtunes and KEYS_OF_OURS & {key.name for key in keys_of(description)}:
        raise ValueError(
            f"{known.config} is a config of torchtune's recipes, and no config of the recipe "
            "finetune: see `tune-vl ls`"
        )
    _raise_all(known.config, _wrong_keys(values, description, ""))
    _add_defaults(config, description)
    return config


def check_components(config: DictConfig, description: type = Config) -> None:
    """Check that the components of a config exist and take their arguments.

    This imports them, and takes as long.

    Args:
        config: as :func:`read_config` returns it.
        description: its dataclass.

    Raises:
        ValueError: which lists those that are not there, and arguments that are unknown, missing
            or of a wrong type.
    """
    if str(Path.cwd()) not in sys.path:  # components of the user's own
        sys.path.append(str(Path.cwd()))
    values: Any = OmegaConf.to_container(config, resolve=True)
    _raise_all("", _wrong_components(values, description, ""))


def _raise_all(source: str, errors: Iterable[str]) -> None:
    found = [*errors]
    prefix = f"{source}: " if source else ""
    if len(found) == 1:
        raise ValueError(prefix + found[0])
    if found:
        lines = "".join(f"\n  {error}" for error in found)
        raise ValueError(f"{prefix}{len(found)} keys of the config are wrong{lines}")


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error).split("\n")[0]


def read_file(path: Path) -> dict[str, Any]:
    """Read the file of any config.

    Args:
        path: of a YAML file.

    Returns:
        Its keys and values, with references to others as they are.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it has no keys and values in YAML.
    """
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason}") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {_first_line(error)}") from error
    if not content or not isinstance(content, dict):
        raise ValueError(f"{path} has no keys at its top: it is no config")
    return content


def _override(content: dict[str, Any], overrides: Sequence[str]) -> DictConfig:
    """Apply what the command line says, of which removals come first."""
    assignments = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if override.startswith("~"):
            _remove(content, key[1:])
        elif equals and not key.startswith("-"):
            has_component = isinstance(content.get(key), dict) and _COMPONENT in content[key]
            if value == "None":
                value = "null"
            if has_component and value != "null":
                key = f"{key}.{_COMPONENT}"
            assignments.append(f"{key}={value}")
        else:
            raise ValueError(
                f"{override!r} is no override: write key=value to set a key, ~key to take it out"
            )
    return cast("DictConfig", OmegaConf.merge(content, OmegaConf.from_dotlist(assignments)))


def _remove(content: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    node: Any = content
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        raise ValueError(f"~{key} takes out a key that the config does not have")
    del node[last]


def _inherit(config: DictConfig) -> None:
    """Complete a validation set that says only what differs from the training set."""
    validation, training = config.get("dataset_val"), config.get("dataset")
    if all(isinstance(x, DictConfig) for x in (validation, training)) and (
        _COMPONENT not in validation
    ):
        config.dataset_val = OmegaConf.merge(training, validation)


def _add_defaults(config: DictConfig, description: type) -> None:
    for key in keys_of(description):
        if key.group is not None:
            _add_defaults(config[key.name], key.group)
        elif key.name not in config:
            config[key.name] = key.default


class Key(NamedTuple):
    """A key of a description.

    Args:
        name: of the field.
        kind: its type, with bounds of numbers.
        group: the dataclass of the keys below it, None for a key with a value.
        given: what the recipe adds to the arguments of a component.
        default: value of an absent key; ``MISSING`` if it must be there.
        meaning: in words, with Markdown.
    """

    name: str
    kind: Any
    group: type | None
    given: Given
    default: Any
    meaning: str


def keys_of(description: type) -> list[Key]:
    """List the keys of a description.

    Args:
        description: dataclass whose fields are annotated with their meaning.

    Returns:
        The keys, in their order.
    """
    hints = get_type_hints(description, include_extras=True)
    return [_key(field, hints[field.name]) for field in fields(description)]


def _key(field: Field, hint: Any) -> Key:
    kind, *notes, meaning = get_args(hint)
    given = next((note for note in notes if isinstance(note, Given)), Given())
    group: Any = kind if is_dataclass(kind) else None
    return Key(field.name, hint, group, given, field.default, meaning)


def _wrong_keys(values: Mapping[Any, Any], description: type, prefix: str) -> Iterator[str]:
    known = {key.name: key for key in keys_of(description)}
    for name in values:
        if name not in known:
            yield f"{prefix}{name} is no key of this recipe{_nearest(name, known, prefix)}"
    for name, key in known.items():
        value = values.get(name)
        if name not in values:
            if key.default is MISSING:
                yield f"{prefix}{name} is missing: {key.meaning}"
        elif key.group is not None and isinstance(value, dict):
            yield from _wrong_keys(value, key.group, f"{prefix}{name}.")
        elif not _fits(value, key.kind):
            yield f"{prefix}{name} is {_shown(value)}, and takes {words(key.kind)}"


def _nearest(key: Any, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    if prefix + str(key) in NAMES_ELSEWHERE:
        return f"; what it sets elsewhere {NAMES_ELSEWHERE[key]} sets here"
    return f"; the nearest is {prefix}{near[0]}" if near else ""


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that YAML can hold is of a type; types that it cannot judge take all."""
    origin, parameters = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(value, parameters[0]) and (
            not isinstance(value, int | float) or all(_within(value, x) for x in parameters[1:])
        )
    if origin in (Union, types.UnionType):
        # What YAML cannot hold says nothing of what it can
        judged = [x for x in parameters if _judges(x)]
        return any(_fits(value, x) for x in judged or parameters)
    if origin is Literal:
        return any(value == x and type(value) is type(x) for x in parameters)
    if kind is Component:
        return isinstance(value, dict) and isinstance(value.get(_COMPONENT), str)
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (str, Path):
        return isinstance(value, str)
    if kind in (bool, types.NoneType):
        return isinstance(value, kind)
    if is_dataclass(kind) or _is_mapping(origin or kind):
        return isinstance(value, dict)
    if origin in (tuple, list, Sequence, Iterable):
        if not isinstance(value, list):
            return False
        items = parameters[:1] if origin is not tuple or Ellipsis in parameters else parameters
        if len(items) == 1:
            return all(_fits(x, items[0]) for x in value)
        return len(items) == len(value) and all(map(_fits, value, items))
    return True


def _is_mapping(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Mapping)


def _judges(kind: Any) -> bool:
    """Whether :func:`_fits` can tell what is no such value."""
    return get_origin(kind) is not None or (
        kind in (Component, float, int, str, Path, bool, types.NoneType)
        or is_dataclass(kind)
        or _is_mapping(kind)
    )


def _within(value: float, note: Any) -> bool:
    if isinstance(note, AtLeast):
        return value >= note.minimum
    return not isinstance(note, MoreThan) or value > note.bound


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    Path: "a path",
    types.NoneType: "null",
    Component: f"a mapping with `{_COMPONENT}`",
}


def words(kind: Any) -> str:
    """Say what a key takes.

    Args:
        kind: its type.

    Returns:
        The type as a user of configs knows it.
    """
    origin, parameters = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [x for x in parameters[1:] if isinstance(x, AtLeast | MoreThan)]
        said = [
            f" of at least {x.minimum:g}" if isinstance(x, AtLeast) else f" above {x.bound:g}"
            for x in bounds
        ]
        return "".join([words(parameters[0]), *said])
    if origin in (Union, types.UnionType):
        return " or ".join(words(x) for x in parameters if _judges(x))
    if origin is Literal:
        *others, last = map(str, parameters)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (tuple, list, Sequence, Iterable):
        return f"a list of {' and '.join(words(x) for x in parameters if x is not Ellipsis)}"
    return _WORDS.get(kind, "a mapping")


def _wrong_components(values: Mapping[str, Any], description: type, prefix: str) -> Iterator[str]:
    for key in keys_of(description):
        value = values[key.name]
        if key.group is not None:
            yield from _wrong_components(value, key.group, f"{prefix}{key.name}.")
        elif isinstance(value, dict):
            yield from _wrong_component(value, key.given, prefix + key.name)


def _wrong_component(value: Mapping[str, Any], given: Given, name: str) -> Iterator[str]:
    path = value[_COMPONENT]
    try:
        component = _find(path)
    except ValueError as error:
        yield f"{name}.{_COMPONENT}: {error}"
        return
    try:
        parameters = inspect.signature(component).parameters
    except ValueError:  # one that is written in C
        return
    arguments = {key: x for key, x in value.items() if key != _COMPONENT}
    by_name = {
        key: parameter
        for key, parameter in [*parameters.items()][len(given.positional) :]
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(x.kind == x.VAR_KEYWORD for x in parameters.values())
    types_of = _types_of(component)
    for key, argument in arguments.items():
        kind = types_of.get(key, Any) if key in by_name else Any
        if key in given.keywords:
            yield f"{name}.{key} is set by the recipe itself"
        elif key not in by_name and not takes_any:
            yield f"{name}.{key} is nothing that {path} takes{_nearest(key, by_name, name + '.')}"
        elif not _fits(argument, kind):
            yield f"{name}.{key} is {_shown(argument)}, and takes {words(kind)}"
    for key, parameter in by_name.items():
        if parameter.default is parameter.empty and key not in {*arguments, *given.keywords}:
            yield f"{name}.{key} is missing, which {path} needs"


def _find(path: str) -> Callable[..., Any]:
    """Import what a dotted path names."""
    module, *attributes = path.split(".")
    try:
        found: Any = import_module(module)
        for position, attribute in enumerate(attributes):
            if not hasattr(found, attribute) and isinstance(found, types.ModuleType):
                import_module(".".join([module, *attributes[: position + 1]]))
            found = getattr(found, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        known = dir(found) if "found" in locals() else ()
        near = _nearest(path.split(".")[-1], known)
        raise ValueError(f"{path!r} cannot be imported{near} ({error})") from error
    if not callable(found):
        raise ValueError(f"{path!r} cannot be called")
    return found


def _types_of(component: Callable[..., Any]) -> dict[str, Any]:
    function: Any = component.__init__ if isinstance(component, type) else component  # type: ignore[misc]
    while isinstance(function, partial):
        function = function.func
    try:
        # What it returns may be imported for type checkers alone
        annotations = {k: v for k, v in function.__annotations__.items() if k != "return"}
        names = {"__annotations__": annotations, "__module__": function.__module__}
        return get_type_hints(type("Parameters", (), names), include_extras=True)
    except Exception:  # annotations can be anything
        return {}
