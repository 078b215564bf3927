"""Recipes, one file each, and their configs."""

from pathlib import Path

_ROOT = Path(__file__).parent
_CONFIGS = _ROOT / "configs"


def config_path(name: str) -> Path:
    """Find a config.

    Args:
        name: of a config of this package, such as ``qwen2_5_vl/3B_lora``, or a file's path.

    Returns:
        The path of its file.
    """
    built_in = _CONFIGS / f"{name}.yaml"
    return built_in if built_in.is_file() else Path(name)


def register_recipes() -> None:
    """Make torchtune's commands know the recipes and configs of this package, beside its own.

    They read one list and join its paths to folders of theirs, which an absolute path replaces.
    """
    from torchtune._recipe_registry import Config, Recipe, get_all_recipes

    finetune = Recipe(
        name="finetune",
        file_path=str(_ROOT / "finetune.py"),
        configs=[
            Config(name=str(path.relative_to(_CONFIGS).with_suffix("")), file_path=str(path))
            for path in sorted(_CONFIGS.glob("*/*.yaml"))
        ],
        supports_distributed=True,
    )
    recipes = get_all_recipes()
    if finetune not in recipes:
        recipes.insert(0, finetune)
