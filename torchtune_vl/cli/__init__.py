"""The ``tune-vl`` command."""

import argparse
import sys
from collections.abc import Sequence

from torchtune_vl.cli import _torchtune, estimate, export, merge, validate

# Each has `add_parser`, which sets the function to run; what takes long to import it imports there
_SUBCOMMANDS = (estimate, validate, merge, export)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status.

    Args:
        arguments: in place of those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="tune-vl", description="Fine-tune Qwen2.5-VL with torchtune, and check that it is it."
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _torchtune.add_parsers(subparsers)
    for subcommand in _SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    options = parser.parse_args(arguments)
    sys.exit(options.run(options))
