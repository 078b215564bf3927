"""Recipes, one file each, and their configs; those of torchtune stand beside ours."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).parent
# Ready configs for recipes of torchtune, by the names of their files
_STOCK = {"stock_full": "full_finetune_single_device", "stock_lora": "lora_finetune_single_device"}


@cache
def _files(folder: str, suffix: str) -> dict[str, Path]:
    """The files of torchtune and of this package by their names."""
    spec = find_spec("torchtune")  # which takes seconds to import
    roots = [Path(spec.origin).parents[1] / "recipes"] if spec and spec.origin else []
    return {
        str(path.relative_to(root / folder).with_suffix("")): path
        for root in (*roots, _ROOT)
        for path in (root / folder).rglob(f"[!_]*{suffix}")
    }


def recipe_path(name: str) -> Path | None:
    """Find the file of a recipe, such as ``finetune``, or torchtune's; None if there is none."""
    return _files("", ".py").get(name)


def is_of_torchtune(recipe: Path) -> bool:
    """Whether a file of a recipe came with torchtune."""
    return not recipe.is_relative_to(_ROOT)


def config_path(name: str) -> Path:
    """Find the file of a config by its name, ours or torchtune's, or path; or raise ValueError."""
    path = _files("configs", ".yaml").get(name, Path(name))
    if not path.exists():
        raise ValueError(f"no config and no file is called {name!r}: see `tune-vl ls --all`")
    return path


def config_names() -> dict[str, list[str]]:
    """List the names of this package's configs by the recipe they are for, ours or torchtune's."""
    names: dict[str, list[str]] = {recipe: [] for recipe in ("finetune", *_STOCK.values())}
    for path in sorted(_ROOT.glob("configs/*/*.yaml")):
        recipe = _STOCK.get(path.stem, "finetune")
        names[recipe].append(f"{path.parent.name}/{path.stem}")
    return names
