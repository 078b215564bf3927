"""The ``tune-vl`` command."""

import argparse
import os
import sys
from collections.abc import Sequence

from torchtune_vl.cli import estimate, export, files, merge, run, validate, validate_config
from torchtune_vl.files._printable import shown

# Each has `add_parser`, which sets the function to run; what takes long to import it imports there
_SUBCOMMANDS = (files, run, validate_config, estimate, validate, merge, export)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status.

    Args:
        arguments: in place of those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="tune-vl", description="Fine-tune Qwen-VL with torchtune, and check that it is it."
    )
    subparsers = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
    for subcommand in _SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    options = parser.parse_args(arguments)
    sys.exit(_run(options))


def _run(options: argparse.Namespace) -> int:
    """Run a command; what its user can mend ends it with one sentence and status 2."""
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        from torchtune_vl.recipes._main import sentence_of

        # What a recipe calls can be anything, what other commands call has arguments of users
        sentence = sentence_of(error) or ("" if options.command == "run" else shown(str(error)))
        if not sentence or os.environ.get("TORCHTUNE_VL_TRACEBACK") == "1":
            raise
        print(f"tune-vl {options.command}: {sentence}", file=sys.stderr)
        return 2
    return status
