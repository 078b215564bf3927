"""``tune-vl estimate``: the memory that a config takes."""

import argparse
from typing import Any

_DESCRIPTION = """\
Compute how much memory a config of the recipe finetune takes on each device. Nothing is trained or
measured, and no device is needed: of the checkpoint it reads config.json alone."""

_EXAMPLES = """\
examples:
  tune-vl estimate --config qwen2_5_vl/full --devices 8
  tune-vl estimate --config mine.yaml checkpoint_dir=Qwen2.5-VL-3B-Instruct rows.max_tokens=8192
"""

_GB = 1e9


def add_parser(subparsers: Any) -> None:
    """Add the subcommand.

    Args:
        subparsers: the action of :meth:`argparse.ArgumentParser.add_subparsers`.
    """
    parser = subparsers.add_parser(
        "estimate",
        help="compute the memory that a config takes",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, metavar="CONFIG", help="name, see `tune-vl ls`, or file"
    )
    parser.add_argument(
        "--devices",
        type=_positive,
        default=1,
        metavar="N",
        help="GPUs, over all nodes (default: 1)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="in place of what the config says"
    )
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


_positive.__name__ = "number of devices"  # as argparse says it


def run(options: argparse.Namespace) -> int:
    """Estimate.

    Args:
        options: of the command line.

    Returns:
        The exit status.

    Raises:
        ValueError: if it cannot be done.
    """
    from torchtune_vl.recipes._read_config import check_components, read_config

    config = read_config(["--config", options.config, *options.overrides])
    check_components(config)
    from torchtune_vl.training._memory import estimate_memory

    memory = estimate_memory(config, options.devices)
    print(f"GB on each of {options.devices} devices, computed, not measured")
    for purpose, size in {**memory, "all": sum(memory.values())}.items():
        print(f"{purpose:<16}{size / _GB:8.1f}")
    return 0
