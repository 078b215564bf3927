"""Conversations as users have them, to turns of text, media and boxes."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torchtune_vl.chat._boxes import Unit, is_geometry
from torchtune_vl.files._json import from_json_text

Kind = Literal["image", "video"]
# Of the published templates
ROLES = ("system", "user", "assistant", "tool")
# Keys of a message by which it carries loss, or not
_LOSS_KEYS = ("weight", "loss", "loss_mask")
_ABOUT_LOSS = re.compile("loss|mask|weight|train", re.IGNORECASE)
_ABOUT_MEDIA = re.compile("(image|video|audio)(s|_url|_urls)?")

# Where transformers' chat format, OpenAI's and torchtune's keep a medium, after "image" or "video"
_SOURCE_KEYS = ("content", "url", "path", "base64")
_SIZE_SETTINGS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_SETTINGS: dict[Kind, tuple[str, ...]] = {
    "image": _SIZE_SETTINGS,
    "video": (
        *_SIZE_SETTINGS,
        "total_pixels",
        "fps",
        "nframes",
        "min_frames",
        "max_frames",
        "video_start",
        "video_end",
        "sample_fps",
        "frame_indices",
    ),
}


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


class Objects(NamedTuple):
    """Boxes and points of an image in the pixels, or parts, of the user's file.

    Without ``fields`` they are written as Qwen's JSON list, otherwise each into its place in
    ``text``.
    """

    objects: list[dict[str, Any]]
    unit: Unit
    image: int
    text: str = ""
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One message.

    Args:
        role: who speaks.
        content: texts, media and boxes in their order.
        masked: whether its tokens carry no loss.
        tool_calls: name and arguments of the functions that it calls.
        given: the message but for its content, for templates that read more of it.
    """

    role: str
    content: list[str | Medium | Objects]
    masked: bool = False
    tool_calls: list[tuple[str, Any]] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)


def read_conversation(
    messages: Sequence[Message | Mapping[str, Any]],
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
    roles: Collection[str] = ROLES,
) -> list[Turn]:
    """Read torchtune's messages, or messages in the chat format of transformers and OpenAI.

    Args:
        messages: torchtune's ``Message`` or dicts with ``role``, ``content`` (a str or a
            list of items), and perhaps ``tool_calls`` and ``weight``, ``loss`` or ``loss_mask``
            (0: no loss). Keys whose value is None count as absent.
        images: what fills the items of type image that name none, in order.
        videos: likewise for videos.
        roles: those that the chat template knows.

    Returns:
        The turns, roles as given but for ``ipython``, which is torchtune's name of ``tool``.

    Raises:
        ValueError: if a message or item is not understood, or images and videos do not fit their
            places; it says which.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages is of type {type(messages).__name__}, expected a list")
    if not messages:
        raise ValueError("a conversation needs at least one message")
    reader = _Reader(images, videos, roles)
    turns = []
    for number, message in enumerate(messages):
        try:
            turns.append(reader.turn(message))
        except ValueError as error:
            raise ValueError(f"message {number}{_role_of(message)}: {error}") from error
    reader.check_places()
    return turns


class _Reader:
    """Reads messages one after another, filling the places for media."""

    def __init__(
        self,
        images: Sequence[Any] | None,
        videos: Sequence[Any] | None,
        roles: Collection[str],
    ) -> None:
        self.roles = roles
        self.given: dict[Kind, Sequence[Any] | None] = {"image": images, "video": videos}
        self.places: dict[Kind, int] = {"image": 0, "video": 0}
        self.images_so_far = 0

    def turn(self, message: Message | Mapping[str, Any]) -> Turn:
        if not isinstance(message, Mapping):
            if not isinstance(message, Message):
                raise ValueError(
                    f"is of type {type(message).__name__}, expected a torchtune Message or a dict"
                )
            role = self._role(message.role)
            return Turn(
                role, list(self._items(message.content)), message.masked, [], {"role": role}
            )
        # Tables such as Arrow's give every message every key, None where there is nothing
        given = {key: value for key, value in message.items() if value is not None}
        role = self._role(given.get("role"))
        content = given.pop("content", None)
        _refuse_media(given)
        _refuse_geometry(given)
        masked = _is_masked(given)
        calls = _tool_calls(given.get("tool_calls"))
        if calls:
            content = "" if content is None else content
            given["tool_calls"] = _with_arguments(given["tool_calls"], calls)
        return Turn(role, list(self._items(content)), masked, calls, given)

    def _role(self, role: Any) -> str:
        if role == "ipython":  # torchtune's name of it
            return "tool"
        if not isinstance(role, str) or role not in self.roles:
            raise ValueError(
                f"its role is {role!r}; known are {', '.join(ROLES)}, and what a chat template of "
                "your own names: rename it"
            )
        return role

    def check_places(self) -> None:
        for kind, given in self.given.items():
            if given is not None and self.places[kind] != len(given):
                raise ValueError(
                    f"the messages have {self.places[kind]} places for {kind}s, but there are "
                    f"{len(given)} {kind}s"
                )

    def _items(self, content: Any) -> Iterator[str | Medium | Objects]:
        if isinstance(content, str):
            yield content
            return
        if isinstance(content, Mapping) or not isinstance(content, Sequence):
            raise ValueError(
                f"its content is of type {type(content).__name__}, expected a str or a list of "
                "items such as {'type': 'text', 'text': ...}"
            )
        for number, item in enumerate(content):
            try:
                yield self._item(item)
            except ValueError as error:
                raise ValueError(f"item {number}: {error}") from error

    def _item(self, item: Any) -> str | Medium | Objects:
        if not isinstance(item, Mapping):
            raise ValueError(f"is of type {type(item).__name__}, expected a dict")
        item = {key: value for key, value in item.items() if value is not None}
        kind = item.get("type") or _implied_type(item)
        if kind in ("image", "image_url"):
            return self._medium("image", item)
        if kind in ("video", "video_url"):
            return self._medium("video", item)
        if kind == "boxes":
            return self._objects(item)
        if kind == "text" and ("text" in item or "content" in item):
            return self._text(item)
        raise ValueError(
            f"its type is {kind!r} and its keys are {sorted(item)}; known are 'text' with a str, "
            "'image', 'video' and 'boxes'"
        )

    def _medium(self, kind: Kind, item: dict[str, Any]) -> Medium:
        settings = {key: value for key, value in item.items() if key in _SETTINGS[kind]}
        names = (kind, f"{kind}_url", *_SOURCE_KEYS)
        unknown = item.keys() - settings.keys() - {*names, "type"}
        if unknown:
            raise ValueError(
                f"an item of type {kind} has no setting {sorted(unknown)}; there are "
                f"{', '.join(_SETTINGS[kind])}"
            )
        sources = [item[name] for name in names if name in item]
        if len(sources) > 1:
            raise ValueError(f"it names more than one {kind}: {sorted(item.keys() & {*names})}")
        if kind == "image":
            self.images_so_far += 1
        source = sources[0] if sources else self._next_given(kind)
        if isinstance(source, Mapping) and "url" in source:  # OpenAI's {"image_url": {"url": ...}}
            source = source["url"]
        if "base64" in item:
            source = f"data:;base64,{source}"
        return Medium(kind, source, settings)

    def _next_given(self, kind: Kind) -> Any:
        given, number = self.given[kind], self.places[kind]
        self.places[kind] += 1
        if given is None:
            raise ValueError(
                f"it is the place of {kind} {number}, but the sample has no list of {kind}s: put "
                f"the {kind} into the item, or a list {kind + 's'!r} beside the messages"
            )
        if number >= len(given):
            return None  # counted, and reported together by check_places
        return given[number]

    def _text(self, item: dict[str, Any]) -> str | Objects:
        text = item.get("text", item.get("content"))
        if not isinstance(text, str):
            raise ValueError(f"its text is of type {type(text).__name__}, expected a str")
        _refuse_geometry(item)
        _refuse_loss_keys(item)
        if "fields" not in item:
            _refuse_media(item)
            return text
        if not isinstance(item["fields"], Mapping):
            raise ValueError("its fields are no dict of a name and a box or point each")
        fields = {name: value for name, value in item["fields"].items() if value is not None}
        missing = [name for name in fields if f"{{{name}}}" not in text]
        if missing:
            raise ValueError(f"its text has no place {{{missing[0]}}} for the field {missing[0]!r}")
        return self._with_image([*fields.values()], item, text, tuple(fields))

    def _objects(self, item: dict[str, Any]) -> Objects:
        if "boxes" in item:
            unread = item.keys() - {"type", "boxes", "unit", "image"}
            if unread:
                raise ValueError(
                    f"an item of boxes has no key {sorted(unread)}; there are unit and image, and "
                    "what is to be written stands in each of its boxes"
                )
            return self._with_image(item["boxes"], item)
        values = {k: v for k, v in item.items() if k not in ("type", "unit", "image")}
        return self._with_image([values], item)

    def _with_image(
        self,
        objects: Any,
        item: dict[str, Any],
        text: str = "",
        fields: tuple[str, ...] = (),
    ) -> Objects:
        if isinstance(objects, Mapping | str) or not isinstance(objects, Sequence):
            raise ValueError("its boxes are no list of dicts such as {'bbox_2d': [...]}")
        entries = []
        for entry in objects:
            if not isinstance(entry, Mapping):
                raise ValueError(f"{entry!r} has no 'bbox_2d' and no 'point_2d'")
            entries.append({key: value for key, value in entry.items() if value is not None})
            if not entries[-1].keys() & {"bbox_2d", "point_2d"}:
                raise ValueError(f"{entry!r} has no 'bbox_2d' and no 'point_2d'")
        image = item.get("image", self.images_so_far - 1)
        if not isinstance(image, int):
            raise ValueError(f"'image' is {image!r}, expected the number of an image, from 0")
        if image < 0:
            raise ValueError("there is no image before its boxes; name one: 'image': 0")
        return Objects(entries, item.get("unit", "pixels"), image, text, fields)


def read_tools(tools: Any) -> list[Mapping[str, Any]]:
    """Read the function schemas of a sample.

    Args:
        tools: list of JSON schemas, each perhaps as JSON text, the JSON text of a list, or None.

    Returns:
        The schemas.

    Raises:
        ValueError: if it is something else.
    """
    tools = [] if tools is None else from_json_text(tools, "tools")
    if isinstance(tools, Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools is of type {type(tools).__name__}, expected a list of schemas")
    tools = [from_json_text(tool, f"tool {number}") for number, tool in enumerate(tools)]
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ValueError(
                f"tool {number} is of type {type(tool).__name__}, expected its JSON schema as a "
                "dict; transformers.utils.get_json_schema makes one of a function"
            )
    return tools


def _tool_calls(calls: Any) -> list[tuple[str, Any]]:
    calls = [] if calls is None else from_json_text(calls, "its tool_calls")
    if isinstance(calls, Mapping | str) or not isinstance(calls, Sequence):
        raise ValueError(f"its tool_calls are of type {type(calls).__name__}, expected a list")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> tuple[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"the tool call {call!r} has no function with a name")
    what = f"the arguments of the tool call {function['name']!r}"
    # OpenAI's are JSON text, which the published template would quote once more
    arguments = from_json_text(function.get("arguments"), what)
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{what} are of type {type(arguments).__name__}, expected a dict")
    return function["name"], arguments


def _with_arguments(given: Any, calls: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """The tool calls as they were given, their arguments parsed, for templates that read more."""
    parsed = []
    for call, (_, arguments) in zip(from_json_text(given, "tool_calls"), calls, strict=True):
        if "function" in call:
            call = {**call, "function": {**call["function"], "arguments": arguments}}
        else:
            call = {**call, "arguments": arguments}
        parsed.append(call)
    return parsed


def _is_masked(message: Mapping[str, Any]) -> bool:
    """Whether a message carries no loss, which several keys may say."""
    said = {}
    for key in (*_LOSS_KEYS, "masked"):  # the last is torchtune's
        if key not in message:
            continue
        value = message[key]
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(f"its {key} is {value!r}; only 0 (no loss) and 1 are supported")
        said[key] = bool(value) == (key == "masked")
    _refuse_loss_keys({key: value for key, value in message.items() if key not in said})
    if len(set(said.values())) > 1:
        raise ValueError(f"its keys {', '.join(said)} disagree whether it carries loss")
    carries_loss = [key for key in _LOSS_KEYS if not said.get(key, True)]
    if carries_loss and message.get("role") != "assistant":
        raise ValueError(
            f"its {carries_loss[0]} is 1, but only messages of the assistant carry loss: remove it"
        )
    return any(said.values())


def _refuse_loss_keys(values: Mapping[str, Any]) -> None:
    for key in values:
        if _ABOUT_LOSS.search(str(key)):
            raise ValueError(
                f"its key {key!r} is not understood; a message carries loss or not by "
                f"{', '.join(_LOSS_KEYS)} of 1 or 0"
            )


def _refuse_media(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        is_empty = isinstance(value, str | list) and not value
        if _ABOUT_MEDIA.fullmatch(str(key)) and not is_empty:
            raise ValueError(
                f"its key {key!r} names a medium without a place: make an item of it, such as "
                "{'type': 'image', 'image': ...} in a message's content"
            )


def _refuse_geometry(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if is_geometry(key, value) and not isinstance(value, int | float):
            raise ValueError(
                f"its key {key!r} is not understood: coordinates are taken to the resized image in "
                "items of type boxes, and in fields of a text"
            )


def _implied_type(item: Mapping[str, Any]) -> str | None:
    implied = {
        "boxes": ("boxes", "bbox_2d", "point_2d"),
        "image": ("image", "image_url"),
        "video": ("video", "video_url"),
        "text": ("text",),
    }
    return next((kind for kind, keys in implied.items() if item.keys() & {*keys}), None)


def _role_of(message: Any) -> str:
    role = message.get("role") if isinstance(message, Mapping) else getattr(message, "role", None)
    return f" ({role})" if isinstance(role, str) else ""
