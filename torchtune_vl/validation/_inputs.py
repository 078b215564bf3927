"""What is compared: files and conversations of the user."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtune_vl.datasets._chat import RowReader
from torchtune_vl.datasets._json_rows import JsonRows
from torchtune_vl.datasets._media_directory import MediaDirectory
from torchtune_vl.media._errors import shortened
from torchtune_vl.media._sources import path_of_file_url

_IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
# Where the chat formats of transformers and OpenAI keep a medium
_SOURCES = ("url", "path", "base64", "content")


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
    """Read a file of conversations, as training does.

    Args:
        path: JSON or JSON Lines; its rows are those that
            :func:`~torchtune_vl.datasets.vision_chat_dataset` reads, or lists of messages. A list
            of messages alone is one conversation. Paths are relative to the file.

    Returns:
        The conversations; those that transformers has no answer for carry a ``problem``.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        rows = list(JsonRows([str(path)]))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as conversations: {error}") from error
    if isinstance(rows[0], dict) and "role" in rows[0]:
        rows = [rows]
    read = RowReader(MediaDirectory(str(path.parent), is_confining=False), {})
    conversations = []
    for number, row in enumerate(rows):
        name = f"{path.name} #{number}"
        try:
            conversations.append(_conversation(name, read(row, number)))
        except ValueError as error:
            problem = str(error).removeprefix(f"sample {number}: ")
            conversations.append(Conversation(name, problem=problem))
        except (AttributeError, KeyError, TypeError) as error:
            problem = f"it has no known layout ({error!r})"
            conversations.append(Conversation(name, problem=problem))
    return conversations


def _conversation(name: str, sample: dict[str, Any]) -> Conversation:
    media = _Media(sample)
    messages = [_message(message, media) for message in sample["messages"]]
    media.check_all_used()
    if not messages:
        raise ValueError("it has no messages")
    return _with_tools(name, messages, sample["tools"])


def _message(message: dict[str, Any], media: "_Media") -> dict[str, Any]:
    content = message["content"] if not message.get("tool_calls") else message.get("content")
    if isinstance(content, list):
        content = [media.item(item) for item in content]
    known = {"role": message["role"], "content": content or ""}
    if message.get("tool_calls"):
        known["tool_calls"] = message["tool_calls"]
    return known


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
    """The images and videos beside the messages of a sample, taken one after another."""

    def __init__(self, sample: dict[str, Any]) -> None:
        self.given = {kind: iter(sample[f"{kind}s"]) for kind in ("image", "video")}

    def item(self, item: dict[str, Any]) -> dict[str, Any]:
        """Read an item of a message's content."""
        item = {key: value for key, value in item.items() if value is not None}
        kind = item["type"].removesuffix("_url")
        if kind == "text" and item.keys() <= {"type", "text", "content"}:
            return {"type": "text", "text": item.get("text", item.get("content"))}
        if kind not in ("image", "video"):
            raise ValueError(
                f"transformers has no items of type {item['type']!r} with {sorted(item)}"
            )
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
        source = f"data:{kind}/*;base64,{item[place]}" if place == "base64" else item[place]
        return {"type": kind, kind: _located(source)}

    def next(self, kind: str) -> dict[str, Any]:
        source = next(self.given[kind], None)
        if source is None:
            raise ValueError(f"it has more places for {kind}s than {kind}s")
        return {"type": kind, kind: _located(source)}

    def check_all_used(self) -> None:
        for kind, rest in self.given.items():
            if next(rest, None) is not None:
                raise ValueError(f"it has more {kind}s than places for them")


def _located(source: Any) -> str:
    if not isinstance(source, str):
        raise ValueError(f"{shortened(repr(source))} is no path")
    if source.startswith(("http://", "https://")):
        raise ValueError(f"{source} is remote: nothing is downloaded here")
    return path_of_file_url(source) if source.startswith("file:") else source


def _as_items(content: str | Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
