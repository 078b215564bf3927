"""``tune-vl merge``: an adapter and its base model to a checkpoint."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from torchtune_vl.cli._output import add_output_arguments, write_output

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


def run(options: argparse.Namespace) -> int:
    """Merge.

    Args:
        options: of the command line.

    Returns:
        The exit status.
    """
    from torchtune_vl.training import merge

    return write_output(options, partial(merge, options.base, options.adapter))
