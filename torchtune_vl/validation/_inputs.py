"""What is compared: files and conversations of the user."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtune_vl.chat._messages import Medium, Objects, read_conversation, read_tools
from torchtune_vl.datasets._chat import RowReader
from torchtune_vl.datasets._json_rows import JsonRows
from torchtune_vl.datasets._media_directory import MediaDirectory
from torchtune_vl.media._errors import shortened
from torchtune_vl.media._sources import path_of_file_url

_IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


@dataclass
class Conversation:
    """A conversation that both sides are given.

    Args:
        name: file and number.
        sample: as training gives it to our transform.
        messages: the same in transformers' chat format, media as paths or data URLs.
        tools: JSON schemas of functions; None for a conversation that has nothing to do with tools.
        problem: why it cannot be compared.
    """

    name: str
    sample: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[Any] | None = None
    problem: str = ""

    @property
    def texts(self) -> list[str]:
        """All texts of its messages."""
        contents = [message["content"] for message in self.messages]
        items = [[_text(c)] if isinstance(c, str) else c for c in contents]
        return [item["text"] for content in items for item in content if item["type"] == "text"]

    @property
    def media(self) -> list[tuple[str, str]]:
        """Its images and videos in order: "image" or "video", and where it is."""
        contents = [m["content"] for m in self.messages if not isinstance(m["content"], str)]
        items = [item for content in contents for item in content if item["type"] != "text"]
        return [(item["type"], item[item["type"]]) for item in items]

    def sources(self, kind: str) -> list[str]:
        """Return where its images or videos are, in order."""
        return [source for other, source in self.media if other == kind]


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
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
        if path.is_dir() and not files:
            raise ValueError(f"{path} holds no {kind} ({', '.join(sorted(suffixes))})")
        found += files if path.is_dir() else [path]
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
            conversations.append(conversation_of(name, read(row, number)))
        except ValueError as error:
            problem = str(error).removeprefix(f"sample {number}: ")
            conversations.append(Conversation(name, problem=problem))
    return conversations


def conversation_of(name: str, sample: Mapping[str, Any]) -> Conversation:
    """Read a sample for transformers with the code that our transform reads it with.

    Args:
        name: what the report calls it.
        sample: as datasets give it to transforms.

    Returns:
        The conversation.

    Raises:
        ValueError: if it cannot be read, or transformers has nothing that is like it.
    """
    messages, tools = sample["messages"], read_tools(sample.get("tools"))
    # Whether a role is one is for both sides to say
    given = [message["role"] for message in messages if "role" in message]
    roles = {role for role in given if isinstance(role, str)}
    turns = read_conversation(messages, sample.get("images"), sample.get("videos"), roles)
    contents = [[_item(part) for part in turn.content] for turn in turns]
    has_tools = bool(tools) or any(turn.role == "tool" or turn.tool_calls for turn in turns)
    if has_tools:  # the tokenizer's template for them knows no items
        if any(item["type"] != "text" for content in contents for item in content):
            raise ValueError("transformers' template with tools takes no images or videos")
        contents = [[_text("".join(item["text"] for item in items))] for items in contents]
    return Conversation(
        name,
        {key: value for key, value in sample.items() if key != "id"},
        [
            {**turn.given, "content": _alone(content)}
            for turn, content in zip(turns, contents, strict=True)
        ],
        [*tools] if has_tools else None,
    )


def _item(part: str | Medium | Objects) -> dict[str, Any]:
    if isinstance(part, str):
        return _text(part)
    if isinstance(part, Objects):
        raise ValueError("transformers has no items of boxes")
    if part.settings:
        raise ValueError(
            f"transformers does not read {', '.join(sorted(part.settings))} of {part.kind} "
            "items, which are settings of qwen-vl-utils"
        )
    source = part.source
    if not isinstance(source, str):
        raise ValueError(f"{shortened(repr(source))} is no path")
    if source.startswith(("http://", "https://")):
        raise ValueError(f"{source} is remote: nothing is downloaded here")
    source = path_of_file_url(source) if source.startswith("file:") else source
    if source.startswith("data:;"):  # transformers asks what it is
        source = source.replace("data:;", f"data:{part.kind}/*;", 1)
    return {"type": part.kind, part.kind: source}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _alone(content: list[dict[str, Any]]) -> Any:
    """A text that is all of a message is given as it is, as templates of the user's are."""
    return content[0]["text"] if len(content) == 1 and "text" in content[0] else content
