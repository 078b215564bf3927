"""``tune-vl ls``, ``cp``, ``cat``, ``validate-config`` and ``estimate``: recipes and configs."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torchtune_vl.recipes import config_names, config_path, recipe_path

_CHECK = """\
Check the keys and values of a config, that its components exist, and that they take the arguments
beside them. A config for a recipe of torchtune has its components checked."""
_CHECK_EXAMPLES = """\
  tune-vl validate-config --config mine.yaml rows_per_step=64
  tune-vl validate-config qwen2_5_vl/stock_lora"""
_ESTIMATE = """\
Compute how much memory a config of the recipe finetune takes on each device. Nothing is trained or
measured, and no device is needed: of the checkpoint it reads config.json alone."""
_ESTIMATE_EXAMPLES = """\
  tune-vl estimate --config qwen2_5_vl/full --devices 8
  tune-vl estimate --config mine.yaml checkpoint_dir=Qwen2.5-VL-3B-Instruct"""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add all."""
    config: Any = {"metavar": "CONFIG", "help": "name, see `tune-vl ls`, or file"}
    overrides: Any = {"metavar": "key=value", "help": "in place of what the config says"}

    examples = "  tune-vl ls\n  tune-vl ls --all"
    argument = add("ls", _list, "list recipes and their configs", examples).add_argument
    argument("--all", action="store_true", help="list those of torchtune, too")

    examples = "  tune-vl cp qwen2_5_vl/lora mine.yaml\n  tune-vl cp finetune ."
    argument = add("cp", _copy, "copy a recipe or a config, to change it", examples).add_argument
    argument("name", metavar="NAME", help="recipe or config, see `tune-vl ls`")
    what = "file to write, or directory to write it to; nothing is overwritten"
    argument("destination", type=Path, metavar="DESTINATION", help=what)
    argument("--make-parents", action="store_true", help="make missing directories")

    examples = "  tune-vl cat qwen2_5_vl/lora\n  tune-vl cat mine.yaml --sort"
    argument = add("cat", _print, "print a config", examples).add_argument
    argument("config", **config)
    argument("--sort", action="store_true", help="sort the keys; comments are left out then")

    purpose = "check that a config fits its recipe"
    check = add("validate-config", _validate, purpose, _CHECK_EXAMPLES, _CHECK)
    argument = check.add_argument
    argument("file", nargs="?", **config)
    argument("--config", metavar="CONFIG", help="the same")
    argument("overrides", nargs="*", **overrides)
    check.set_defaults(several="overrides")

    purpose = "compute the memory that a config takes"
    estimate = add("estimate", _estimate, purpose, _ESTIMATE_EXAMPLES, _ESTIMATE)
    argument = estimate.add_argument
    argument("--config", required=True, **config)
    argument("--devices", type=int, default=1, metavar="N", help="GPUs of all nodes (default: 1)")
    argument("overrides", nargs="*", **overrides)
    estimate.set_defaults(several="overrides")


def _list(options: argparse.Namespace) -> int:
    print(f"{'RECIPE':<40} CONFIG")
    for recipe, configs in config_names().items():
        for name, config in zip_longest([recipe], configs, fillvalue=""):
            print(f"{name:<40} {config}")
    if options.all:
        import torchtune_vl._torchao  # noqa: F401 (or torchtune would not import)

        print("\nThose of torchtune:", flush=True)
        # Its command, found as what was installed, so no module behind it is named here
        (tune,) = distribution("torchtune").entry_points.select(name="tune")
        sys.argv = ["tune", "ls"]
        tune.load()()
    return 0


def _copy(options: argparse.Namespace) -> int:
    source = recipe_path(options.name) or config_path(options.name)
    destination: Path = options.destination
    if destination.is_dir():
        destination /= source.name
    if destination.suffix != source.suffix:
        destination = destination.with_name(destination.name + source.suffix)
    if os.path.lexists(destination):
        raise ValueError(f"{destination} exists: remove it first, or name another file")
    if options.make_parents:
        destination.parent.mkdir(parents=True, exist_ok=True)
    elif not destination.parent.is_dir():
        raise ValueError(f"{destination.parent} is no directory: --make-parents makes it")
    shutil.copyfile(source, destination)
    print(f"Copied file to {destination}")
    return 0


def _print(options: argparse.Namespace) -> int:
    path = config_path(options.config)
    if options.sort:
        from omegaconf import OmegaConf

        from torchtune_vl.recipes._check_config import read_file

        print(OmegaConf.to_yaml(read_file(path), sort_keys=True), end="")
    else:
        print(path.read_text(encoding="utf-8"), end="")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from torchtune_vl.recipes._check_config import check_components, is_ours, read_config, read_file

    words = [word for word in (options.config, options.file) if word is not None]
    name, *overrides = [*words, *options.overrides] or [None]
    if name is None or not all("=" in word for word in overrides):
        raise ValueError("name a config, and only one")
    content = read_file(config_path(name))
    if is_ours(content):
        check_components(read_config(["--config", name, *overrides]))
    elif overrides:
        raise ValueError(f"{name} is for a recipe of torchtune: write {overrides[0]} into a copy")
    else:
        check_components(content, None)
    print(f"{name} fits its recipe")
    return 0


def _estimate(options: argparse.Namespace) -> int:
    from torchtune_vl.recipes._check_config import check_components, read_config

    if options.devices < 1:
        raise ValueError(f"--devices is {options.devices}: give the number of GPUs")
    config = read_config(["--config", options.config, *options.overrides])
    check_components(config)
    from torchtune_vl.training._memory import estimate_memory

    memory = estimate_memory(config, options.devices)
    where = "the device" if options.devices == 1 else f"each of {options.devices} devices"
    print(f"GB on {where}, computed, not measured")
    for purpose, size in {**memory, "all": sum(memory.values())}.items():
        print(f"{purpose:<16}{size / 1e9:8.1f}")
    return 0
