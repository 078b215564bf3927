"""The ``tune-vl`` command."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torchtune_vl.cli import checkpoints, configs, run, validate


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, that of the process by default, and exit with its status."""
    parser = argparse.ArgumentParser(
        prog="tune-vl", description="Fine-tune Qwen-VL with torchtune, and check that it is it."
    )
    subparsers = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )

    def add(
        name: str,
        run: Callable,
        purpose: str,
        examples: str = "",
        description: str = "",
        **how: Any,
    ) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            name,
            help=purpose,
            description=description or f"{purpose.capitalize()}.",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # as they are written
            **how,
        )
        command.set_defaults(run=run)
        return command

    # Each command has the function to run, which imports what takes long
    for module in (configs, run, validate, checkpoints):
        module.add_commands(add)
    options = parser.parse_args(arguments)
    from torchtune_vl.recipes._launch import ended

    sys.exit(ended(options.command, partial(options.run, options)))
