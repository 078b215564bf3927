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
    """Find the file of a recipe of this package, such as ``finetune``; None if there is none."""
    return _RECIPES.get(name)


def config_path(name: str) -> Path:
    """Find the file of a config: of one of this package, such as ``qwen2_5_vl/lora``, or a path."""
    built_in = _CONFIGS / f"{name}.yaml"
    return built_in if built_in.is_file() else Path(name)


def config_names() -> dict[str, list[str]]:
    """List the names of this package's configs by the recipe they are for, ours or torchtune's."""
    names: dict[str, list[str]] = {recipe: [] for recipe in (*_RECIPES, *_FOR_TORCHTUNE.values())}
    for path in sorted(_CONFIGS.glob("*/*.yaml")):
        recipe = _FOR_TORCHTUNE.get(path.stem, "finetune")
        names[recipe].append(str(path.relative_to(_CONFIGS).with_suffix("")))
    return names
