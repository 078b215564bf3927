"""``tune-vl generate``: answers of a model, to one question or to many."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtune_vl.cli._answering import (
    about_of,
    add_data,
    add_model,
    add_processes,
    add_rules,
    answer_many,
    load,
    question,
    read_files,
    rules_of,
    split_settings,
    state_of_files,
    tell_errors,
    write,
)
from torchtune_vl.cli._dataset import check_directory_of
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


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = add("generate", _run, "let a model answer", _EXAMPLES, _DESCRIPTION)
    add_model(command)
    argument = command.add_argument
    add_data(command)
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
    add_processes(command)


def _run(options: argparse.Namespace) -> int:
    files, of_data, of_transform = split_settings(options.data)
    asks_once = options.prompt is not None and not options.images
    if bool(files) + bool(options.images) + asks_once != 1:
        raise ValueError("give one of: DATA, --prompt, or --images with --prompt")
    if options.images and options.prompt is None:
        raise ValueError("--images needs a question: give --prompt")
    many = bool(files or options.images)
    if many != bool(options.output):
        problem = "many answers go to a file: give --output" if many else "one answer is printed"
        raise ValueError(problem if many else f"{problem}: leave --output out")
    if not many and (options.num_answers, options.processes) != (1, 1):
        raise ValueError(
            "one question has one answer here: leave --num-answers and --processes out"
        )
    if of_data and not files:
        raise ValueError(
            f"{', '.join(of_data)} is of a dataset, and there is no DATA: leave it out"
        )
    if many and (options.image or options.video or (files and options.system)):
        raise ValueError("--image, --video and --system are of one question: leave them out")
    if not many:
        return _answer_one(options, of_transform)
    check_directory_of(options.output)
    from torchtune_vl.generation import AnswerFile
    from torchtune_vl.models import transform_from_pretrained

    questions: Any
    if files:
        transform, questions = read_files(options, files, of_data, of_transform)
    else:
        transform = transform_from_pretrained(options.checkpoint, **of_transform)
        questions = FolderQuestions(options)
    about = about_of(options, of_transform, questions, data=[*files, *of_data.items()])
    file = AnswerFile(options.output, about, options.num_answers)
    rules = rules_of(options, stop=options.stop, num_answers=options.num_answers)
    status = answer_many(options, file, transform, questions, rules)
    if status is not None:
        return status
    records = file.finish(len(questions))
    count = sum("answer" in record for record in records)
    print(f"Written to {shown(str(file.path))}: {count:,} answers")
    return tell_errors(records)


def _answer_one(options: argparse.Namespace, of_transform: dict[str, Any]) -> int:
    from torchtune_vl.generation import Chat
    from torchtune_vl.models import transform_from_pretrained

    rules = rules_of(options, stop=options.stop)
    transform = transform_from_pretrained(options.checkpoint, **of_transform)
    chat = Chat(load(options), transform, rules)
    asked = question(options.prompt, options.system, options.image, options.video)
    for text in chat.stream(asked):
        write(text)
    print()
    return 0


class FolderQuestions:
    """The same question about each image of a folder, and of those in it."""

    def __init__(self, options: argparse.Namespace) -> None:
        from torchtune_vl.validation._inputs import find_images

        self._options = options
        self._files = [*find_images([options.images])]
        self.records = state_of_files({Path(file): self._name(file) for file in self._files})
        self.reading = ""

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> dict[str, Any]:
        """A question, whose id is the path in the folder."""
        file, asked = self._files[index], self._options
        messages = question(asked.prompt, asked.system, [file], [])
        return {"id": self._name(file), "messages": messages}

    def _name(self, file: str) -> str:
        return Path(file).relative_to(self._options.images).as_posix()
