"""What is compared: files and conversations of the user, and generated ones."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from torchtune_vl.chat._messages import Medium, Objects, read_conversation, read_tools
from torchtune_vl.datasets._json_records import JsonRecords
from torchtune_vl.datasets._record_formats import MediaDirectory, RecordReader
from torchtune_vl.media._errors import shortened
from torchtune_vl.media._sources import SUFFIXES, path_of_file_url
from torchtune_vl.validation._report import package_file

# Texts in many scripts; images that are enlarged, reduced, kept, narrow, no multiple of 28, or have
# one side more than 200 times the other, which both sides have to refuse; and conversations about
# them as training reads them
_BUILTIN = json.loads(package_file("builtin_inputs.json"))
TEXTS: list[str] = [*_BUILTIN["texts"], "a" * 3000 + " " * 300 + "\n" * 50 + "1" * 40]


@dataclass
class Conversation:
    """A conversation that both sides are given."""

    name: str
    # As training gives it to our transform, and in transformers' format; media: paths or data URLs
    sample: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[Any] | None = None  # JSON schemas; None if it has nothing to do with functions
    problem: str = ""  # why transformers has no answer for it

    @property
    def items(self) -> list[dict[str, Any]]:
        """All texts and media of its messages, in order."""
        contents = [message["content"] for message in self.messages]
        return [item for c in contents for item in ([_item(c)] if isinstance(c, str) else c)]

    def values(self, kind: str) -> list[str]:
        """Return its texts, or where its images or videos are, in order."""
        return [item[kind] for item in self.items if item["type"] == kind]


@dataclass
class Inputs:
    """What is compared; images and videos are paths by what the report calls them."""

    images: dict[str, str] = field(default_factory=dict)
    videos: dict[str, str] = field(default_factory=dict)
    conversations: list[Conversation] = field(default_factory=list)


def _find(paths: Iterable[Path], kind: str) -> dict[str, str]:
    """Find files by path: those given, and in folders those with the suffixes of their kind."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        within = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES[kind])
        if path.is_dir() and not within:
            raise ValueError(f"{path} holds no {kind} ({', '.join(sorted(SUFFIXES[kind]))})")
        found += within or [path]
    return {str(path): str(path) for path in found}


find_images, find_videos = partial(_find, kind="image"), partial(_find, kind="video")


def read_conversations(path: Path) -> list[Conversation]:
    """Read a file of conversations, as training does, or raise ``ValueError``.

    It is JSON or JSON Lines of the rows that training reads, or of lists of messages; or one list
    of messages. Paths are relative to it. What transformers has no answer for has a ``problem``.
    """
    try:
        rows = [record for record, _ in JsonRecords([str(path)])]
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as conversations: {error}") from error
    if isinstance(rows[0], dict) and "role" in rows[0]:
        rows = [rows]
    conversations, read = [], RecordReader(MediaDirectory(str(path.parent), is_confining=False), {})
    for number, row in enumerate(rows):
        name = f"{path.name} #{number}"
        try:
            conversations.append(conversation_of(name, read(row, number)))
        except ValueError as error:
            problem = str(error).removeprefix(f"sample {number}: ")
            conversations.append(Conversation(name, problem=problem))
    return conversations


def conversation_of(name: str, sample: Mapping[str, Any]) -> Conversation:
    """Read a sample for transformers, with the code that our transform reads it with."""
    messages, tools = sample["messages"], read_tools(sample.get("tools"))
    # Whether a role is one is for both sides to say
    roles = [str(m.get("role")) for m in messages if isinstance(m, Mapping)]
    turns = read_conversation(messages, sample.get("images"), sample.get("videos"), roles)
    has_tools = bool(tools) or any(turn.role == "tool" or turn.tool_calls for turn in turns)
    read = []
    for turn in turns:
        content: Any = [_item(part) for part in turn.content]
        # Templates with tools may know no items; others get a single text as it is, as of ours
        if {item["type"] for item in content} <= {"text"} and (has_tools or len(content) == 1):
            content = "".join(item["text"] for item in content)
        read.append({**turn.given, "content": content})
    nameless = {key: value for key, value in sample.items() if key != "id"}
    return Conversation(name, nameless, read, [*tools] if has_tools else None)


def _item(part: str | Medium | Objects) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Objects):
        raise ValueError("transformers has no items of boxes")
    kind, source, settings = part
    if settings:
        names = ", ".join(sorted(settings))
        raise ValueError(f"transformers reads no {names} of {kind} items, as qwen-vl-utils does")
    if not isinstance(source, str):
        raise ValueError(f"{shortened(repr(source))} is no path")
    if source.startswith(("http://", "https://")):
        raise ValueError(f"{source} is remote: nothing is downloaded here")
    if source.startswith("data:;"):  # transformers asks what it is
        source = source.replace("data:;", f"data:{kind}/*;", 1)
    return {"type": kind, kind: path_of_file_url(source) if source[:5] == "file:" else source}


def builtin_inputs(directory: Path) -> Inputs:
    """Write the generated images and the generated video, and read conversations about them."""
    images = {}
    for name, (width, height, suffix, kind, mode) in _BUILTIN["images"].items():
        path = directory / f"{name.replace(' ', '_')}.{suffix}"
        _drawn(kind, width, height).convert(mode).save(path)
        images[f"built-in {name}, {width} x {height} {suffix.upper()}"] = str(path)
    video = str(directory / "moving_square.mp4")
    with av.open(video, "w") as container:
        # Lasts longer than its frames are wide, in positions
        stream: Any = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for i in range(10):
            frame = np.array(_drawn("gradient", 160, 120).convert("RGB"))
            frame[30:60, 13 * i : 13 * i + 30] = (250, 40, 10)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    read = RecordReader(MediaDirectory(str(directory), is_confining=True), {})
    samples = [read(row, number) for number, row in enumerate(_BUILTIN["conversations"])]
    conversations = [conversation_of(f"built-in {sample['id']}", sample) for sample in samples]
    return Inputs(images, {"built-in moving square, 10 frames of 160 x 120": video}, conversations)


def _drawn(kind: str, width: int, height: int) -> Image.Image:
    if kind == "noise":
        levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(levels)
    if kind == "gradient":
        x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        return Image.fromarray(np.stack([x, y, (x + y) / 2, 255 - y], axis=-1).astype(np.uint8))
    # Thin dark strokes on white, as in a scanned document
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for top, text in zip(range(12, height - 12, 14), TEXTS * height, strict=False):
        draw.text((12, top), text[:120].encode("ascii", "replace").decode(), fill="black")
    draw.rectangle((6, 6, width - 7, height - 7), outline="black")
    return page
