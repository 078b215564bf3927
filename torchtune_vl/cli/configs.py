"""``tune-vl validate-config`` and ``estimate``: what is wrong with a config, and what it takes."""

import argparse
from typing import Any

from torchtune_vl.cli._torchtune_command import config_file, output_of_tune

_VALIDATE = """\
Check the keys and values of a config, that its components exist, and that they take the arguments
beside them. A config for a recipe of torchtune has its components checked."""

_VALIDATE_EXAMPLES = """\
examples:
  tune-vl validate-config --config mine.yaml
  tune-vl validate-config qwen2_5_vl/stock_lora
"""

_ESTIMATE = """\
Compute how much memory a config of the recipe finetune takes on each device. Nothing is trained or
measured, and no device is needed: of the checkpoint it reads config.json alone."""

_ESTIMATE_EXAMPLES = """\
examples:
  tune-vl estimate --config qwen2_5_vl/full --devices 8
  tune-vl estimate --config mine.yaml checkpoint_dir=Qwen2.5-VL-3B-Instruct rows.max_tokens=8192
"""


def add_parsers(subparsers: Any) -> None:
    """Add both commands."""
    named = {"metavar": "CONFIG", "help": "name, see `tune-vl ls`, or file"}
    purpose = "check that a config fits its recipe"
    validate = subparsers.add_parser(
        "validate-config", help=purpose, description=_VALIDATE, epilog=_VALIDATE_EXAMPLES
    )
    config = validate.add_mutually_exclusive_group(required=True)
    config.add_argument("file", nargs="?", **named)
    config.add_argument("--config", metavar="CONFIG", help="the same")
    validate.set_defaults(run=_validate)

    purpose = "compute the memory that a config takes"
    estimate = subparsers.add_parser(
        "estimate", help=purpose, description=_ESTIMATE, epilog=_ESTIMATE_EXAMPLES
    )
    estimate.add_argument("--config", required=True, **named)
    estimate.add_argument(
        "--devices", type=int, default=1, metavar="N", help="GPUs, over all nodes (default: 1)"
    )
    estimate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="in place of what the config says"
    )
    estimate.set_defaults(run=_estimate)


def _validate(options: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from torchtune_vl.recipes._check_config import check_components, is_ours, read_config, read_file

    name = options.config or options.file
    path = config_file(name)
    content: Any = OmegaConf.create(read_file(path) if path else output_of_tune("cat", name))
    if is_ours(content):
        check_components(read_config(["--config", name]))
    else:
        check_components(content, None)
    print(f"{name} fits its recipe")
    return 0


def _estimate(options: argparse.Namespace) -> int:
    from torchtune_vl.recipes._check_config import check_components, read_config

    if options.devices < 1:
        raise ValueError(f"--devices is {options.devices}: give the number of GPUs")
    config = read_config(["--config", options.config, *options.overrides])
    check_components(config)
    from torchtune_vl.training._memory import estimate_memory

    memory = estimate_memory(config, options.devices)
    print(f"GB on each of {options.devices} devices, computed, not measured")
    for purpose, size in {**memory, "all": sum(memory.values())}.items():
        print(f"{purpose:<16}{size / 1e9:8.1f}")
    return 0
