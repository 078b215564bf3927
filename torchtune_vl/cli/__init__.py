"""The ``tune-vl`` command."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from torchtune_vl.cli import checkpoints, configs, run, validate


class _Parser(argparse.ArgumentParser):
    """Of this command and its subcommands: descriptions and examples are shown as written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, that of the process by default, and exit with its status."""
    parser = _Parser(
        prog="tune-vl", description="Fine-tune Qwen-VL with torchtune, and check that it is it."
    )
    subparsers = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
    # Each parser has the function to run, which imports what takes long
    for module in (configs, run, validate, checkpoints):
        module.add_parsers(subparsers)
    options = parser.parse_args(arguments)
    from torchtune_vl.recipes._run_recipe import ended

    sys.exit(ended(options.command, partial(options.run, options)))
