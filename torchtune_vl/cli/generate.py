"""``tune-vl generate``: answers of a model, to one question or to many."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torchtune_vl.cli._answering import (
    OTHERS_ARE,
    add_model,
    add_rules,
    load,
    question,
    rules_of,
    split_settings,
    write,
)
from torchtune_vl.cli._torchrun import end_with_the_launcher, torchrun
from torchtune_vl.files._printable import shown

_DESCRIPTION = """\
Let a model answer: one question, about images and videos perhaps, whose answer is printed as it is
written; the same question about each image of a folder; or the questions of a dataset in any format
that training reads, where the model answers what the last answer of each conversation answers.

Answers to many questions become a file of JSON Lines, in their order. A command that was stopped
goes on where it was when it is given again. What cannot be answered has an error in its line; it
is listed, and the exit status is 1."""
_EXAMPLES = """\
  tune-vl generate output/epoch_0 --prompt 'What is the total?' --image receipt.jpg
  tune-vl generate output/epoch_0 --prompt 'Describe it.' --images scans --output answers.jsonl
  tune-vl generate Qwen2.5-VL-3B-Instruct --adapter output/epoch_0/adapter test.jsonl \\
    --output answers.jsonl --processes 8"""
_NUM_SHOWN = 10
# Options that answers do not depend on, or that are looked at apart
_NOT_OF_ANSWERS = {
    *("run", "command", "several", "data"),
    *("output", "processes", "device", "batch_size"),
}


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = add("generate", _run, "let a model answer", _EXAMPLES, _DESCRIPTION)
    add_model(command)
    argument = command.add_argument
    what = f"files of a dataset, or its name on the hub, and key=value: {OTHERS_ARE}"
    argument("data", nargs="*", metavar="DATA", help=what)
    command.set_defaults(several="data")
    argument("--prompt", metavar="TEXT", help="the question")
    argument("--system", metavar="TEXT", help="what the system says before the question")
    what = "image of the question; may be given several times, and stands before the text"
    argument("--image", action="append", default=[], metavar="FILE", help=what)
    what = "video of the question, as --image"
    argument("--video", action="append", default=[], metavar="FILE", help=what)
    argument("--images", type=Path, metavar="DIR", help="folder of images to ask about, each alone")
    argument("--output", type=Path, metavar="FILE", help="JSON Lines to write")
    add_rules(command, max_new_tokens=512)
    what = "text that ends an answer; may be given several times"
    argument("--stop", action="append", default=[], metavar="TEXT", help=what)
    what = "answers to each question of many (default: 1)"
    argument("--num-answers", type=int, default=1, metavar="N", help=what)
    what = "answers that are written at a time (default: %(default)s)"
    argument("--batch-size", type=int, default=16, metavar="N", help=what)
    what = "processes that share the questions, each with a device of its own (default: 1)"
    argument("--processes", type=int, default=1, metavar="N", help=what)


def _run(options: argparse.Namespace) -> int:
    files, of_data, of_transform = split_settings(options.data)
    if bool(files) + bool(options.images) + bool(options.prompt and not options.images) != 1:
        raise ValueError("give one of: DATA, --prompt, or --images with --prompt")
    if options.images and not options.prompt:
        raise ValueError("--images needs a question: give --prompt")
    many = bool(files or options.images)
    if many != bool(options.output):
        problem = "many answers go to a file: give --output" if many else "one answer is printed"
        raise ValueError(problem if many else f"{problem}: leave --output out")
    if not many and options.num_answers > 1:
        raise ValueError("one question has one answer here: leave --num-answers out")
    if of_data and not files:
        raise ValueError(
            f"{', '.join(of_data)} is of a dataset, and there is no DATA: leave it out"
        )
    if many and (options.image or options.video or (files and options.system)):
        raise ValueError("--image, --video and --system are of one question: leave them out")
    if not many:
        return _answer_one(options, of_transform)
    from torchtune_vl.generation import AnswerFile

    about = {
        **{name: value for name, value in vars(options).items() if name not in _NOT_OF_ANSWERS},
        "data": [*files, *of_data.items()],
        "transform": of_transform,
    }
    about = {name: str(value) for name, value in about.items() if value not in (None, [], {})}
    file = AnswerFile(options.output, about, options.num_answers)
    if options.processes > 1 and "RANK" not in os.environ:
        launcher = ["--nproc_per_node", str(options.processes)]
        status = torchrun("generate", launcher, sys.argv[2:])
        return status or _finish(file)
    _answer_many(options, file, files, of_data, of_transform)
    return 0 if "RANK" in os.environ else _finish(file)


def _answer_one(options: argparse.Namespace, of_transform: dict[str, Any]) -> int:
    from torchtune_vl.generation import Chat

    model, transform = load(options, of_transform)
    chat = Chat(model, transform, rules_of(options, stop=options.stop))
    asked = question(options.prompt, options.system, options.image, options.video)
    for text in chat.stream(asked):
        write(text)
    print()
    return 0


def _answer_many(
    options: argparse.Namespace,
    file: Any,
    files: Sequence[str],
    of_data: dict[str, Any],
    of_transform: dict[str, Any],
) -> None:
    from tqdm import tqdm

    from torchtune_vl.datasets import open_dataset
    from torchtune_vl.generation import answer_questions

    if "RANK" in os.environ:
        end_with_the_launcher()
    rank, processes = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    rules = rules_of(options, stop=options.stop, num_answers=options.num_answers)
    with file.part(rank) as add:
        model, transform = load(options, of_transform)
        asked: Any
        if files:
            asked = open_dataset(transform, files, **of_data)
        else:
            asked = FolderQuestions(options.images, options.prompt, options.system)
        own = range(rank, len(asked), processes)
        left = [number for number in file.unanswered(len(asked)) if number in own]
        bar = tqdm(total=len(own) * rules.num_answers, unit="answer", disable=rank > 0)
        with bar:
            bar.update(bar.total - len(left) * rules.num_answers)
            for record in answer_questions(
                model, transform, asked, left, rules, options.batch_size
            ):
                add(record)
                bar.update(rules.num_answers if "error" in record else 1)


def _finish(file: Any) -> int:
    records = file.finish()
    errors = [record for record in records if "error" in record]
    print(f"Written to {shown(str(file.path))}: {len(records) - len(errors):,} answers")
    if errors:
        print(f"Not answered: {len(errors):,}", file=sys.stderr)
        for record in errors[:_NUM_SHOWN]:
            print(shown(f"  {record['error']}"), file=sys.stderr)
        if len(errors) > _NUM_SHOWN:
            print(f"  and {len(errors) - _NUM_SHOWN:,} more, in the file", file=sys.stderr)
    return int(bool(errors))


class FolderQuestions:
    """The same question about each image of a folder, and of those in it."""

    def __init__(self, folder: Path, text: str, system: str | None) -> None:
        from torchtune_vl.validation._inputs import find_images

        self._folder, self._text, self._system = folder, text, system
        self._files = [*find_images([folder])]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> dict[str, Any]:
        """A question, whose id is the path in the folder."""
        file = self._files[index]
        name = Path(file).relative_to(self._folder).as_posix()
        return {"id": name, "messages": question(self._text, self._system, [file], [])}
