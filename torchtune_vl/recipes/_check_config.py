"""Reads configs, and checks their keys, values and components against what they may be."""

import argparse
import difflib
import inspect
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from functools import partial, reduce
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchtune_vl.recipes import config_path
from torchtune_vl.recipes._config_keys import SOURCE_KEYS, Component, Config, Given, Kind, keys_of

_COMPONENT = "_component_"
# Keys that no recipe of torchtune has
_OURS_ALONE = {"rows", "rows_per_step", "activation_checkpointing"}


def read_config(arguments: Sequence[str], description: type = Config) -> DictConfig:
    """Read the config that a recipe's command line names, and check it but for its components.

    Overrides behind it are ``key=value``; ``key=path`` of another component for a key with one,
    which leaves its arguments; and ``~key`` to take a key out. Absent keys get the defaults of
    ``description``, and ``dataset_val`` is completed from ``dataset``. Raises ``OSError`` if the
    file cannot be opened, and ``ValueError`` with all errors if it is no such config.
    """
    parser = argparse.ArgumentParser(prog="tune-vl run", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="CONFIG")
    known, overrides = parser.parse_known_args(arguments)
    lead = f"{known.config}: "
    content = read_file(config_path(known.config))
    try:
        config = _override(content, overrides)
        train, val = config.get("dataset"), config.get("dataset_val")
        if all(isinstance(x, DictConfig) for x in (train, val)) and _COMPONENT not in val:
            config.dataset_val = OmegaConf.merge(train, val)
            if "augmentation" not in val:  # of training alone
                config.dataset_val.pop("augmentation", None)
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(lead + _first_line(error)) from error
    keys = {key.name: key for key in keys_of(description)}
    # torchtune's recipes that train all have this key; a config of ours may be no more than begun
    if "resume_from_checkpoint" in {*values} - {*keys} and not is_ours(values):
        what = "a config of torchtune's recipes, and no config of the recipe finetune"
        raise ValueError(f"{known.config} is {what}: see `tune-vl ls`")
    # A key that others refer to needs no other use
    referred = re.findall(r"\$\{(\w+)", OmegaConf.to_yaml(config))
    flat = _flat(values, keys)
    unknown = [name for name in flat if name not in keys and name not in referred]
    wrong = [f"{name} is no key of this recipe{_nearest(name, keys)}" for name in unknown]
    for name, key in keys.items():
        if name in flat:
            wrong += _wrong_value(name, flat[name], key.kind)
        elif key.default is MISSING:
            wrong.append(f"{name} is missing: {key.meaning}")
    of_val = val if isinstance(val, ListConfig) else [val]
    if any(isinstance(x, DictConfig) and x.get("augmentation") is not None for x in of_val):
        wrong.append("dataset_val.augmentation: validation never augments, take it out")
    _raise_all(lead, wrong)
    for name in [name for name in keys if name not in flat]:
        OmegaConf.update(config, name, keys[name].default)
    return config


def _flat(values: Mapping[Any, Any], keys: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """The values of keys by their names with dots."""
    flat = {f"{prefix}{name}": value for name, value in values.items()}
    for name, value in [*flat.items()]:
        if isinstance(value, dict) and any(key.startswith(f"{name}.") for key in keys):
            flat |= _flat(value, keys, f"{name}.")
    return flat


def is_ours(keys: Iterable[Any]) -> bool:
    """Whether keys are those of a config for our recipe, and none of torchtune's."""
    return not _OURS_ALONE.isdisjoint(keys)


def check_components(config: DictConfig, description: type | None = Config) -> None:
    """Import the components of a config, and check that they take the arguments beside them.

    Without a ``description``, for a recipe of torchtune, arguments that are missing and types are
    not checked. Raises ``ValueError`` with all that is wrong.
    """
    if str(Path.cwd()) not in sys.path:  # components of the user's own
        sys.path.append(str(Path.cwd()))
    try:
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:  # read_config has resolved those of our recipe
        raise ValueError(_first_line(error)) from error
    given: dict[str, Given | None] = dict.fromkeys(values)
    if description is not None:
        given = {key.name: key.given for key in keys_of(description)}
    wrong: list[str] = []
    for name, value in _flat(values, given).items():
        if name in given and isinstance(value, dict) and _COMPONENT in value:
            wrong += _wrong_component(value, given[name], name)
        elif name in given and isinstance(value, list):
            for number, entry in enumerate(value):
                wrong += _wrong_source(entry, given[name], f"{name}.{number}")
    _raise_all("", wrong)


def _raise_all(lead: str, wrong: Sequence[str]) -> None:
    if len(wrong) > 1:
        lead += f"{len(wrong)} keys of the config are wrong\n  "
    if wrong:
        raise ValueError(lead + "\n  ".join(wrong))


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error).split("\n")[0]


def read_file(path: Path) -> DictConfig:
    """Read any config as it is, or raise ``OSError``, or ``ValueError`` if it is no YAML of one."""
    try:
        content = OmegaConf.load(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason}") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {_first_line(error)}") from error
    if not content or not isinstance(content, DictConfig):
        raise ValueError(f"{path} has no keys at its top: it is no config")
    return content


def _override(config: DictConfig, overrides: Sequence[str]) -> Any:
    """Apply what the command line says, of which removals come first."""
    content: Any = OmegaConf.to_container(config)
    assignments = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if override.startswith("~"):
            *parents, last = key[1:].split(".")
            try:
                parent = reduce(_entry, parents, content)
                _entry(parent, last)
                del parent[int(last) if isinstance(parent, list) else last]
            except (LookupError, TypeError, ValueError) as error:
                raise ValueError(f"{key} takes out a key that the config does not have") from error
        elif equals and not key.startswith("-"):
            value = "null" if value == "None" else value
            if value != "null" and kind_of(Component).fits(content.get(key)):
                key = f"{key}.{_COMPONENT}"
            assignments.append((key, value))
        else:
            raise ValueError(f"{override!r} is no override: write key=value, ~key to take it out")
    if added := [key for key, _ in assignments if key.startswith("+")]:
        raise ValueError(f"{added[0]} is no key: leave out the +, which no key needs")
    changed = OmegaConf.create(content)
    for key, value in assignments:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
        try:
            OmegaConf.update(changed, key, parsed["value"])
        except (LookupError, TypeError) as error:  # OmegaConf's own, of an entry of a list
            raise ValueError(f"{key} names no entry of its list") from error
    return changed


def _entry(node: Any, name: str) -> Any:
    return node[int(name)] if isinstance(node, list) else node[name]


def _wrong_value(name: str, value: Any, hint: Any) -> Iterator[str]:
    kind = kind_of(hint)
    if not kind.fits(value):
        text = "null" if value is None else repr(value)
        shown = text if len(text) <= 80 else f"{text[:80]} ..."
        yield f"{name} is {shown}, and takes {kind.words}"


def _nearest(name: str, known: Iterable[str]) -> str:
    """Name what may be meant by a name, with dots, that is not known."""
    parent, dot, last = name.rpartition(".")
    siblings = [x.removeprefix(parent + dot) for x in known if x.startswith(parent + dot)]
    near = difflib.get_close_matches(last, siblings, n=1)
    return f"; the nearest is {parent}{dot}{near[0]}" if near else ""


_KINDS = {
    Any: Kind("any value", lambda x: True),
    int: Kind("a whole number", lambda x: type(x) is int),  # True is an int, too
    float: Kind("a number", lambda x: type(x) in (int, float) and math.isfinite(x)),
    list: Kind("a list", lambda x: isinstance(x, list)),
    bool: Kind("True or False", lambda x: isinstance(x, bool)),
    str: Kind("a text", lambda x: isinstance(x, str)),
    Path: Kind("a path", lambda x: isinstance(x, str)),
    types.NoneType: Kind("null", lambda x: x is None),
}
# Of a type that YAML cannot hold, which in a union says nothing of the others
_UNKNOWN = Kind("any value", lambda x: True)


def kind_of(hint: Any) -> Kind:
    """Tell what a type takes."""
    origin, parameters = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        kinds = [kind_of(parameters[0]), *(x for x in parameters[1:] if isinstance(x, Kind))]
        words = "".join(kind.words for kind in kinds)
        return Kind(words, lambda x: all(kind.fits(x) for kind in kinds))
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in map(kind_of, parameters) if kind is not _UNKNOWN]
        words = " or ".join(kind.words for kind in kinds)
        return Kind(words, lambda x: any(kind.fits(x) for kind in kinds)) if kinds else _UNKNOWN
    if origin is Literal:
        *others, last = map(str, parameters)
        words = f"{', '.join(others)} or {last}" if others else last
        return Kind(words, lambda x: any(x == y and type(x) is type(y) for y in parameters))
    if parameters and origin in (tuple, list, Sequence, Iterable):
        items = [kind_of(x) for x in parameters if x is not Ellipsis]
        length = len(items) if origin is tuple and Ellipsis not in parameters else None
        return Kind(
            f"a list of {' and '.join(kind.words for kind in items)}",
            lambda x: (
                isinstance(x, list)
                and length in (None, len(x))
                and all(kind.fits(y) for kind, y in zip(cycle(items), x, strict=False))
            ),
        )
    if is_dataclass(origin) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return Kind("a mapping", lambda x: isinstance(x, dict))
    return _KINDS.get(origin, _UNKNOWN if origin is hint else _KINDS[Any])


def _wrong_source(entry: Any, given: Given | None, name: str) -> Iterator[str]:
    """What is wrong with one of a list of datasets."""
    if not kind_of(Component).fits(entry):
        return  # is a list of something else
    for key in SOURCE_KEYS.keys() & entry.keys():
        yield from _wrong_value(f"{name}.{key}", entry[key], SOURCE_KEYS[key])
    own = {key: value for key, value in entry.items() if key not in SOURCE_KEYS}
    yield from _wrong_component(own, given, name)


def _wrong_component(value: Mapping[str, Any], given: Given | None, name: str) -> Iterator[str]:
    path = str(value[_COMPONENT])
    try:
        component = _find(path)
    except ValueError as error:
        yield f"{name}.{_COMPONENT}: {error}"
        return
    try:
        parameters = [*inspect.signature(component).parameters.values()]
    except ValueError:  # one that is written in C
        return
    positional, keywords = given or Given()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    by_name = {x.name: x for x in parameters[len(positional) :] if x.kind in kinds}
    takes_any = any(x.kind == x.VAR_KEYWORD for x in parameters)
    hints = _hints(component) if given else {}
    for key, argument in value.items():
        if key in keywords:
            yield f"{name}.{key} is set by the recipe itself"
        elif key in by_name:
            yield from _wrong_value(f"{name}.{key}", argument, hints.get(key, Any))
        elif key != _COMPONENT and not takes_any:
            near = _nearest(f"{name}.{key}", (f"{name}.{x}" for x in by_name))
            yield f"{name}.{key} is nothing that {path} takes{near}"
    for key, parameter in by_name.items() if given else ():
        if parameter.default is parameter.empty and key not in {*value, *keywords}:
            yield f"{name}.{key} is missing, which {path} needs"


def _find(path: str) -> Callable[..., Any]:
    """Import what a dotted path names."""
    module, *names = path.split(".")
    found: Any = None
    try:
        found = import_module(module)
        for end, name in enumerate(names, 1):
            if isinstance(found, types.ModuleType) and not hasattr(found, name):
                import_module(".".join([module, *names[:end]]))
            found = getattr(found, name)
    except (ImportError, AttributeError, ValueError) as error:
        near = _nearest(path.split(".")[-1], () if found is None else dir(found))
        raise ValueError(f"{path!r} cannot be imported{near} ({error})") from error
    if not callable(found):
        raise ValueError(f"{path!r} cannot be called")
    return found


def _hints(component: Callable[..., Any]) -> dict[str, Any]:
    """The types of a component's parameters, as far as they can be told."""
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
