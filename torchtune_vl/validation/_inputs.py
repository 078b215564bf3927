"""What is compared: files and conversations of the user."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

_IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_TAG = re.compile("(<image>|<video>)")
# Where the chat formats of transformers and OpenAI keep a medium
_SOURCES = ("url", "path", "base64")


@dataclass
class Conversation:
    """A conversation that both sides are given.

    Args:
        name: file and number.
        messages: in transformers' chat format, media as paths or data URLs.
        tools: JSON schemas of functions; None for a conversation that has nothing to do with tools.
        problem: why it cannot be compared.
    """

    name: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[Any] | None = None
    problem: str = ""

    @property
    def texts(self) -> list[str]:
        """All texts of its messages."""
        contents = [message["content"] for message in self.messages]
        items = [item for content in contents for item in _as_items(content)]
        return [item["text"] for item in items if item["type"] == "text"]


@dataclass
class Inputs:
    """What is compared.

    Args:
        images: paths by what the report calls them.
        videos: likewise.
        conversations: the conversations.
        texts: texts by their source.
    """

    images: dict[str, str] = field(default_factory=dict)
    videos: dict[str, str] = field(default_factory=dict)
    conversations: list[Conversation] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)


def find_images(paths: Iterable[Path]) -> dict[str, str]:
    """Find image files.

    Args:
        paths: files, and folders that are searched for files with the suffixes of images.

    Returns:
        Paths by name.

    Raises:
        ValueError: if a path does not exist, or a folder has no image.
    """
    return _find(paths, _IMAGE_SUFFIXES, "image")


def find_videos(paths: Iterable[Path]) -> dict[str, str]:
    """Find video files, as :func:`find_images` does images."""
    return _find(paths, _VIDEO_SUFFIXES, "video")


def _find(paths: Iterable[Path], suffixes: set[str], kind: str) -> dict[str, str]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
            if not files:
                raise ValueError(f"{path} holds no {kind} ({', '.join(sorted(suffixes))})")
            found.extend(files)
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist")
    return {str(path): str(path) for path in found}


def read_conversations(path: Path) -> list[Conversation]:
    """Read a file of conversations.

    Args:
        path: a JSON list or JSON lines. Each entry is a list of messages in the format of
            transformers or OpenAI, a dict with such ``messages``, or a dict with ShareGPT's
            ``conversations``; ``image``, ``images``, ``video`` or ``videos`` beside them fill the
            tags ``<image>`` and ``<video>`` and items that name no medium. Paths are relative to
            the file.

    Returns:
        The conversations; those that transformers has no answer for carry a ``problem``.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        entries = _entries(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as conversations: {error}") from error
    conversations = []
    for number, entry in enumerate(entries):
        name = f"{path.name} #{number}"
        try:
            conversations.append(_conversation(name, entry, path.parent))
        except ValueError as error:
            conversations.append(Conversation(name, problem=str(error)))
        except (AttributeError, KeyError, TypeError) as error:
            problem = f"it has no known layout ({error!r})"
            conversations.append(Conversation(name, problem=problem))
    return conversations


def _entries(text: str) -> list[Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(content, dict):
        return [content]
    if not isinstance(content, list) or not content:
        raise ValueError("it holds no list of conversations")
    # A list of messages is one conversation
    return [content] if isinstance(content[0], dict) and "role" in content[0] else content


def _conversation(name: str, entry: Any, folder: Path) -> Conversation:
    if isinstance(entry, list):
        entry = {"messages": entry}
    media = _Media(entry, folder)
    if "messages" in entry:
        messages = [_message(message, media) for message in entry["messages"]]
    else:
        messages = [_turn(turn, media) for turn in entry["conversations"]]
    media.check_all_used()
    if not messages:
        raise ValueError("it has no messages")
    return _with_tools(name, messages, entry.get("tools"))


def _message(message: dict[str, Any], media: "_Media") -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        content = media.split(content)
    elif content is not None:
        content = [media.item(item) for item in content]
    known = {"role": message["role"], "content": content or ""}
    if message.get("tool_calls"):
        known["tool_calls"] = message["tool_calls"]
    return known


def _turn(turn: dict[str, Any], media: "_Media") -> dict[str, Any]:
    role = _SHAREGPT_ROLES.get(turn["from"], turn["from"])
    return {"role": role, "content": media.split(turn["value"])}


def _with_tools(name: str, messages: list[dict[str, Any]], tools: Any) -> Conversation:
    """Join texts where there are tools: the tokenizer's template for them knows no items."""
    if not tools and not any(m["role"] == "tool" or "tool_calls" in m for m in messages):
        return Conversation(name, messages)
    for message in messages:
        items = list(_as_items(message["content"]))
        if any(item["type"] != "text" for item in items):
            raise ValueError("transformers' template with tools takes no images or videos")
        message["content"] = "".join(item["text"] for item in items)
    return Conversation(
        name, messages, json.loads(tools) if isinstance(tools, str) else tools or []
    )


class _Media:
    """The images and videos beside the messages of an entry, taken one after another."""

    def __init__(self, entry: dict[str, Any], folder: Path) -> None:
        self.folder = folder
        self.given: dict[str, Iterator[Any]] = {}
        for kind in ("image", "video"):
            named = entry.get(f"{kind}s", entry.get(kind))
            if named is not None:
                self.given[kind] = iter(named if isinstance(named, list) else [named])

    def split(self, text: str) -> str | list[dict[str, Any]]:
        """Put media in the places of their tags, if there are media beside the messages."""
        pieces = _TAG.split(text)
        if len(pieces) == 1 or not self.given:
            return text
        return [
            self.next(piece[1:-1]) if _TAG.fullmatch(piece) else {"type": "text", "text": piece}
            for piece in pieces
            if piece
        ]

    def item(self, item: dict[str, Any]) -> dict[str, Any]:
        """Read an item of a message's content."""
        kind = item["type"].removesuffix("_url")
        if kind == "text":
            return {"type": "text", "text": item["text"]}
        if kind not in ("image", "video"):
            raise ValueError(f"transformers has no items of type {item['type']!r}")
        places = {kind, f"{kind}_url", *_SOURCES} & item.keys()
        settings = item.keys() - places - {"type"}
        if settings:
            raise ValueError(
                f"transformers does not read {', '.join(sorted(settings))} of an {kind} item, "
                "which are settings of qwen-vl-utils"
            )
        if not places:
            return self.next(kind)
        place = places.pop()
        source = item[place]["url"] if isinstance(item[place], dict) else item[place]
        if place == "base64":
            source = f"data:{kind}/*;base64,{source}"
        return {"type": kind, kind: self.locate(source)}

    def next(self, kind: str) -> dict[str, Any]:
        source = next(self.given.get(kind, iter(())), None)
        if source is None:
            raise ValueError(f"it has more places for {kind}s than {kind}s")
        return {"type": kind, kind: self.locate(source)}

    def locate(self, source: Any) -> str:
        if not isinstance(source, str):
            raise ValueError(f"{source!r} is no path")
        if source.startswith("data:"):
            return source
        if source.startswith(("http://", "https://")):
            raise ValueError(f"{source} is remote: nothing is downloaded here")
        if source.startswith("file:"):
            return url2pathname(urlparse(source).path)
        return str(self.folder / source)

    def check_all_used(self) -> None:
        for kind, rest in self.given.items():
            if next(rest, None) is not None:
                raise ValueError(f"it has more {kind}s than places for them")


def _as_items(content: str | Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
