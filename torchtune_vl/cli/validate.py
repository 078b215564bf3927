"""``tune-vl validate``: the parity report."""

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtune_vl.files._printable import shown

_DESCRIPTION = """\
Compare what torchtune-vl makes of a checkpoint's directory, and of your images, videos and
conversations, with what transformers makes of it: vocabulary, token ids, image grids, pixels,
positions, and if you ask for it weights and logits; and with what a server answers. Images, texts
and conversations are built in, so it says something without any file of yours. Nothing is
downloaded."""
_EXAMPLES = """\
  tune-vl validate Qwen2.5-VL-3B-Instruct
  tune-vl validate Qwen2.5-VL-3B-Instruct --images photos/ scan.png --html report.html
  tune-vl validate Qwen2.5-VL-3B-Instruct --conversations train.json --logits
  tune-vl validate output/epoch_0 --reference Qwen2.5-VL-3B-Instruct
  tune-vl validate output/epoch_0 --server http://localhost:8000 --dtype bfloat16

exit status:
  0  every row that was compared passes
  1  a row fails
  2  the command cannot be run as it is
"""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    purpose = "compare a checkpoint and your data with transformers"
    argument = add("validate", _run, purpose, _EXAMPLES, _DESCRIPTION).add_argument
    argument("checkpoint_dir", type=Path, help="directory with the files of a checkpoint")
    what = "directory that transformers reads (default: the same); give the original to see what a "
    argument("--reference", type=Path, metavar="DIR", help=f"{what}copy or an export has changed")
    several: dict[str, Any] = {"type": Path, "nargs": "+", "default": []}
    argument("--images", **several, metavar="PATH", help="files, or folders searched for images")
    argument("--videos", **several, metavar="PATH", help="files, or folders searched for videos")
    what = "JSON or JSON lines, in the chat format of transformers, OpenAI or ShareGPT; paths are "
    argument("--conversations", **several, metavar="FILE", help=f"{what}relative to the file")
    argument("--max-pixels", type=int, metavar="N", help="largest area of an image, for both sides")
    argument("--weights", action="store_true", help="compare every tensor of the model")
    argument("--logits", action="store_true", help="weights and logits; holds two models in memory")
    what = (
        "address of a server, such as http://localhost:8000: have it answer the conversations, too"
    )
    argument("--server", metavar="URL", help=what)
    what = "what the server calls the model or adapter (default: the first that it lists)"
    argument("--served-model", metavar="NAME", help=what)
    what = "directory of the adapter that the server has on the checkpoint"
    argument("--adapter", type=Path, metavar="DIR", help=what)
    what = "most tokens of a served answer (default: %(default)s)"
    argument("--max-new-tokens", type=int, default=32, metavar="N", help=what)
    what = "of both models, and of ours beside a server (default: %(default)s)"
    argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=what)
    argument("--markdown", type=Path, metavar="FILE", help="write the report here, too")
    argument("--html", type=Path, metavar="FILE", help="write a page with pictures of what differs")


def _run(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("transformers is not installed: pip install 'torchtune-vl[validate]'")
    for directory in (options.checkpoint_dir, options.reference):
        if directory is not None:
            _check_directory(directory)
    if options.server is None and (options.served_model or options.adapter):
        raise ValueError("--served-model and --adapter say what a server has: give --server, too")
    if options.adapter and not options.served_model:
        raise ValueError("give --served-model, too: what the server calls the adapter")
    for path in (options.markdown, options.html):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path.parent}, where {path.name} is to be written, is no directory")
    with warnings.catch_warnings():
        report = _validate(options)
    _write(report, options)
    return 0 if report.passed else 1


def _check_directory(directory: Path) -> None:
    """Refuse adapters and folders of runs, which are no checkpoints."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory")
    others = ("adapter_config.json", "steps", "epoch_*/config.json")
    is_other = any(path for name in others for path in directory.glob(name))
    if is_other and not (directory / "config.json").exists():
        raise ValueError(
            f"{directory} is no checkpoint: merge an adapter into its base first, `tune-vl merge "
            f"BASE {directory} MERGED`; a finished run has its checkpoints in epoch_N below it"
        )


def _validate(options: argparse.Namespace) -> Any:
    print("Importing transformers", file=sys.stderr)
    # What the user of this command cannot act on, and the network
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from rich.console import Console
    from rich.progress import track

    from torchtune_vl import validation  # imports torchvision, which is to come before transformers

    # What came last of what it compares with
    if importlib.util.find_spec("transformers.image_processing_backends") is None:
        raise ValueError("this transformers is too old: pip install --upgrade transformers")
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    read = validation.read_conversations
    inputs = validation.Inputs(
        images=validation.find_images(options.images),
        videos=validation.find_videos(options.videos),
        conversations=[c for path in options.conversations for c in read(path)],
    )
    console = Console(stderr=True)

    def show(sequence: Any, description: str) -> Any:
        if console.is_terminal:
            return track(sequence, description, console=console, transient=True)
        print(f"Comparing {description}: {len(sequence)}", file=sys.stderr)  # for a log
        return sequence

    how = {"reference_dir": options.reference, "inputs": inputs, "track": show}
    how |= {"max_pixels": options.max_pixels, "dtype": getattr(torch, options.dtype)}
    how |= {"weights": options.weights, "logits": options.logits}
    if options.server is not None:
        named = {"model": options.served_model, "adapter": options.adapter}
        named["max_new_tokens"] = options.max_new_tokens
        how["server"] = validation.ServerComparison(options.server, **named)
    return validation.validate(options.checkpoint_dir, **how)


def _write(report: Any, options: argparse.Namespace) -> None:
    from rich.console import Console

    from torchtune_vl.validation import print_report, to_html, to_markdown

    # A file or pipe has no width of its own
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    print_report(report, Console(width=None if has_width else 140))
    for path, render in ((options.markdown, to_markdown), (options.html, to_html)):
        if path is not None:
            path.write_text(render(report), encoding="utf-8")
            print(f"Written to {shown(str(path))}")
