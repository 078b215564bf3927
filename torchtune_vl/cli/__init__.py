"""The ``tune-vl`` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from torchtune_vl._shown import shown
from torchtune_vl.cli import checkpoints, configs, files, run, validate


class _Parser(argparse.ArgumentParser):
    """Of this command and its subcommands: descriptions and examples are shown as written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, that of the process by default, and exit with its status.

    What its user can mend ends it with one sentence and status 2.
    """
    parser = _Parser(
        prog="tune-vl", description="Fine-tune Qwen-VL with torchtune, and check that it is it."
    )
    subparsers = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
    # Each parser has the function to run, which imports what takes long
    for module in (files, run, configs, validate, checkpoints):
        module.add_parsers(subparsers)
    options = parser.parse_args(arguments)
    try:
        sys.exit(options.run(options))
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        from torchtune_vl.recipes._run_recipe import sentence_of

        # What a recipe calls can be anything, what other commands call has arguments of users
        sentence = sentence_of(error) or ("" if options.command == "run" else shown(str(error)))
        if not sentence or os.environ.get("TORCHTUNE_VL_TRACEBACK") == "1":
            raise
        print(f"tune-vl {options.command}: {sentence}", file=sys.stderr)
        sys.exit(2)
