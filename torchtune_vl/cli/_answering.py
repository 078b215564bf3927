"""What commands that answer have in common: the model, the rules, the data."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from torchtune_vl.cli._torchrun import end_with_the_launcher, is_launched, torchrun
from torchtune_vl.files._printable import shown

TRANSFORM_IS = "settings of images, videos and length, such as transform.max_pixels=602112"
DATA_ARE = (
    "files of a dataset, or its name on the hub; and key=value: settings of it, as a config's "
)
DATA_ARE += f"dataset has them, such as format=vqa, or {TRANSFORM_IS}"
_NUM_SHOWN = 10
DIGESTS = ("records", "reading", "weights")  # of what answers depend on
# Files of a checkpoint that answers depend on
_WEIGHTS = (
    *("*.safetensors", "*.index.json", "*config.json", "*.jinja", "chat_template.json"),
    *("tokenizer.json", "vocab.json", "merges.txt", "*.tiktoken"),
)
# What the answers depend on, beside checkpoint and data
_OF_ANSWERS = (
    *("checkpoint", "adapter", "dtype", "quantize", "prompt", "system", "images", "stop"),
    *("num_answers", "max_new_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "seed"),
)


def add_model(command: argparse.ArgumentParser) -> None:
    """Add the checkpoint, and how it is loaded."""
    argument = command.add_argument
    argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory of the model")
    what = "directory of an adapter, of torchtune-vl or of peft, for this model"
    argument("--adapter", type=Path, metavar="DIR", help=what)
    what = "dtype of weights and computation (default: as the weights are stored)"
    argument("--dtype", choices=("float32", "bfloat16", "float16"), help=what)
    what = "8-bit or 4-bit weights in the decoder's layers, computed with in bfloat16: less memory"
    argument("--quantize", choices=("int8", "int4"), help=what)
    what = "cuda, cuda:1, cpu, ... (default: cuda if there is one, else cpu)"
    argument("--device", metavar="DEVICE", help=what)


def add_data(command: argparse.ArgumentParser) -> None:
    """Add the files of a dataset, and settings."""
    command.add_argument("data", nargs="*", metavar="DATA", help=DATA_ARE)
    command.set_defaults(several="data")


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


def add_processes(command: argparse.ArgumentParser) -> None:
    """Add how many answers are written at a time, and by how many processes."""
    what = "answers that are written at a time (default: %(default)s)"
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help=what)
    what = "processes that share the questions, each with a device of its own (default: 1)"
    command.add_argument("--processes", type=int, default=1, metavar="N", help=what)


def about_of(
    options: argparse.Namespace, of_transform: dict[str, Any], questions: Any, **others: Any
) -> dict[str, str]:
    """What answers depend on, for a file of them to be gone on with."""
    values = {name: getattr(options, name, None) for name in _OF_ANSWERS}
    directories = [options.checkpoint, *([options.adapter] if options.adapter else [])]
    values |= {"records": questions.records, "reading": questions.reading}
    values |= {"transform": of_transform, **others}
    found = [path for d in directories for pattern in _WEIGHTS for path in d.glob(pattern)]
    values["weights"] = state_of_files({path: path.name for path in found})
    return {name: str(value) for name, value in values.items() if value not in (None, [], {})}


def state_of_files(names: Mapping[Path, str]) -> str:
    """A digest of names of files, and of the files' sizes and times of writing."""
    stats = {path: path.stat() for path in names}
    states = sorted((names[path], s.st_size, s.st_mtime_ns) for path, s in stats.items())
    return xxhash.xxh3_64_hexdigest(repr(states).encode("utf-8", "surrogatepass"))


def answer_many(
    options: argparse.Namespace,
    file: Any,
    transform: Any,
    questions: Any,
    rules: Any,
) -> int | None:
    """Answer the questions that a file lacks, in as many processes as the options say.

    Returns None if all are answered, or else the status with which the process is to end, as one
    that another has started.
    """
    if options.processes < 1 or options.batch_size < 1:
        raise ValueError("--processes and --batch-size are at least 1")
    if options.processes > 1 and ":" in (options.device or ""):
        raise ValueError(f"{options.device} is one device: name its kind, for several processes")
    if options.processes > 1 and not is_launched():
        launcher = ["--nproc_per_node", str(options.processes)]
        return torchrun(options.command, launcher, sys.argv[2:]) or None
    if is_launched():
        end_with_the_launcher()
    from tqdm import tqdm

    from torchtune_vl.generation import answer_questions

    rank, processes = 0, 1
    if is_launched():
        rank, processes = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    with file.part(rank) as add:
        model = load(options)
        own = range(rank, len(questions), processes)
        left = [number for number in file.unanswered(len(questions)) if number in own]
        records = answer_questions(model, transform, questions, left, rules, options.batch_size)
        done, total = ((count * rules.num_answers) for count in (len(own) - len(left), len(own)))
        with tqdm(total=total, initial=done, unit="answer", disable=rank > 0) as bar:
            for record in records:
                add(record)
                bar.update(rules.num_answers if "error" in record else 1)
    return 0 if is_launched() else None


def tell_errors(records: Sequence[Mapping[str, Any]]) -> int:
    """List questions that could not be answered; the status is 1 if there are any."""
    errors = [record["error"] for record in records if "error" in record]
    if errors:
        print(f"Not answered: {len(errors):,}", file=sys.stderr)
        print("\n".join(shown(f"  {error}") for error in errors[:_NUM_SHOWN]), file=sys.stderr)
    if len(errors) > _NUM_SHOWN:
        print(f"  and {len(errors) - _NUM_SHOWN:,} more, in the file", file=sys.stderr)
    return int(bool(errors))


def read_files(
    options: argparse.Namespace,
    files: list[str],
    of_data: dict[str, Any],
    of_transform: dict[str, Any],
) -> tuple[Any, Any]:
    """Make the checkpoint's transform, and the questions of files."""
    from torchtune_vl.datasets import open_dataset
    from torchtune_vl.evaluation import Sources
    from torchtune_vl.models import transform_from_pretrained

    transform = transform_from_pretrained(options.checkpoint, **of_transform)
    return transform, Sources([open_dataset(transform, files, **of_data)], ["data"])


def load(options: argparse.Namespace) -> Any:
    """Load the model."""
    import torch

    from torchtune_vl.generation import load_model

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and is_launched():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    dtype = options.dtype and getattr(torch, options.dtype)
    how = {"adapter": options.adapter, "dtype": dtype, "quantize": options.quantize}
    return load_model(options.checkpoint, **how, device=device)


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
