"""``tune-vl run``: a recipe on one device or on many."""

import argparse
import os
import re
import runpy
import sys
import textwrap
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path

from torchtune_vl.cli._torchrun import torchrun
from torchtune_vl.recipes import config_path, is_of_torchtune, recipe_path

_HELP = """\
usage: tune-vl run [OPTION ...] RECIPE --config CONFIG [KEY=VALUE | ~KEY ...]

Run a recipe, on one device or on many.

  RECIPE           name, see `tune-vl ls --all`, or a Python file below this directory
  --config CONFIG  name, see `tune-vl ls --all`, or a file
  KEY=VALUE        sets a key of the config
  ~KEY             takes a key out of the config, in the recipe finetune

options start several processes, by torchrun, whose other options are taken too:
  --nproc_per_node N             processes on this machine, one for each device
  --nnodes N                     machines
  --rdzv_backend c10d            with --nnodes: how the machines find each other
  --rdzv_endpoint HOST:PORT      where they meet

examples:
  tune-vl run finetune --config qwen2_5_vl/lora dataset.data_files=train.jsonl
  tune-vl run --nproc_per_node 8 finetune --config mine.yaml optimizer.lr=2e-5
  tune-vl run full_finetune_single_device --config qwen2_5_vl/stock_full
"""
# What torch's allocator is told, by the name that torch has since 2.9, and by older ones
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# The meanings of keys have these for readers of docs/training.md
_LINK = re.compile(r"\[[^]]+]\(([\w.]*)[^)]*\)")


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    # No character makes an option here: they are for torchrun's parser, which is slow to import
    purpose = "run a recipe, on one device or on many"
    command = add("run", _run, purpose, add_help=False, prefix_chars="\0")
    command.add_argument("arguments", nargs=argparse.REMAINDER)


def _run(options: argparse.Namespace) -> int:
    if {"--help", "-h"} & {*options.arguments}:
        _print_help("finetune" in options.arguments)
        return 0
    _let_segments_grow()
    launcher, recipe, arguments = _split(options.arguments)
    built_in = recipe_path(recipe)
    is_stock = built_in is not None and is_of_torchtune(built_in)
    if built_in and not is_stock:
        from torchtune_vl.recipes._check_config import read_config

        read_config(arguments)  # before anything is imported that takes seconds
    module = f"torchtune_vl.recipes.{recipe}" if built_in else _module_of(recipe)
    position = arguments.index("--config") + 1
    arguments[position] = str(config_path(arguments[position]))
    if launcher:
        if is_stock and "_distributed" not in recipe:  # as all others are called
            raise ValueError(f"{recipe} runs in one process: leave {launcher[0]} out")
        return torchrun("run", launcher, [recipe, *arguments])
    import torchtune_vl._torchao  # noqa: F401 (the recipe may import torchtune first)

    sys.path.append(os.getcwd())
    sys.argv = [recipe, *arguments]
    if is_stock:
        runpy.run_path(str(built_in), run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__")
    return 0


def _let_segments_grow() -> None:
    """Let torch's allocator grow what it has reserved on a GPU, unless its user says how.

    Rows differ in their shapes: what is reserved for one size has no room for another.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def _print_help(has_keys: bool) -> None:
    print(_HELP)
    if not has_keys:
        print("`tune-vl run finetune --help` explains the keys of its config.")
        return
    from torchtune_vl.recipes._check_config import kind_of
    from torchtune_vl.recipes._config_keys import Config, keys_of

    print("keys of the config; those without a default must be there:")
    for key in keys_of(Config):
        default = "null" if key.default is None else key.default
        ending = "" if default is MISSING else f" (default: {default})"
        meaning = _LINK.sub(lambda link: f"docs/{link[1] or 'training.md'}", key.meaning)
        print(f"  {key.name}: {kind_of(key.kind).words}{ending}".replace("`", ""))
        print(textwrap.indent(textwrap.fill(meaning.replace("`", ""), 90), " " * 6))
    print("\nArguments of a component stand beside its _component_: see `tune-vl cat` and docs/.")


def _split(arguments: list[str]) -> tuple[list[str], str, list[str]]:
    """Split into torchrun's options, the recipe, and the recipe's arguments."""
    if "--config" not in arguments[:-1]:
        raise ValueError("a config is needed: --config NAME, see `tune-vl ls`, or --config FILE")
    end = arguments.index("--config")
    while end and ("=" in arguments[end - 1] or arguments[end - 1].startswith("~")):
        end -= 1
    if not end or arguments[end - 1].startswith("-"):
        raise ValueError("a recipe is needed in front of --config: see `tune-vl ls`")
    return arguments[: end - 1], arguments[end - 1], arguments[end:]


def _module_of(recipe: str) -> str:
    """Name the module that a user's file is from here."""
    file = Path(os.path.relpath(recipe)).with_suffix(".py")
    if not file.is_file():
        raise ValueError(f"no recipe and no file is called {recipe!r}: see `tune-vl ls --all`")
    if file.parts[0] == "..":
        raise ValueError(f"{recipe} is not below this directory: change to where it is")
    return ".".join(file.with_suffix("").parts)
