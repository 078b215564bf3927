"""Which modules peft adapts, by the words of an ``adapter_config.json``."""

import re
from collections.abc import Iterable, Sequence

from torchtune_vl.files._json import JsonObject


def targeted_modules(config: JsonObject, modules: Iterable[str]) -> list[str]:
    """Tell which modules peft adapts.

    Args:
        config: the adapter's config.
        modules: names of the linear layers of transformers' model.

    Returns:
        Those of them that ``target_modules``, ``exclude_modules``, ``modules_to_save``,
        ``layers_to_transform`` and ``layers_pattern`` say together.

    Raises:
        ValueError: if one of these keys has a value that says nothing.
    """
    targets, excluded = _names(config, "target_modules"), _names(config, "exclude_modules")
    in_full = _names(config, "modules_to_save")
    numbers = _layers(config)
    found = [m for m in modules if _is_named(m, targets) and not _is_named(m, excluded)]
    found = [m for m in found if not any(f".{name}." in f".{m}." for name in in_full)]
    if isinstance(targets, str) or not numbers:
        return found
    pattern = _layer_pattern(_names(config, "layers_pattern"))
    return [
        m
        for m in found
        if m in targets or ((layer := pattern.match(m)) and int(layer["number"]) in numbers)
    ]


def _names(config: JsonObject, key: str) -> str | list[str]:
    """A pattern, or names; none if there is nothing."""
    if key not in config:
        return []
    value = config.content[key]
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise config.error(key, f"a regular expression ({error})") from None
        return value
    names = config.each(key)
    return [names.text(place) for place in names.content]


def _layers(config: JsonObject) -> list[int]:
    key = "layers_to_transform"
    if key not in config:
        return []
    if isinstance(config.content[key], int):
        return [config.whole(key, 0)]
    layers = config.each(key)
    return [layers.whole(place, 0) for place in layers.content]


def _layer_pattern(names: str | Sequence[str]) -> re.Pattern[str]:
    """What finds the number of a layer: behind one of these names, or behind any."""
    names = [names] if isinstance(names, str) else names
    before = "|".join(f"(?:{name})" for name in names) or r"[^.]*"
    return re.compile(rf"(?:.*?\.)?(?:{before})\.(?P<number>\d+)\.")


def _is_named(module: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)
