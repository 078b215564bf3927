"""Conversations as users have them, to turns of text, media and boxes."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch

from torchtune_vl.chat._boxes import is_geometry
from torchtune_vl.files._json import from_json_text
from torchtune_vl.media import ImageTransform, VideoTransform
from torchtune_vl.media._augment import Change

Kind = Literal["image", "video"]
# Of the published templates
ROLES = ("system", "user", "assistant", "tool")
# Keys by which a message carries loss or not, with the value for no loss; the last is torchtune's
LOSS_KEYS = {"weight": 0, "loss": 0, "loss_mask": 0, "masked": 1}
_ABOUT_LOSS = re.compile("loss|mask|weight|train", re.IGNORECASE)
# Keys by which data have what precedes an answer; the first is that of templates
REASONINGS = (
    "reasoning_content",
    *("reasoning", "reasoning_details", "thinking", "thoughts", "thought", "rationale"),
    *("chain_of_thought", "cot"),
)
_ABOUT_MEDIA = re.compile("(image|video|audio)(s|_url|_urls)?")
# By which keys an item without a type is of one
_IMPLIED = {
    "boxes": {"boxes", "bbox_2d", "point_2d"},
    "image": {"image", "image_url"},
    "video": {"video", "video_url"},
    "text": {"text"},
}
# Where transformers' chat format, OpenAI's and torchtune's keep a medium, after "image" or "video"
_SOURCE_KEYS = ("content", "url", "path", "base64")
_SETTINGS = {"image": ImageTransform._settings, "video": VideoTransform._settings}
_KINDS: dict[str, Any] = {"list": Sequence, "dict": Mapping, "str": str}
Item = TypeVar("Item")
Tools = Sequence[Mapping[str, Any]]  # JSON schemas of functions


@runtime_checkable
class Message(Protocol):
    """What we read of torchtune's ``Message``."""

    role: str
    content: Any
    masked: bool


class Medium(NamedTuple):
    """An image or video as a conversation names it, with settings of its own."""

    kind: Kind
    source: Any
    settings: dict[str, Any]


class EncodedMedium(NamedTuple):
    """An image or video as the encoder takes it; of an image the size that it had in its file.

    And how it was changed since, if it was; and of a video the text before each of its steps, if it
    is not one block.
    """

    kind: Kind
    patches: torch.Tensor
    grid_thw: torch.Tensor
    num_tokens: int
    seconds_per_step: float | None
    original_size: tuple[int, int]
    change: Change | None
    step_texts: Sequence[str] = ()


class Objects(NamedTuple):
    """Boxes and points of an image, by its number, in pixels or parts of the user's file.

    Without ``fields`` they are written as a list of the family's, otherwise each into its place in
    ``text``.
    """

    entries: Sequence[Any]
    unit: Any
    image: Any
    text: str = ""
    fields: tuple[str, ...] = ()


@dataclass
class Turn(Generic[Item]):
    """One message; ``given`` has what it has but for its content, for templates that read more.

    The arguments of its ``tool_calls`` are parsed there. If ``masked``, it carries no loss.
    """

    role: str
    content: list[Item]
    masked: bool
    given: dict[str, Any]

    @property
    def tool_calls(self) -> list[Mapping[str, Any]]:
        """Name and arguments of each function that it calls."""
        return [call.get("function", call) for call in self.given.get("tool_calls", ())]


Part = str | Medium | Objects
# One whose media are encoded and whose boxes are text
EncodedTurn = Turn[str | EncodedMedium]


def read_conversation(
    messages: Any,
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
    roles: Collection[str] = ROLES,
) -> list[Turn[Part]]:
    """Read torchtune's messages, or messages in the chat format of transformers and OpenAI.

    Keys whose value is None count as absent, and torchtune's role ``ipython`` is ``tool``. Items
    that name no medium take the next of images or videos. ``ValueError`` if a message or item is
    not understood, its role not known, or images and videos do not fit their places.
    """
    if not _typed(messages, "list", "messages"):
        raise ValueError("a conversation needs at least one message")
    reader = _Reader(roles, {"image": images, "video": videos})
    turns = []
    for number, message in enumerate(messages):
        try:
            turns.append(reader.turn(message))
        except ValueError as error:
            is_dict = isinstance(message, Mapping)
            role = message.get("role") if is_dict else getattr(message, "role", None)
            who = f" ({role})" if isinstance(role, str) else ""
            raise ValueError(f"message {number}{who}: {error}") from error
    for kind, given in reader.given.items():
        places = reader.places[kind]
        if given is not None and places != len(given):
            found = f"there are {len(given)} {kind}s"
            raise ValueError(f"the messages have {places} places for {kind}s, but {found}")
    return turns


class _Reader:
    """Reads messages one after another, filling the places for media."""

    def __init__(self, roles: Collection[str], given: Mapping[Kind, Sequence[Any] | None]) -> None:
        self.roles = roles
        self.given = given
        self.places: dict[Kind, int] = {"image": 0, "video": 0}
        self.images_so_far = 0

    def turn(self, message: Any) -> Turn[Part]:
        if not isinstance(message, Mapping) and isinstance(message, Message):
            role = self._role(message.role)
            message = {"role": role, "content": message.content, "masked": message.masked}
        # Tables such as Arrow's give every message every key, None where there is nothing
        given = _without_nulls(_typed(message, "dict", "it"))
        role = self._role(given.get("role"))
        content = given.pop("content", None)
        _refuse_unread(given, ("role", *LOSS_KEYS))
        _typed(given.get("reasoning_content", ""), "str", "its reasoning_content")
        if given.get("function_call"):
            raise ValueError("its function_call is of OpenAI's older format: make it tool_calls")
        if "tool_calls" in given:
            given["tool_calls"] = _tool_calls(given["tool_calls"])
            if given["tool_calls"] and content is None:
                content = ""
        if isinstance(content, str):
            return Turn(role, [content], _is_masked(given), given)
        items = []
        for number, item in enumerate(_typed(content, "list", "its content")):
            try:
                items.append(self._item(_without_nulls(_typed(item, "dict", "it"))))
            except ValueError as error:
                raise ValueError(f"item {number}: {error}") from error
        return Turn(role, items, _is_masked(given), given)

    def _role(self, role: Any) -> str:
        if role == "ipython":  # torchtune's name of it
            return "tool"
        if not isinstance(role, str) or role not in self.roles:
            known = ", ".join(ROLES)
            raise ValueError(f"its role is {role!r}; known are {known}, and those of a template")
        return role

    def _item(self, item: dict[str, Any]) -> Part:
        implied = (kind for kind, keys in _IMPLIED.items() if item.keys() & keys)
        kind = item.get("type") or next(implied, None)
        if kind in ("image", "image_url", "video", "video_url"):
            return self._medium("video" if "video" in kind else "image", item)
        if kind == "boxes":
            return self._objects(item)
        if kind == "text" and ("text" in item or "content" in item):
            return self._text(item)
        known = "'text' with a str, 'image', 'video' and 'boxes'"
        raise ValueError(f"its type is {kind!r} and its keys are {sorted(item)}; known are {known}")

    def _medium(self, kind: Kind, item: dict[str, Any]) -> Medium:
        names = [name for name in (kind, f"{kind}_url", *_SOURCE_KEYS) if name in item]
        settings = {key: value for key, value in item.items() if key not in (*names, "type")}
        if unknown := settings.keys() - {*_SETTINGS[kind]}:
            known = ", ".join(_SETTINGS[kind])
            raise ValueError(f"{kind}s have no setting {sorted(unknown)}; there are {known}")
        if len(names) > 1:
            raise ValueError(f"it names more than one {kind}: {sorted(names)}")
        self.images_so_far += kind == "image"
        source = item[names[0]] if names else self._next_given(kind)
        if isinstance(source, Mapping) and "url" in source:  # OpenAI's {"image_url": {"url": ...}}
            source = source["url"]
        return Medium(kind, f"data:;base64,{source}" if "base64" in item else source, settings)

    def _next_given(self, kind: Kind) -> Any:
        given, number = self.given[kind], self.places[kind]
        self.places[kind] += 1
        if given is None:
            raise ValueError(f"it is the place of {kind} {number}: name it here, or in '{kind}s'")
        # One that is missing is counted, and reported with all others
        return given[number] if number < len(given) else None

    def _text(self, item: dict[str, Any]) -> str | Objects:
        text: str = _typed(item.get("text", item.get("content")), "str", "its text")
        _refuse_unread(item, ("type", "text", "image" if "fields" in item else ""))
        if keys := [key for key in REASONINGS if item.get(key)]:
            raise ValueError(f"its {keys[0]} belongs to the message: make it its reasoning_content")
        fields = _without_nulls(_typed(item.get("fields", {}), "dict", "fields"))
        for name in fields:
            if f"{{{name}}}" not in text:
                raise ValueError(f"its text has no place {{{name}}} for the field {name!r}")
        return self._objects(item, text, fields) if fields else text

    def _objects(
        self, item: dict[str, Any], text: str = "", fields: Mapping[str, Any] | None = None
    ) -> Objects:
        others = {key: value for key, value in item.items() if key not in ("type", "unit", "image")}
        entries = [*fields.values()] if fields else [others]
        if not fields and "boxes" in item:
            entries = _typed(others.pop("boxes"), "list", "boxes")
            if others:
                raise ValueError(f"an item of boxes has no {[*others]}: put it into each of them")
        image = item.get("image", self.images_so_far - 1)
        return Objects(entries, item.get("unit", "pixels"), image, text, tuple(fields or ()))


def read_tools(tools: Any) -> Tools:
    """Read the function schemas of a sample: a list, which and each of which may be JSON text."""
    tools = _parsed([] if tools is None else tools, "list", "tools")
    return [_parsed(tool, "dict", f"tool {number}") for number, tool in enumerate(tools)]


def _tool_calls(calls: Any) -> list[Mapping[str, Any]]:
    parsed: list[Mapping[str, Any]] = []
    for call in _parsed(calls, "list", "tool_calls"):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"the tool call {call!r} has no function with a name")
        what = f"arguments of the tool call {function['name']!r}"
        # OpenAI's are JSON text, which the published template would quote once more
        arguments = _parsed(function.get("arguments"), "dict", what)
        function = {**function, "arguments": arguments}
        parsed.append({**call, "function": function} if "function" in call else function)
    return parsed


def _parsed(value: Any, kind: Literal["list", "dict"], what: str) -> Any:
    return _typed(from_json_text(value, what), kind, what)


def _typed(value: Any, kind: Literal["list", "dict", "str"], what: str) -> Any:
    if not isinstance(value, _KINDS[kind]) or (kind == "list" and isinstance(value, str)):
        raise ValueError(f"{what} is of type {type(value).__name__}, expected a {kind}")
    return value


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _is_masked(message: Mapping[str, Any]) -> bool:
    """Whether a message carries no loss, which several keys may say."""
    said = {key: message[key] for key in LOSS_KEYS if key in message}
    for key, value in said.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(f"its {key} is {value!r}; only 0 (no loss) and 1 are supported")
        if key != "masked" and value and message["role"] != "assistant":
            raise ValueError(f"its {key} is 1, but only messages of the assistant carry loss")
    answers = {value == LOSS_KEYS[key] for key, value in said.items()}
    if len(answers) > 1:
        raise ValueError(f"its keys {', '.join(said)} disagree whether it carries loss")
    return answers == {True}


def _refuse_unread(values: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ``ValueError`` for a key that means media, coordinates or loss to whoever wrote it."""
    for key, value in values.items():
        if key in known:
            continue
        is_empty = isinstance(value, str | list) and not value
        is_medium = _ABOUT_MEDIA.fullmatch(str(key)) and not is_empty
        is_place = is_geometry(key, value) and not isinstance(value, int | float)
        if is_medium or is_place or _ABOUT_LOSS.search(str(key)):
            raise ValueError(
                f"its key {key!r} is not understood: media and boxes are items of the content, as "
                "{'type': 'image', 'image': ...}; weight, loss or loss_mask is 1 or 0 for the loss"
            )
