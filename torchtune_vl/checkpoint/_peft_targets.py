"""Which modules peft adapts, by the words of an ``adapter_config.json``."""

import re
from collections.abc import Iterable

from torchtune_vl.files._json import JsonObject


def targeted_modules(config: JsonObject, modules: Iterable[str]) -> list[str]:
    """Tell which linear layers of transformers' model peft adapts.

    They are what ``target_modules``, ``exclude_modules``, ``modules_to_save``,
    ``layers_to_transform`` and ``layers_pattern`` say together. Raises ``ValueError`` if one of
    these keys has a value that says nothing.
    """
    targets, excluded = _patterns(config, "target_modules"), _patterns(config, "exclude_modules")
    in_full = strings(config, "modules_to_save")
    numbers = _layers(config)
    found = [m for m in modules if _is_named(m, targets) and not _is_named(m, excluded)]
    found = [m for m in found if not any(f".{name}." in f".{m}." for name in in_full)]
    if isinstance(targets, str) or not numbers:
        return found
    before = _patterns(config, "layers_pattern")
    before = [before] if isinstance(before, str) else before
    any_of = "|".join(f"(?:{name})" for name in before) or r"[^.]*"
    number = re.compile(rf"(?:.*?\.)?(?:{any_of})\.(?P<number>\d+)\.")
    return [
        m
        for m in found
        if m in targets or ((layer := number.match(m)) and int(layer["number"]) in numbers)
    ]


def strings(config: JsonObject, key: str) -> list[str]:
    """Return a list of strings, empty where there is none."""
    items = config.each(key) if key in config else None
    return [items.text(place) for place in items.content] if items else []


def _patterns(config: JsonObject, key: str) -> str | list[str]:
    """A regular expression, or names."""
    value = config.content.get(key)
    if not isinstance(value, str):
        return strings(config, key)
    try:
        re.compile(value)
    except re.error as error:
        raise config.error(key, f"a regular expression ({error})") from None
    return value


def _layers(config: JsonObject) -> list[int]:
    key = "layers_to_transform"
    if key not in config:
        return []
    if isinstance(config.content[key], int):
        return [config.whole(key, 0)]
    layers = config.each(key)
    return [layers.whole(place, 0) for place in layers.content]


def _is_named(module: str, names: str | list[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)
