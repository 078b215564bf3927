"""What commands that write a checkpoint or an adapter have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path

from torchtune_vl.files._printable import shown


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says where and how tensors are written.

    Args:
        parser: of a subcommand.
    """
    parser.add_argument("output", type=Path, help="directory to make")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the tensors (default: as they are)",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="most bytes of tensors in a file, such as 500MB (default: %(default)s)",
    )


def write_output(options: argparse.Namespace, write: Callable[..., None]) -> int:
    """Write, and tell where.

    Args:
        options: of the command line, those of :func:`add_output_arguments` among them.
        write: takes the output's directory, the dtype or None, and the most bytes of a file.

    Returns:
        The exit status.

    Raises:
        OSError: if it cannot be written.
        ValueError: if it cannot be done.
    """
    import torch

    dtype = options.dtype and getattr(torch, options.dtype)
    write(options.output, dtype, options.max_shard_size)
    print(f"Written to {shown(str(options.output))}")
    return 0
