"""What commands that answer have in common: the model, the rules, the data."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtune_vl.files._printable import shown

OTHERS_ARE = "settings of the data, as a config's dataset has them, such as format=vqa; or, as "
OTHERS_ARE += "transform.max_pixels=602112, of images, videos and length"


def add_model(command: argparse.ArgumentParser) -> None:
    """Add the checkpoint, and how it is loaded."""
    argument = command.add_argument
    argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory of the model")
    what = "directory of an adapter, of torchtune-vl or of peft, for this model"
    argument("--adapter", type=Path, metavar="DIR", help=what)
    what = "dtype of weights and computation (default: as the weights are stored)"
    argument("--dtype", choices=("float32", "bfloat16", "float16"), help=what)
    what = "cuda, cuda:1, cpu, ... (default: cuda if there is one, else cpu)"
    argument("--device", metavar="DEVICE", help=what)


def add_rules(command: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add how tokens are chosen, and where answers end."""
    argument = command.add_argument
    what = "most tokens of an answer (default: %(default)s)"
    argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=what)
    what = "0 takes the likeliest token, more makes unlikely ones likelier (default: 0)"
    argument("--temperature", type=float, default=0.0, metavar="T", help=what)
    argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    what = "draw from the likeliest tokens that have this probability together"
    argument("--top-p", type=float, metavar="P", help=what)
    what = "draw from tokens that have this part of the likeliest one's probability"
    argument("--min-p", type=float, metavar="P", help=what)
    what = "above 1 makes tokens less likely that occurred (default: 1)"
    argument("--repetition-penalty", type=float, default=1.0, metavar="R", help=what)
    argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")


def load(options: argparse.Namespace, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Load the model, and its transform with settings of its own."""
    import torch

    from torchtune_vl.generation import load_model
    from torchtune_vl.models import transform_from_pretrained

    transform = transform_from_pretrained(options.checkpoint, **settings)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    how = {"adapter": options.adapter, "device": device}
    how["dtype"] = options.dtype and getattr(torch, options.dtype)
    return load_model(options.checkpoint, **how), transform


def rules_of(options: argparse.Namespace, **others: Any) -> Any:
    """Make the rules that the options say."""
    from torchtune_vl.generation import Rules, Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    return Rules(options.max_new_tokens, sampling, seed=options.seed, **others)


def question(
    text: str, system: str | None, images: Sequence[str], videos: Sequence[str]
) -> list[dict[str, Any]]:
    """Make a conversation of one question, whose media stand before its text."""
    media = [{"type": "image", "image": file} for file in images]
    media += [{"type": "video", "video": file} for file in videos]
    asked = {"role": "user", "content": [*media, {"type": "text", "text": text}]}
    return [{"role": "system", "content": system}, asked] if system else [asked]


def write(text: str) -> None:
    """Write a part of an answer to the terminal, at once."""
    sys.stdout.write("\t".join(map(shown, text.split("\t"))))
    sys.stdout.flush()


def split_settings(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Tell files from settings of the data, and those of the transform."""
    from omegaconf import OmegaConf

    files = [a for a in arguments if "=" not in a or os.path.exists(a)]
    given = OmegaConf.from_dotlist([a for a in arguments if a not in files])
    settings: Any = OmegaConf.to_container(given)
    of_transform = settings.pop("transform", {})
    if not isinstance(of_transform, dict):
        raise ValueError("transform has settings, such as transform.max_pixels=602112")
    return files, settings, of_transform
