"""What commands about a config's dataset have in common."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the config, its overrides, and which of its datasets is meant."""
    what = "name, see `tune-vl ls`, or file"
    command.add_argument("--config", required=True, metavar="CONFIG", help=what)
    what = "take dataset_val instead of dataset"
    command.add_argument("--validation", action="store_true", help=what)
    what = "in place of what the config says"
    command.add_argument("overrides", nargs="*", metavar="key=value", help=what)
    command.set_defaults(several="overrides")


def read_dataset(options: argparse.Namespace) -> tuple[Any, str, Any, Any]:
    """Make the dataset that :func:`add_arguments` names: config, its key, mixture and transform."""
    from torchtune_vl.recipes._check_config import check_components, read_config

    key = "dataset_val" if options.validation else "dataset"
    config = read_config(["--config", options.config, *options.overrides])
    if config[key] is None:
        raise ValueError(f"{options.config} has no {key}: leave --validation out, or set it")
    check_components(config)
    from torchtune_vl._torchtune import instantiate
    from torchtune_vl.chat import ChatTransform
    from torchtune_vl.recipes._datasets import datasets_of

    transform = instantiate(config.tokenizer)
    if not isinstance(transform, ChatTransform):
        name = config.tokenizer._component_
        raise ValueError(f"the tokenizer {name} is none of torchtune-vl's transforms: use one")
    return config, key, datasets_of(config, key, transform), transform


def check_directory_of(path: Path) -> None:
    """Refuse a file whose directory is not there, before any work is done for it."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}, where {path.name} is to be written, is no directory")
