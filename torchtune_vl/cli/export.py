"""``tune-vl export``: a checkpoint or an adapter written anew."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from torchtune_vl.cli._output import add_output_arguments, write_output

_DESCRIPTION = """\
Write a checkpoint anew in the published layout, or an adapter in peft's: in another dtype, in files
of another size, or with the published names where a trainer wrote others."""

_EXAMPLES = """\
examples:
  tune-vl export output/epoch_0 exported --dtype bfloat16 --max-shard-size 2GB
  tune-vl export output/epoch_0/adapter exported-adapter --dtype bfloat16
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand.

    Args:
        subparsers: the action of :meth:`argparse.ArgumentParser.add_subparsers`.
    """
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint or an adapter in another dtype or file size",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="directory of a checkpoint or of an adapter")
    add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export.

    Args:
        options: of the command line.

    Returns:
        The exit status.
    """
    from torchtune_vl.training import export

    return write_output(options, partial(export, options.source))
