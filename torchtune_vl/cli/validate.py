"""``tune-vl validate``: the parity report."""

import argparse
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtune_vl.files._printable import shown

if TYPE_CHECKING:
    from torchtune_vl.validation import Inputs, Report

_DESCRIPTION = """\
Compare what torchtune-vl makes of a checkpoint's directory, and of your images, videos and
conversations, with what transformers makes of it: vocabulary, token ids, image grids, pixels,
positions, and if you ask for it weights and logits. Images, texts and conversations are built in,
so it says something without any file of yours. Nothing is downloaded."""

_EXAMPLES = """\
examples:
  tune-vl validate Qwen2.5-VL-3B-Instruct
  tune-vl validate Qwen2.5-VL-3B-Instruct --images photos/ scan.png --html report.html
  tune-vl validate Qwen2.5-VL-3B-Instruct --conversations train.json --logits
  tune-vl validate output/epoch_0 --reference Qwen2.5-VL-3B-Instruct

exit status:
  0  every row that was compared passes
  1  a row fails
  2  the command cannot be run as it is
"""

# What came last of what it compares with
_NEWEST_NEEDED = "transformers.image_processing_backends"


def add_parser(subparsers: Any) -> None:
    """Add the subcommand.

    Args:
        subparsers: the action of :meth:`argparse.ArgumentParser.add_subparsers`.
    """
    parser = subparsers.add_parser(
        "validate",
        help="compare a checkpoint and your data with transformers",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint_dir", type=Path, help="directory with the files of a checkpoint"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="directory that transformers reads (default: the same); give the original to see "
        "what a copy, an export or a fine-tuned checkpoint has changed",
    )
    for kind in ("images", "videos"):
        parser.add_argument(
            f"--{kind}",
            type=Path,
            nargs="+",
            default=[],
            metavar="PATH",
            help=f"files, or folders searched for {kind}",
        )
    parser.add_argument(
        "--conversations",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON or JSON lines, in the chat format of transformers and OpenAI or in ShareGPT's; "
        "paths in it are relative to it",
    )
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="largest area of an image, for both sides"
    )
    parser.add_argument("--weights", action="store_true", help="compare every tensor of the model")
    parser.add_argument(
        "--logits",
        action="store_true",
        help="compare weights and logits; holds both models in memory",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of both models (default: %(default)s)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report here, too")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with pictures of what differs"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "transformers is what it compares with: pip install 'torchtune-vl[validate]'"
        )
    for directory in (options.checkpoint_dir, options.reference):
        if directory is not None:
            _check_directory(directory)
    for path in (options.markdown, options.html):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path.parent}, where {path.name} is to be written, is no directory")
    with warnings.catch_warnings():
        print("Importing transformers", file=sys.stderr)
        _hush()
        if importlib.util.find_spec(_NEWEST_NEEDED) is None:
            raise ValueError("this transformers is too old: pip install --upgrade transformers")
        report = _validate(options, _read_inputs(options))
    _write(report, options)
    return 0 if report.passed else 1


def _check_directory(directory: Path) -> None:
    """Refuse what is no checkpoint, and say what it is."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory")
    if (directory / "config.json").exists():
        return
    if (directory / "adapter_config.json").exists():
        raise ValueError(
            f"{directory} is an adapter: merge it into its base first, "
            f"`tune-vl merge BASE {directory} MERGED`"
        )
    epochs = [path for path in directory.glob("epoch_*") if (path / "config.json").exists()]
    if epochs:
        newest = max(epochs, key=lambda path: path.stat().st_mtime)
        raise ValueError(f"{directory} is the folder of a run: its checkpoint is {newest}")
    if (directory / "steps").is_dir():
        raise ValueError(
            f"{directory} is the folder of a run that has no finished checkpoint yet: resume=True "
            "goes on with it"
        )


def _hush() -> None:
    """Silence what the user of this command cannot act on, and keep it off the network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    from torchtune_vl.validation import import_torchvision

    import_torchvision()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()


def _read_inputs(options: argparse.Namespace) -> "Inputs":
    from torchtune_vl.validation import Inputs, find_images, find_videos, read_conversations

    return Inputs(
        images=find_images(options.images),
        videos=find_videos(options.videos),
        conversations=[c for path in options.conversations for c in read_conversations(path)],
    )


def _validate(options: argparse.Namespace, inputs: "Inputs") -> "Report":
    import torch
    from rich.console import Console
    from rich.progress import track

    from torchtune_vl.validation import validate

    console = Console(stderr=True)

    def show(sequence: Any, description: str) -> Any:
        if console.is_terminal:
            return track(sequence, description, console=console, transient=True)
        print(f"Comparing {description}: {len(sequence)}", file=sys.stderr)  # for a log
        return sequence

    return validate(
        options.checkpoint_dir,
        reference_dir=options.reference,
        inputs=inputs,
        max_pixels=options.max_pixels,
        weights=options.weights,
        logits=options.logits,
        dtype=getattr(torch, options.dtype),
        track=show,
    )


def _write(report: "Report", options: argparse.Namespace) -> None:
    from rich.console import Console

    from torchtune_vl.validation import print_report, to_html, to_markdown

    # A file or pipe has no width of its own
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    print_report(report, Console(width=None if has_width else 140))
    for path, render in ((options.markdown, to_markdown), (options.html, to_html)):
        if path is not None:
            path.write_text(render(report), encoding="utf-8")
            print(f"Written to {shown(str(path))}")
