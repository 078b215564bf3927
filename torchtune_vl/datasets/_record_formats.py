"""Records in the formats that people have, to samples as a model's transform takes them."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torchtune_vl.chat._boxes import Unit
from torchtune_vl.datasets._formats import (
    ASKED,
    FORMATS,
    KEYS_OF_MEDIA,
    names_of_columns,
    references,
)
from torchtune_vl.files._json import from_json_text
from torchtune_vl.media._errors import check_choice, naming_sample, shortened
from torchtune_vl.media._sources import path_of_file_url, scheme_of

_SOURCE_KEYS = ("image", "image_url", "video", "video_url", "url", "path")
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
            return self._of_url(source, scheme)
        if not _is_path(source):
            return source
        return self._of_path(source)

    def _of_url(self, url: str, scheme: str) -> Any:
        if scheme == "file":
            self._check(url, path_of_file_url(url))
        return url

    def _of_path(self, source: str) -> Any:
        path = os.path.join(self._directory, source)
        self._check(source, path)
        return path

    @property
    def fingerprint(self) -> tuple[str, bool] | None:
        """Tells it from others in which a record's media are others; None: they may change."""
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


class FileRecord(dict):
    """A record of a file of its own, which may have a medium beside it.

    Args:
        record: what the file says.
        beside: the medium, by the column that it is unless the record names its media.
        media: where media are that the record names; None: where those of the dataset are.
    """

    def __init__(
        self, record: Any, beside: Mapping[str, Any], media: MediaDirectory | None = None
    ) -> None:
        super().__init__({"messages": record} if isinstance(record, list) else record)
        self.beside = beside
        self.media = media


class RecordReader:
    """Makes samples of records.

    Args:
        media: where media are that a record names.
        column_map: names of columns that differ from ours.
        format: of the records, a key of :data:`~torchtune_vl.datasets._formats.FORMATS`.
        prompt: the question about every medium, for formats that have none of their own.
        box_unit: unit of boxes and points that do not say theirs, by default pixels.
    """

    def __init__(
        self,
        media: MediaDirectory,
        column_map: Mapping[str, str],
        format: str = "messages",
        prompt: str | None = None,
        box_unit: Unit | None = None,
    ) -> None:
        if box_unit is not None:
            check_choice("box_unit", box_unit, Unit)
        self._media = media
        self._format = format
        self._names = names_of_columns(FORMATS[format].columns, column_map)
        self._unit = {} if box_unit is None else {"unit": box_unit}
        self._prompt = {"prompt": prompt} if format in ASKED else {}

    def __call__(self, record: Any, number: int) -> dict[str, Any]:
        """Make a sample; errors name it by its id, or else by the number of its record."""
        if isinstance(record, list):
            record = {"messages": record}
        if not isinstance(record, Mapping):
            raise ValueError(f"it is {shortened(repr(record))}, expected an object")
        values = {column: record.get(name) for column, name in self._names.items()}
        name = number if values.get("id") is None else values["id"]
        with naming_sample(name):
            media, beside = self._media, dict[str, Any]()
            if isinstance(record, FileRecord):
                media = record.media or media
                if not any(map(values.get, KEYS_OF_MEDIA)):
                    beside.update(record.beside)
            values |= beside
            messages = self._messages(record, values)
            given = {
                kind: [*_as_list(values.get(kind)), *_as_list(values.get(f"{kind}s"))]
                for kind in ("image", "video")
            }
            places = _Places([k for k in given if given[k]], values.get("objects"), self._unit)
            for place, message in enumerate(messages):
                try:
                    messages[place] = _filled(message, places, media, self._unit)
                except ValueError as error:
                    raise ValueError(f"message {place}: {error}") from error
            places.check_objects()
            for kind in beside:
                items = _media_in(messages, kind)
                if items and all(map(_has_source, items)):
                    given[kind] = []
                elif len(given[kind]) > 1:
                    problem = f"{len(given[kind])} {kind}s lie beside it"
                    raise ValueError(f"{problem}: name them in its .json, in their order, {kind}s")
            if self._format != "messages":
                _put_first(messages, given)
            return {
                "id": name,
                "number": number,
                "messages": messages,
                "images": media.source(given["image"]),
                "videos": media.source(given["video"]),
                "tools": values.get("tools") or None,
                **(references(values) if self._format == "vqa" else {}),
            }

    @property
    def fingerprint(self) -> str | None:
        """Tells it from those that make other samples of the same records; None: media change."""
        if self._media.fingerprint is None:
            return None
        names = sorted(self._names.items())
        return repr((self._media.fingerprint, self._format, names, self._prompt, self._unit))

    def _messages(self, record: Mapping[str, Any], values: Mapping[str, Any]) -> list[Any]:
        """A new list of the messages of a record."""
        chosen = FORMATS[self._format]
        if lacking := chosen.lacks([k for k, value in values.items() if value is not None]):
            raise ValueError(
                f"it has no {', '.join(lacking)}, which the format {self._format!r} needs, but "
                f"{sorted(record)}: correct it, name columns by column_map or set another format"
            )
        system = [{"role": "system", "content": values["system"]}] if values.get("system") else []
        return [*system, *chosen.messages({**values, **self._prompt})]


def _filled(message: Any, places: "_Places", media: MediaDirectory, unit: Mapping[str, str]) -> Any:
    """A message with items in the places of tags, paths of its media resolved, and boxes' unit."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, str | list):
        return message  # the transform says what is wrong with it
    is_answer = message.get("role") == "assistant"
    given = [_text(content)] if isinstance(content, str) else content
    items = [_located(part, media) for item in given for part in places.fill(item, is_answer)]
    if unit:
        items = [{**unit, **item} if _has_boxes(item) else item for item in items]
    if isinstance(content, str) and len(items) == 1 and _is_text(items[0]):
        return {**message, "content": items[0]["text"]}
    return {**message, "content": items}


def _located(item: Any, media: MediaDirectory) -> Any:
    """An item with the paths of its medium resolved."""
    if not isinstance(item, Mapping):
        return item
    keys = _keys_of_source(item)
    return {k: media.source(v) if k in keys else v for k, v in item.items()}


def _has_boxes(item: Any) -> bool:
    return isinstance(item, Mapping) and ("boxes" in item or item.get("fields") is not None)


def _media_in(messages: list[Any], kind: str) -> list[Mapping[str, Any]]:
    """The items of a kind."""
    return [i for message in messages for i in _items_of(message) if _is_medium(i, kind)]


def _is_medium(item: Mapping[str, Any], kind: str) -> bool:
    keys = {kind, f"{kind}_url"}
    return item["type"] in keys if item.get("type") else not keys.isdisjoint(item)


def _has_source(item: Mapping[str, Any]) -> bool:
    return any(item.get(key) is not None for key in (*_SOURCE_KEYS, "content", "base64"))


def _put_first(messages: list[Any], given: Mapping[str, list[Any]]) -> None:
    """Put places for media of a kind that has none before all else that the user says."""
    items = [{"type": kind} for kind in given if not _media_in(messages, kind) for _ in given[kind]]
    if not items:
        return
    roles = [message.get("role") if isinstance(message, Mapping) else "" for message in messages]
    if "user" not in roles:
        raise ValueError("it has images or videos, but no message of the user to put them in")
    number = roles.index("user")
    content = messages[number].get("content")
    rest = [_text(content)] if isinstance(content, str) else content or []
    messages[number] = {**messages[number], "content": [*items, *rest]}


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

    def __init__(self, kinds: Collection[str], objects: Any, unit: Mapping[str, str]) -> None:
        self._kinds = kinds
        self._objects = _read_objects(objects, unit)
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


def _read_objects(objects: Any, unit: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
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
    if "bbox_type" in given or not unit:
        unit = {"unit": _UNITS[given.get("bbox_type", "real")]}
    for box, image in zip(boxes, images or [0] * len(boxes), strict=True):
        key = "point_2d" if isinstance(box, list) and len(box) == 2 else "bbox_2d"
        fields = {"bbox": {key: box}}
        items["<bbox>"].append({**_text("{bbox}"), "fields": fields, "image": image, **unit})
    return items


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _is_text(item: Mapping[str, Any]) -> bool:
    return item.keys() == {"type", "text"}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
