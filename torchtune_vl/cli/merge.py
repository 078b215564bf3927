"""``tune-vl merge``: an adapter and its base model to a checkpoint."""

import argparse
import sys
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Add an adapter, of torchtune-vl or of peft, to the weights of its base model, and write the
checkpoint that results: in the published layout, which transformers, vLLM and SGLang load."""

_EXAMPLES = """\
example:
  tune-vl merge Qwen2.5-VL-3B-Instruct output/epoch_0/adapter merged --dtype bfloat16
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand.

    Args:
        subparsers: the action of :meth:`argparse.ArgumentParser.add_subparsers`.
    """
    parser = subparsers.add_parser(
        "merge",
        help="merge an adapter into its base model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", type=Path, help="checkpoint directory of the base model")
    parser.add_argument("adapter", type=Path, help="directory with adapter_config.json")
    add_output_arguments(parser)
    parser.set_defaults(run=run)


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


def run(options: argparse.Namespace) -> int:
    """Merge.

    Args:
        options: of the command line.

    Returns:
        The exit status, 2 if it cannot be done.
    """
    import torch

    from torchtune_vl.training import merge

    dtype = options.dtype and getattr(torch, options.dtype)
    try:
        merge(options.base, options.adapter, options.output, dtype, options.max_shard_size)
    except (OSError, ValueError) as error:
        print(f"tune-vl merge: {error}", file=sys.stderr)
        return 2
    print(f"Written to {options.output}")
    return 0
