"""Records in the formats that people have, to samples as a model's transform takes them."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torchtune_vl.files._json import from_json_text
from torchtune_vl.media._errors import naming_sample, shortened
from torchtune_vl.media._sources import path_of_file_url, scheme_of

_KEYS_OF_MEDIA = ("image", "images", "video", "videos")
COLUMNS = ("id", "messages", "conversations", "system", *_KEYS_OF_MEDIA, "tools", "objects")
_SOURCE_KEYS = ("image", "image_url", "video", "video_url", "url", "path")
# Those who speak in LLaVA's, LLaMA-Factory's and Qwen's files
_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant"}
_ROLES |= {"function_call": "assistant", "observation": "tool"}
# Of a file's name and of a path, on every common system: what is longer is base64
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4095
_TAG = re.compile("(<(?:image|video|ref-object|bbox)>)")
_UNITS = {"real": "pixels", "norm1": "0..1"}


class MediaDirectory:
    """The directory that relative paths of media start from; confining, none may leave it."""

    def __init__(self, directory: str, is_confining: bool) -> None:
        self._directory = directory
        self._root = os.path.realpath(directory) if is_confining else None

    def source(self, source: Any) -> Any:
        """Resolve the paths of a medium; a ValueError if one leads out of the directory.

        A record has a path, URL or base64, a list of frames, or a dict with ``bytes``, ``path`` or
        ``url``, as columns of ``datasets`` and items of OpenAI do.
        """
        if isinstance(source, list):
            return [self.source(frame) for frame in source]
        if isinstance(source, Mapping):
            found = next((k for k in ("bytes", "path", "url") if source.get(k) is not None), None)
            return source if found is None else self.source(source[found])
        if not isinstance(source, str):
            return source
        if scheme := scheme_of(source):
            if scheme == "file":
                self._check(source, path_of_file_url(source))
            return source
        if not _is_path(source):
            return source
        path = os.path.join(self._directory, source)
        self._check(source, path)
        return path

    @property
    def fingerprint(self) -> tuple[str, bool]:
        """Tells it from others in which a record's media are others."""
        return os.path.abspath(self._directory), self._root is not None

    def _check(self, source: str, path: str) -> None:
        if self._root is None:
            return
        try:
            real = os.path.realpath(path)
        except ValueError:  # no file can have such a name, as the transform will say
            return
        if os.path.commonpath([self._root, real]) != self._root:
            raise ValueError(
                f"the path {source!r} leads to {real!r}, outside of media_dir {self._directory!r}: "
                "correct it, or set media_dir to where all media are, without links out of it"
            )


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
            raise ValueError(f"it is {shortened(repr(record))}, expected an object")
        values = {column: record.get(name) for column, name in self._names.items()}
        name = number if values["id"] is None else values["id"]
        with naming_sample(name):
            images = [*_as_list(values["image"]), *_as_list(values["images"])]
            videos = [*_as_list(values["video"]), *_as_list(values["videos"])]
            kinds = [kind for kind, media in (("image", images), ("video", videos)) if media]
            places = _Places(kinds, values["objects"])
            messages = self._messages(record, values)
            for place, message in enumerate(messages):
                try:
                    messages[place] = self._message(message, places)
                except ValueError as error:
                    raise ValueError(f"message {place}: {error}") from error
            places.check_objects()
            return {
                "id": name,
                "number": number,
                "messages": messages,
                "images": self._media.source(images),
                "videos": self._media.source(videos),
                "tools": values["tools"] or None,
            }

    @property
    def fingerprint(self) -> str:
        """Tells it from those that make other samples of the same records."""
        return repr((sorted(self._names.items()), self._media.fingerprint))

    def _messages(self, record: Mapping[str, Any], values: Mapping[str, Any]) -> list[Any]:
        """A new list of the messages of a record."""
        is_chat = values["messages"] is not None
        key = self._names["messages" if is_chat else "conversations"]
        messages = from_json_text(record.get(key), repr(key))
        if not isinstance(messages, list):
            raise ValueError(
                f"it has no list of messages under {self._names['messages']!r} or "
                f"{self._names['conversations']!r}, but {sorted(record)}: name it by column_map"
            )
        system = [{"role": "system", "content": values["system"]}] if values["system"] else []
        return [*system, *(messages if is_chat else map(_read_turn, messages))]

    def _message(self, message: Any, places: "_Places") -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str | list):
            return message  # the transform says what is wrong with it
        is_answer = message.get("role") == "assistant"
        given = [_text(content)] if isinstance(content, str) else content
        items = [self._located(part) for item in given for part in places.fill(item, is_answer)]
        if isinstance(content, str) and len(items) == 1 and _is_text(items[0]):
            return {**message, "content": items[0]["text"]}
        return {**message, "content": items}

    def _located(self, item: Any) -> Any:
        """An item with the paths of its medium resolved."""
        if not isinstance(item, Mapping):
            return item
        keys = _keys_of_source(item)
        return {k: self._media.source(v) if k in keys else v for k, v in item.items()}


def _keys_of_source(item: Mapping[str, Any]) -> Collection[str]:
    is_medium = item.get("type") in ("image", "image_url", "video", "video_url")
    return (*_SOURCE_KEYS, "content") if is_medium else _SOURCE_KEYS


def files_of(sample: Mapping[str, Any]) -> list[str] | None:
    """The local files of a sample's media; None if any are fetched, and may change unnoticed."""
    items = (item for message in sample["messages"] for item in _items_of(message))
    sources = [item[key] for item in items for key in _keys_of_source(item) if key in item]
    files = []
    for source in _flat([*sample["images"], *sample["videos"], *sources]):
        scheme = scheme_of(source) if isinstance(source, str) else "data"  # such as bytes
        if isinstance(source, Mapping) or scheme not in ("", "file", "data"):
            return None
        if scheme == "file":
            files.append(path_of_file_url(source))
        elif not scheme and _is_path(source):
            files.append(source)
    return files


def _items_of(message: Any) -> list[Mapping[str, Any]]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return [x for x in content if isinstance(x, Mapping)] if isinstance(content, list) else []


def _flat(sources: Any) -> Iterator[Any]:
    for source in sources:
        if isinstance(source, list):
            yield from _flat(source)
        else:
            yield source


def _is_path(source: str) -> bool:
    encoded = source.encode("utf-8", "surrogatepass")
    parts = encoded.split(b"/")
    return len(encoded) <= _MAX_PATH_BYTES and max(map(len, parts)) <= _MAX_NAME_BYTES


class _Places:
    """What comes in the places of tags in a record's texts.

    For ``<image>`` and ``<video>`` it is an item without a source, which takes the next of the
    record's media; for ``<ref-object>`` and ``<bbox>`` the next of its ``objects``.
    """

    def __init__(self, kinds: Collection[str], objects: Any) -> None:
        self._kinds = kinds
        self._objects = _read_objects(objects)
        self._left = {tag: iter(items) for tag, items in self._objects.items()}
        self._counts: Counter[str] = Counter()

    def fill(self, item: Any, is_answer: bool) -> list[Any]:
        """Make items of one that is a text with tags. In an answer those of media are none."""
        if not isinstance(item, Mapping) or item.get("type") not in ("text", None):
            return [item]
        text = item.get("content") if item.get("text") is None else item["text"]
        if not isinstance(text, str) or not _TAG.search(text):
            return [item]
        if item.get("fields") is not None:
            raise ValueError("its text has tags and fields: give media as items of their own")
        items: list[dict[str, Any]] = []
        for number, piece in enumerate(_TAG.split(text)):  # text, tag, text, ...
            kind = piece[1:-1]
            if number % 2 == 0 or (is_answer and piece not in self._objects):
                part = _text(piece)
            elif piece in self._objects:
                self._counts[piece] += 1
                part = next(self._left[piece], _text(""))  # which check_objects refuses
            elif kind in self._kinds:
                part = {"type": kind}
            else:
                raise ValueError(
                    f"its {piece} is the place of a medium, but the record has none in {kind!r} or "
                    f"'{kind}s': name the column by column_map (where the tag is meant as text, "
                    f"write it as two text items, '<' and '{kind}>')"
                )
            if items and _is_text(items[-1]) and _is_text(part):
                part = _text(items.pop()["text"] + part["text"])
            items.append(part)
        return [part for part in items if part != _text("")] or [_text("")]

    def check_objects(self) -> None:
        """Raise a ValueError if the texts have more or fewer places than there are objects."""
        for tag, given in self._objects.items():
            if len(given) != self._counts[tag]:
                found = f"the messages have {self._counts[tag]} places {tag}, but ms-swift's"
                raise ValueError(f"{found} objects {len(given)} for them: give one for each")


def _read_objects(objects: Any) -> dict[str, list[dict[str, Any]]]:
    """Items by tag of ms-swift's ``objects``, perhaps JSON text, where null is no value."""
    objects = {} if objects is None else from_json_text(objects, "objects")
    is_object = isinstance(objects, Mapping)
    given = {k: v for k, v in objects.items() if v is not None} if is_object else {}
    names, boxes, images = (given.get(key, []) for key in ("ref", "bbox", "image_id"))
    if (
        not is_object
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
    items: dict[str, list[dict[str, Any]]] = {"<ref-object>": [*map(_text, names)], "<bbox>": []}
    unit = _UNITS[given.get("bbox_type", "real")]
    for box, image in zip(boxes, images or [0] * len(boxes), strict=True):
        key = "point_2d" if isinstance(box, list) and len(box) == 2 else "bbox_2d"
        fields = {"bbox": {key: box}}
        items["<bbox>"].append({**_text("{bbox}"), "fields": fields, "image": image, "unit": unit})
    return items


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
