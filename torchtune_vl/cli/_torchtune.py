"""torchtune's own commands, over its recipes and ours: ``ls``, ``cp``, ``cat``, ``run``.

Its ``validate`` is here ``validate-config``: ``validate`` compares a checkpoint with transformers.
"""

import argparse
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn


class _Command(NamedTuple):
    of_torchtune: str
    help: str
    examples: str


_COMMANDS = {
    "ls": _Command(
        "ls",
        "list the recipes and their configs, torchtune's too",
        """\
example:
  tune-vl ls
""",
    ),
    "cp": _Command(
        "cp",
        "copy a recipe or a config, to change it",
        """\
examples:
  tune-vl cp qwen2_5_vl/3B_lora mine.yaml
  tune-vl cp finetune .
""",
    ),
    "cat": _Command(
        "cat",
        "print a config",
        """\
examples:
  tune-vl cat qwen2_5_vl/3B_lora
  tune-vl cat mine.yaml --sort
""",
    ),
    "run": _Command(
        "run",
        "run a recipe, on one device or on many",
        """\
examples:
  tune-vl run finetune --config qwen2_5_vl/3B_lora dataset.data_files=train.jsonl
  tune-vl run --nproc_per_node 8 finetune --config mine.yaml optimizer.lr=2e-5
  tune-vl run full_finetune_single_device --config stock.yaml
""",
    ),
    "validate-config": _Command(
        "validate",
        "check that the components of a config exist and take its arguments",
        """\
example:
  tune-vl validate-config mine.yaml
""",
    ),
}


def add_parsers(subparsers: Any) -> None:
    """Add the subcommands.

    Args:
        subparsers: the action of :meth:`argparse.ArgumentParser.add_subparsers`.
    """
    for name, command in _COMMANDS.items():
        # No character makes an option here: options are for torchtune's parser, which takes
        # seconds to import
        parser = subparsers.add_parser(name, help=command.help, add_help=False, prefix_chars="\0")
        parser.add_argument("arguments", nargs=argparse.REMAINDER)
        parser.set_defaults(run=partial(_run, name))


def _run(name: str, options: argparse.Namespace) -> int:
    if name == "run":
        _check_config(options.arguments)
    if name == "validate-config" and len(options.arguments) == 1:
        _check_components(options.arguments[0])
    # torchao tells of C++ extensions that it does not load
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchtune._cli.cat import Cat
    from torchtune._cli.cp import Copy
    from torchtune._cli.ls import List
    from torchtune._cli.run import Run
    from torchtune._cli.validate import Validate

    from torchtune_vl.recipes import register_recipes

    register_recipes()
    # Its run command counts them to tell whether torchrun is asked for
    sys.argv = ["tune-vl", name, *options.arguments]
    parser = _Parser(prog="tune-vl")
    subparsers = parser.add_subparsers()
    for command in (List, Copy, Cat, Run, Validate):
        command.create(subparsers)
    command = _COMMANDS[name]
    subparsers.choices[command.of_torchtune].epilog = command.examples
    parsed = parser.parse_args([command.of_torchtune, *options.arguments])
    if command.of_torchtune == "run":
        _check_files(subparsers.choices["run"], parsed)
        _check_processes(subparsers.choices["run"], parsed.nproc_per_node)
        return _run_recipe(partial(parsed.func, parsed))
    parsed.func(parsed)
    return 0


def _check_config(arguments: Sequence[str]) -> None:
    """Read the config of our recipe, before torchtune is imported, which takes seconds."""
    if "--config" not in arguments[:-1]:
        return  # torchtune's parser knows whether one is needed
    before = [*arguments[: arguments.index("--config")]]
    while before and ("=" in before[-1] or before[-1].startswith("~")):
        before.pop()
    if before and before[-1] == "finetune":
        from torchtune_vl.recipes._read_config import read_config

        read_config(arguments[len(before) :])


def _check_components(path: str) -> None:
    """Check a config of our recipe by its description, and not only what its components take."""
    from omegaconf import OmegaConf

    from torchtune_vl.recipes._read_config import check_components, read_config

    if Path(path).is_file() and {"rows", "rows_per_step"} <= {*OmegaConf.load(path)}:
        check_components(read_config(["--config", path]))


def _run_recipe(run: Callable[[], None]) -> int:
    """Run a recipe, and return its exit status where it has several processes, too."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # What ended a process it has told itself. Each of these loggers has a level of its own
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run()
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        by = signal.Signals(-failure.exitcode).name
        print(f"tune-vl run: process {rank} was ended by {by}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


def _check_files(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse names of nothing, which would end in a traceback of the recipe."""
    from torchtune._recipe_registry import get_all_recipes

    recipes = get_all_recipes()
    names = {recipe.name for recipe in recipes}
    if options.recipe not in names and not Path(options.recipe).with_suffix(".py").is_file():
        parser.error(f"no recipe and no file is called {options.recipe!r}: see `tune-vl ls`")
    arguments: Sequence[str] = options.recipe_args
    if "--config" not in arguments[:-1]:
        parser.error("a config is needed: --config NAME, see `tune-vl ls`, or --config FILE")
    config = arguments[arguments.index("--config") + 1]
    configs = {known.name for recipe in recipes for known in recipe.configs}
    if config not in configs and not Path(config).is_file():
        parser.error(f"no config and no file is called {config!r}: see `tune-vl ls`")


def _check_processes(parser: argparse.ArgumentParser, number: str) -> None:
    """Refuse numbers that torchrun answers with a traceback; it knows some words, too."""
    if not (number.isdigit() and int(number) > 0) and number not in ("auto", "cpu", "gpu", "xpu"):
        parser.error(f"--nproc_per_node is {number!r}: give the number of processes")


class _Parser(argparse.ArgumentParser):
    """Says ``tune-vl`` where torchtune says ``tune``."""

    def format_help(self) -> str:
        return _renamed(super().format_help())

    def format_usage(self) -> str:
        return _renamed(super().format_usage())

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, _renamed(f"{self.prog}: error: {message}\n"))


def _renamed(text: str) -> str:
    text = re.sub(r"\btune validate\b", "tune-vl validate-config", text)
    return re.sub(r"\btune (?=(ls|cp|cat|run)\b)", "tune-vl ", text)
