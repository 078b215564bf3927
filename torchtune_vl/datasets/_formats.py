"""Records in the formats that people have, to samples as a model's transform takes them."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torchtune_vl.datasets._media_directory import MediaDirectory
from torchtune_vl.files._json import from_json_text
from torchtune_vl.media._errors import reraise, shortened

_MEDIA = ("image", "images", "video", "videos")
COLUMNS = ("id", "messages", "conversations", "system", *_MEDIA, "tools", "objects")
_SOURCE_KEYS = ("image", "image_url", "video", "video_url", "url", "path")
# Names that LLaVA's, LLaMA-Factory's and Qwen's files have for those who speak
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_TAG = re.compile("(<(?:image|video|ref-object|bbox)>)")
_UNITS = {"real": "pixels", "norm1": "0..1"}


class RecordReader:
    """Makes samples of records, whose columns have these names where they differ from ours."""

    def __init__(self, media: MediaDirectory, column_map: Mapping[str, str]) -> None:
        self._media = media
        self._names = {column: column_map.get(column, column) for column in COLUMNS}

    def __call__(self, record: Any, number: int) -> dict[str, Any]:
        """Make a sample; errors name it by its id, or else by the number of its record."""
        if isinstance(record, list):
            record = {"messages": record}
        if not isinstance(record, Mapping):
            raise ValueError(
                f"sample {number}: it is {shortened(repr(record))}, expected an object"
            )
        values = {column: record.get(name) for column, name in self._names.items()}
        name = number if values["id"] is None else values["id"]
        with naming(name):
            images, videos = (
                [source for key in keys for source in _as_list(values[key])]
                for keys in (_MEDIA[:2], _MEDIA[2:])
            )
            kinds = [kind for kind, given in (("image", images), ("video", videos)) if given]
            return {
                "id": name,
                "messages": self._messages(values, record, _Places(kinds, values["objects"])),
                "images": [self._media.source(image) for image in images],
                "videos": [self._media.source(video) for video in videos],
                "tools": values["tools"] or None,
            }

    def _messages(
        self, values: Mapping[str, Any], record: Mapping[str, Any], places: "_Places"
    ) -> list[Any]:
        key = "messages" if values["messages"] is not None else "conversations"
        if values[key] is None:
            raise ValueError(
                f"it has no {self._names['messages']!r} and no {self._names['conversations']!r}, "
                f"but {sorted(record)}: name the column by column_map"
            )
        messages = from_json_text(values[key], repr(self._names[key]))
        if not isinstance(messages, list):
            raise ValueError(
                f"{self._names[key]!r} is of type {type(messages).__name__}, expected a list"
            )
        if key == "conversations":
            messages = [_read_turn(turn) for turn in messages]
        if values["system"]:
            messages = [{"role": "system", "content": values["system"]}, *messages]
        read = []
        for number, message in enumerate(messages):
            try:
                read.append(self._message(message, places))
            except ValueError as error:
                raise ValueError(f"message {number}: {error}") from error
        places.check_objects()
        return read

    def _message(self, message: Any, places: "_Places") -> Any:
        if not isinstance(message, Mapping):
            return message  # the transform says what is wrong with it
        content, is_answer = message.get("content"), message.get("role") == "assistant"
        if isinstance(content, str):
            items = places.fill(content, is_answer)
            content = items[0]["text"] if len(items) == 1 and _is_text(items[0]) else items
        elif isinstance(content, list):
            items = [part for item in content for part in places.fill_item(item, is_answer)]
            content = [self._located(item) for item in items]
        else:
            return message
        return {**message, "content": content}

    def _located(self, item: Any) -> Any:
        """An item with the paths of its medium resolved."""
        if not isinstance(item, Mapping):
            return item
        is_medium = item.get("type") in ("image", "image_url", "video", "video_url")
        keys = (*_SOURCE_KEYS, "content") if is_medium else _SOURCE_KEYS
        return {
            key: self._media.source(value) if key in keys else value for key, value in item.items()
        }


class _Places:
    """What comes in the places of tags in a record's texts.

    For ``<image>`` and ``<video>`` it is an item without a source, which takes the next of the
    record's media; for ``<ref-object>`` and ``<bbox>`` the next of its ``objects``.
    """

    def __init__(self, kinds: Collection[str], objects: Any) -> None:
        self._kinds = kinds
        self._objects = _read_objects(objects)
        self._counts: Counter[str] = Counter()

    def fill(self, text: str, is_answer: bool) -> list[dict[str, Any]]:
        """Make items of a text. In an answer ``<image>`` and ``<video>`` are no tags."""
        items: list[dict[str, Any]] = []
        for number, piece in enumerate(_TAG.split(text)):  # text, tag, text, ...
            kind = piece[1:-1]
            if number % 2 == 0 or (is_answer and piece not in self._objects):
                item = _text(piece)
            elif piece in self._objects:
                given, place = self._objects[piece], self._counts[piece]
                item = given[place] if place < len(given) else _text("")
                self._counts[piece] += 1
            elif kind in self._kinds:
                item = {"type": kind}
            else:
                raise ValueError(
                    f"its {piece} is the place of a medium, but the record has none in {kind!r} or "
                    f"'{kind}s': name the column by column_map (where the tag is meant as text, "
                    f"write it as two text items, '<' and '{kind}>')"
                )
            if items and _is_text(items[-1]) and _is_text(item):
                item = _text(items.pop()["text"] + item["text"])
            if item != _text(""):
                items.append(item)
        return items or [_text("")]

    def fill_item(self, item: Any, is_answer: bool) -> list[Any]:
        """Make items of one that is a text with tags; others stay."""
        if not isinstance(item, Mapping) or item.get("type") not in ("text", None):
            return [item]
        text = item.get("text") if item.get("text") is not None else item.get("content")
        if not isinstance(text, str) or not _TAG.search(text):
            return [item]
        if item.get("fields") is not None:
            raise ValueError(
                "its text has tags and fields: give the media as items of their own, and boxes as "
                "fields"
            )
        return self.fill(text, is_answer)

    def check_objects(self) -> None:
        """Raise a ValueError if the texts have more or fewer places than there are objects."""
        for tag, given in self._objects.items():
            if len(given) != self._counts[tag]:
                raise ValueError(
                    f"the messages have {self._counts[tag]} places {tag}, but ms-swift's objects "
                    f"{len(given)} for them: give as many as there are places"
                )


def _read_objects(objects: Any) -> dict[str, list[dict[str, Any]]]:
    """Items by tag of ms-swift's ``objects``, perhaps JSON text, where null is no value."""
    objects = {} if objects is None else from_json_text(objects, "objects")
    given: dict[str, Any] = {}
    if isinstance(objects, Mapping):
        given = {key: value for key, value in objects.items() if value is not None}
    names, boxes = given.get("ref", []), given.get("bbox", [])
    images = given.get("image_id", [])
    if (
        not isinstance(objects, Mapping)
        or given.keys() - {"ref", "bbox", "bbox_type", "image_id"}
        or not all(isinstance(values, list) for values in (names, boxes, images))
        or not all(isinstance(name, str) for name in names)
        or len(images) not in (0, len(boxes))
        or given.get("bbox_type", "real") not in _UNITS
    ):
        raise ValueError(
            f"objects is {shortened(repr(objects))}, expected an object of nothing but ref, a list "
            "of texts; bbox, a list of boxes; image_id, a list of as many numbers; and bbox_type, "
            "real or norm1: correct the column or remove it"
        )
    images = images or [0] * len(boxes)
    unit = _UNITS[given.get("bbox_type", "real")]
    return {
        "<ref-object>": [_text(name) for name in names],
        "<bbox>": [_box(box, image, unit) for box, image in zip(boxes, images, strict=True)],
    }


def _box(box: Any, image: Any, unit: str) -> dict[str, Any]:
    key = "point_2d" if isinstance(box, list) and len(box) == 2 else "bbox_2d"
    return {**_text("{bbox}"), "fields": {"bbox": {key: box}}, "image": image, "unit": unit}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _is_text(item: Mapping[str, Any]) -> bool:
    return item.keys() == {"type", "text"}


def _read_turn(turn: Any) -> dict[str, Any]:
    """A message of ShareGPT's turn."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise ValueError(f"{turn!r} is no turn such as {{'from': 'human', 'value': ...}}")
    speaker, text = turn.get("from"), turn["value"]
    if speaker not in _ROLES:
        raise ValueError(f"a turn is from {speaker!r}; known are {', '.join(_ROLES)}")
    # Such as what says whether it carries loss
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message["role"] = _ROLES[speaker]
    if speaker == "function_call":
        calls = from_json_text(text, f"the function call {text!r}")
        return {**message, "tool_calls": calls if isinstance(calls, list) else [calls]}
    return {**message, "content": text}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


@contextmanager
def naming(name: Any, place: str = "") -> Iterator[None]:
    """Names the sample, and its place, in errors, which whatever a record holds may cause."""
    try:
        yield
    except Exception as error:
        is_named = isinstance(error, ValueError) and str(error).startswith("sample ")
        reraise(error, "" if is_named else f"sample {name!r}: ", place)
