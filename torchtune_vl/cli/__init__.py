"""The ``tune-vl`` command."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torchtune_vl.cli import (
    chat,
    check,
    checkpoints,
    configs,
    evaluate,
    generate,
    prepare,
    preview,
    run,
    validate,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, that of the process by default, and exit with its status."""
    purpose = "Fine-tune Qwen-VL with torchtune, and check that it is it."
    parser = argparse.ArgumentParser(prog="tune-vl", description=purpose)
    menu = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")

    def add(
        name: str, run: Callable, purpose: str, examples: str = "", about: str = "", **how: Any
    ) -> argparse.ArgumentParser:
        about = about or f"{purpose.capitalize()}."
        how |= {"help": purpose, "description": about, "epilog": f"examples:\n{examples}"}
        raw = argparse.RawDescriptionHelpFormatter  # as they are written
        command = menu.add_parser(name, formatter_class=raw, **how)
        command.set_defaults(run=run)
        return command

    # Each command has the function to run, which imports what takes long
    for module in (
        configs,
        run,
        check,
        preview,
        prepare,
        validate,
        generate,
        chat,
        evaluate,
        checkpoints,
    ):
        module.add_commands(add)
    options, more = parser.parse_known_args(arguments)
    several = getattr(options, "several", "")
    if more and (not several or any(argument.startswith("-") for argument in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # argparse takes those together only that stand together
        vars(options)[several].extend(more)
    from torchtune_vl.recipes._launch import ended

    sys.exit(ended(options.command, partial(options.run, options)))
