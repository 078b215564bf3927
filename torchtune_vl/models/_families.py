"""Which family a checkpoint is of: the one place that knows."""

from importlib import import_module
from pathlib import Path

from torchtune_vl.models._config import read_config
from torchtune_vl.models._family import Family

# From a config.json's model_type to the package of the family, which has a FAMILY
_FAMILIES = {
    "qwen2_5_vl": "torchtune_vl.models.qwen2_5_vl",
    "qwen2_vl": "torchtune_vl.models.qwen2_vl",
}


def family_of(directory: str | Path) -> Family:
    """Find the family of a checkpoint.

    Args:
        directory: has a ``config.json``.

    Returns:
        The family.

    Raises:
        ValueError: if there is no such file, or it is of a model that is not known here.
    """
    config = read_config(directory)
    model_type = config.content.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        known = " or ".join(repr(name) for name in _FAMILIES)
        raise config.over({"model_type": None}).error(
            "model_type", f"{known}: this is a checkpoint of another model"
        )
    return _import(model_type)


def families() -> list[Family]:
    """Return all families, in the order in which they came to be."""
    return [_import(model_type) for model_type in _FAMILIES]


def _import(model_type: str) -> Family:
    family: Family = import_module(f"{_FAMILIES[model_type]}._family").FAMILY
    return family
