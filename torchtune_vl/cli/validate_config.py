"""``tune-vl validate-config``: whether a config fits its recipe."""

import argparse
from typing import Any

from torchtune_vl.cli._torchtune import check_config, output_of_tune, suffix_of
from torchtune_vl.recipes import config_path

_DESCRIPTION = """\
Check the keys and values of a config, that its components exist, and that they take the arguments
beside them. A config for a recipe of torchtune has its components checked."""

_EXAMPLES = """\
examples:
  tune-vl validate-config --config mine.yaml
  tune-vl validate-config qwen2_5_vl/stock_lora
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand.

    Args:
        subparsers: the action of :meth:`argparse.ArgumentParser.add_subparsers`.
    """
    parser = subparsers.add_parser(
        "validate-config",
        help="check that a config fits its recipe",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config = parser.add_mutually_exclusive_group(required=True)
    config.add_argument("file", nargs="?", metavar="CONFIG", help="name, see `tune-vl ls`, or file")
    config.add_argument("--config", metavar="CONFIG", help="the same")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check a config.

    Args:
        options: of the command line.

    Returns:
        The exit status.

    Raises:
        ValueError: if it does not fit.
    """
    from torchtune_vl.recipes._read_config import KEYS_OF_OURS, check_components, read_config

    name = options.config or options.file
    content = _content(name)
    if KEYS_OF_OURS & {*content}:
        check_components(read_config(["--config", name]))
    else:
        check_config(content)
    print(f"{name} fits its recipe")
    return 0


def _content(name: str) -> Any:
    """Read a config, one of torchtune's too."""
    from omegaconf import OmegaConf

    from torchtune_vl.recipes._read_config import read_file

    path = config_path(name)
    if path.exists():
        return OmegaConf.create(read_file(path))
    if suffix_of(name) != ".yaml":
        raise ValueError(f"no config and no file is called {name!r}: see `tune-vl ls --all`")
    return OmegaConf.create(output_of_tune("cat", name))
