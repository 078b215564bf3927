"""Recipes, one file each, and their configs."""

from pathlib import Path

_ROOT = Path(__file__).parent
_CONFIGS = _ROOT / "configs"
_RECIPES = {"finetune": _ROOT / "finetune.py"}
# Ready configs for recipes of torchtune, by the names of their files
_FOR_TORCHTUNE = {
    "stock_full": "full_finetune_single_device",
    "stock_lora": "lora_finetune_single_device",
}


def recipe_path(name: str) -> Path | None:
    """Find a recipe of this package.

    Args:
        name: such as ``finetune``.

    Returns:
        The path of its file, None if there is none of this name.
    """
    return _RECIPES.get(name)


def config_path(name: str) -> Path:
    """Find a config.

    Args:
        name: of a config of this package, such as ``qwen2_5_vl/lora``, or a file's path.

    Returns:
        The path of its file.
    """
    built_in = _CONFIGS / f"{name}.yaml"
    return built_in if built_in.is_file() else Path(name)


def config_names() -> dict[str, list[str]]:
    """List the configs of this package.

    Returns:
        The names of the configs by that of the recipe that they are for: one of ours, or one of
        torchtune's.
    """
    names: dict[str, list[str]] = {recipe: [] for recipe in (*_RECIPES, *_FOR_TORCHTUNE.values())}
    for path in sorted(_CONFIGS.glob("*/*.yaml")):
        recipe = _FOR_TORCHTUNE.get(path.stem, "finetune")
        names[recipe].append(str(path.relative_to(_CONFIGS).with_suffix("")))
    return names
