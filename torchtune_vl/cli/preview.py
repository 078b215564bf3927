"""``tune-vl preview``: a page that shows what the model gets."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from torchtune_vl.cli._dataset import add_arguments, check_directory_of, read_dataset
from torchtune_vl.files._printable import shown

_DESCRIPTION = """\
Write one HTML page that shows what a config of the recipe finetune makes of its dataset. Of some
samples: each image as the model gets it, with patches, windows and boxes; each token with its
position and whether it is supervised; the row that it is packed in. Of all samples: how long they
are, what is cut, which are refused; how full rows are, and the steps of an epoch. No weights are
read and no GPU is needed. The page loads nothing from anywhere: it is as private as your data."""
_EXAMPLES = """\
  tune-vl preview --config mine.yaml --output page.html
  tune-vl preview --config mine.yaml --output page.html --indices 3,17
  tune-vl preview --config qwen2_5_vl/lora --output page.html --samples 200 \\
    checkpoint_dir=Qwen2.5-VL-7B-Instruct dataset.data_files=train.jsonl"""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    purpose = "show samples as the model gets them"
    command = add("preview", _run, purpose, _EXAMPLES, _DESCRIPTION)
    argument = command.add_argument
    add_arguments(command)
    argument("--output", required=True, type=Path, metavar="FILE", help="page to write")
    which = command.add_mutually_exclusive_group().add_argument
    what = "how many samples to show, drawn by the config's seed (default: %(default)s)"
    which("--samples", type=_count, default=40, metavar="N", help=what)
    what = "numbers of samples to show instead, from 0, such as 3,17"
    which("--indices", type=_indices, metavar="N,...", help=what)
    what = "speed of training, as its log has it, to estimate the time of an epoch"
    argument("--tokens-per-second", type=_speed, metavar="X", help=what)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _indices(text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 3,17")
    return [int(part) for part in text.split(",")]


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not 0 < speed < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return speed


def _run(options: argparse.Namespace) -> int:
    check_directory_of(options.output)
    config, key, mixture, transform = read_dataset(options)
    from torchtune_vl._torchtune import instantiate
    from torchtune_vl.datasets._preview import preview, to_html
    from torchtune_vl.files._directory import new_file

    output = options.output
    page = preview(
        mixture,
        transform,
        instantiate(config.rows),
        samples=options.indices or options.samples,
        # As training has them: the validation set comes in its order, a row on each device
        rows_per_step=1 if options.validation else config.rows_per_step,
        shuffle=config.shuffle and not options.validation,
        seed=config.seed,
        num_workers=config.num_workers,
        tokens_per_second=options.tokens_per_second,
    )
    page["facts"] = {
        "config": options.config,
        "overrides": " ".join(options.overrides),
        "dataset": key,
        "checkpoint": config.checkpoint_dir,
    }
    with new_file(output) as partial:
        partial.write_text(to_html(page), encoding="utf-8")
    told = f"{len(page['samples'])} of {page['summary']['samples']:,} samples"
    if errors := sum("error" in sample for sample in page["samples"]):
        told += f", {errors} of which cannot be read"
    print(f"Written to {shown(str(output))} ({output.stat().st_size / 1e6:.1f} MB): {told}")
    return 0
