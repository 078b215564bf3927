"""``tune-vl ls``, ``cp`` and ``cat``: the files of recipes and configs."""

import argparse
import os
import shutil
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torchtune_vl.cli._torchtune_command import config_file, suffix_of, tune
from torchtune_vl.recipes import config_names, config_path, recipe_path


def add_parsers(subparsers: Any) -> None:
    """Add the commands."""
    ls = _add(
        subparsers, _list, "ls", "list recipes and their configs", "tune-vl ls", "tune-vl ls --all"
    )
    ls.add_argument("--all", action="store_true", help="list those of torchtune, too")

    examples = "tune-vl cp qwen2_5_vl/lora mine.yaml", "tune-vl cp finetune ."
    cp = _add(subparsers, _copy, "cp", "copy a recipe or a config, to change it", *examples)
    cp.add_argument("name", metavar="NAME", help="recipe or config, see `tune-vl ls`")
    cp.add_argument(
        "destination",
        type=Path,
        metavar="DESTINATION",
        help="file to write, or directory to write it to; nothing is overwritten",
    )
    cp.add_argument("--make-parents", action="store_true", help="make missing directories")

    examples = "tune-vl cat qwen2_5_vl/lora", "tune-vl cat mine.yaml --sort"
    cat = _add(subparsers, _print, "cat", "print a config", *examples)
    cat.add_argument("config", metavar="CONFIG", help="name, see `tune-vl ls`, or file")
    cat.add_argument(
        "--sort", action="store_true", help="sort the keys; comments are left out then"
    )


def _add(
    subparsers: Any, run: Callable, name: str, purpose: str, *examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=purpose,
        description=f"{purpose.capitalize()}.",
        epilog="\n  ".join(["examples:", *examples]),
    )
    parser.set_defaults(run=run)
    return parser


def _list(options: argparse.Namespace) -> int:
    print(f"{'RECIPE':<40} CONFIG")
    for recipe, configs in config_names().items():
        for name, config in zip_longest([recipe], configs, fillvalue=""):
            print(f"{name:<40} {config}")
    if options.all:
        print("\nThose of torchtune:")
        tune("ls")
    return 0


def _copy(options: argparse.Namespace) -> int:
    built_in = recipe_path(options.name) or config_path(options.name)
    is_ours = built_in.is_absolute() and built_in.is_file()
    suffix = built_in.suffix if is_ours else suffix_of(options.name)
    if suffix is None:
        raise ValueError(
            f"no recipe and no config is called {options.name!r}: see `tune-vl ls --all`"
        )
    destination: Path = options.destination
    if destination.is_dir():
        destination /= Path(options.name).name
    if destination.suffix != suffix:
        destination = destination.with_name(destination.name + suffix)
    if os.path.lexists(destination):
        raise ValueError(f"{destination} exists: remove it first, or name another file")
    if options.make_parents:
        destination.parent.mkdir(parents=True, exist_ok=True)
    elif not destination.parent.is_dir():
        raise ValueError(f"{destination.parent} is no directory: --make-parents makes it")
    if is_ours:
        shutil.copyfile(built_in, destination)
        print(f"Copied file to {destination}")
    else:
        tune("cp", options.name, str(destination))
    return 0


def _print(options: argparse.Namespace) -> int:
    path = config_file(options.config)
    if path is None or options.sort:
        tune("cat", str(path or options.config), *["--sort"] * options.sort)
    else:
        print(path.read_text(encoding="utf-8"), end="")
    return 0
