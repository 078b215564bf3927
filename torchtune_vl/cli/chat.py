"""``tune-vl chat``: a conversation with a model, in the terminal."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtune_vl.cli._answering import TRANSFORM_IS, add_model, add_rules, load, rules_of, write
from torchtune_vl.files._printable import shown

_DESCRIPTION = """\
Talk to a model. Its answers are written as they come; Ctrl-C stops an answer, of which what was
written stays in the conversation. Each turn reads only what is new: images and earlier turns are
kept."""
_EXAMPLES = """\
  tune-vl chat output/epoch_0
  tune-vl chat Qwen2.5-VL-3B-Instruct --adapter output/epoch_0/adapter --temperature 0.7"""
_HELP = """\
  /image FILE   show the model an image with the next message
  /video FILE   a video
  /reset        begin a new conversation
  /save FILE    write the conversation, as training reads it
  /help         this
  /quit         end, as Ctrl-D"""
_KINDS = {"/image": "image", "/video": "video"}


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    commands = f"{_DESCRIPTION}\n\nWhat begins with a stroke is no message:\n{_HELP}"
    command = add("chat", _run, "talk to a model", _EXAMPLES, commands)
    add_model(command)
    command.add_argument("--system", metavar="TEXT", help="what the system says at the beginning")
    add_rules(command, max_new_tokens=1024)
    argument = command.add_argument
    argument("settings", nargs="*", metavar="key=value", help=TRANSFORM_IS)
    command.set_defaults(several="settings")


def _run(options: argparse.Namespace) -> int:
    with suppress(ImportError):
        import readline  # noqa: F401 (input() then has a history, and lines that can be edited)
    from torchtune_vl.generation import Chat
    from torchtune_vl.models import transform_from_pretrained

    rules, settings = rules_of(options), settings_of_transform(options.settings)
    transform = transform_from_pretrained(options.checkpoint, **settings)
    talk = Talk(Chat(load(options), transform, rules), options.system)
    print("/help lists what else there is.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if line.strip() == "/quit":
            return 0
        with_error(talk.say, line)


def with_error(say: Callable[[str], None], line: str) -> None:
    """Say a line; what is wrong with it is told, and the conversation goes on."""
    try:
        say(line)
    except (ValueError, OSError) as error:
        print(shown(str(error)), file=sys.stderr)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        print("The device is out of memory: /save the conversation, or /reset it", file=sys.stderr)


class Talk:
    """A conversation, and media that go with its next message."""

    def __init__(self, chat: Any, system: str | None) -> None:
        self._chat = chat
        self._system = system
        self._begin()

    def say(self, line: str) -> None:
        """Do what a line says, which is a message unless it begins with a stroke."""
        name, _, rest = line.strip().partition(" ")
        if not line.strip():
            return
        if not name.startswith("/"):
            self._answer(line)
        elif name in _KINDS:
            self._attach(_KINDS[name], _path(rest))
        elif name == "/reset":
            self._begin()
        elif name == "/save":
            self._save(Path(_path(rest)))
        elif name == "/help":
            print(_HELP)
        else:
            raise ValueError(f"there is no {name}: /help lists what there is")

    def _begin(self) -> None:
        self._messages: list[dict[str, Any]] = []
        if self._system:
            self._messages.append({"role": "system", "content": self._system})
        self._media: list[dict[str, Any]] = []

    def _attach(self, kind: str, path: str) -> None:
        if not Path(path).is_file():
            raise ValueError(f"{path} is no file")
        self._media.append({"type": kind, kind: str(Path(path).resolve())})
        print(f"The {kind} goes with the next message.")

    def _answer(self, text: str) -> None:
        content = [*self._media, {"type": "text", "text": text}]
        asked = [*self._messages, {"role": "user", "content": content}]
        written = ""
        media, self._media = self._media, []  # gone if they cannot be read
        try:
            for part in self._chat.stream(asked):
                written += part
                write(part)
        except KeyboardInterrupt:
            if not written:
                print()
                self._media = media
                return  # as if nothing had been said
            print(" [stopped]", end="")
        print()
        answer = {"role": "assistant", "content": written}
        if self._chat.transform.writes_reasoning and "</think>" not in written:
            # Nor is it an answer to whoever trains on it
            answer |= {"content": "", "reasoning_content": written}
        self._messages = [*asked, answer]

    def _save(self, path: Path) -> None:
        from torchtune_vl.files._directory import new_file

        if path.exists():
            raise ValueError(f"{path} is there: name another file")
        with new_file(path) as partial:
            text = json.dumps({"messages": self._messages}, ensure_ascii=False)
            partial.write_text(text + "\n", encoding="utf-8")
        print(f"Written to {path}: {len(self._messages)} messages")


def _path(text: str) -> str:
    """A path as it was typed, or as a terminal writes one that is dropped into it."""
    if Path(text).expanduser().exists():
        return str(Path(text).expanduser())
    parts = shlex.split(text)
    if len(parts) != 1:
        raise ValueError("one file is needed behind it")
    return str(Path(parts[0]).expanduser())


def settings_of_transform(arguments: list[str]) -> dict[str, Any]:
    """Read settings of the transform, which are all that a chat has."""
    from torchtune_vl.cli._answering import split_settings

    files, of_data, of_transform = split_settings(arguments)
    if files or of_data:
        wrong = [*files, *of_data][0]
        raise ValueError(f"{wrong} is no setting of the transform, such as transform.fps=1")
    return of_transform
