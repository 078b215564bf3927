"""Messages and turns in the formats that people have, to messages as transforms read them."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torchtune_vl.files._json import from_json_text

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
_TAG = re.compile("<(image|video|ref-object|bbox)>")
_UNITS = {"real": "pixels", "norm1": "0..1"}


class GroundedObjects:
    """ms-swift's ``objects`` of a row, which fill ``<ref-object>`` and ``<bbox>`` in their order.

    Args:
        objects: ``ref``, names; ``bbox``, boxes [x1, y1, x2, y2] and points [x, y]; ``bbox_type``,
            "real" for pixels (default) or "norm1" for parts of width and height; ``image_id``, the
            number of each box's image, the first by default. Perhaps as JSON text; None: there are
            none.

    Raises:
        ValueError: if it is something else.
    """

    def __init__(self, objects: Any) -> None:
        objects = {} if objects is None else from_json_text(objects, "objects")
        if not isinstance(objects, Mapping):
            raise ValueError(f"objects is of type {type(objects).__name__}, expected a dict")
        given = {key: value for key, value in objects.items() if value is not None}
        unknown = given.keys() - {"ref", "bbox", "bbox_type", "image_id"}
        if unknown:
            raise ValueError(
                f"objects has {sorted(unknown)}, which is not understood; known are ref, bbox, "
                "bbox_type and image_id: correct the column or remove it"
            )
        bbox_type = given.get("bbox_type", "real")
        if bbox_type not in _UNITS:
            raise ValueError(f"the bbox_type of objects is {bbox_type!r}; known are real and norm1")
        for key in ("ref", "bbox", "image_id"):
            if not isinstance(given.get(key, []), list):
                raise ValueError(f"the {key} of objects is no list")
        refs, boxes = given.get("ref", []), given.get("bbox", [])
        image_ids = given.get("image_id") or [0] * len(boxes)
        if len(image_ids) != len(boxes):
            raise ValueError(
                f"objects has {len(boxes)} bbox and {len(image_ids)} image_id: give one for each"
            )
        if not all(isinstance(ref, str) for ref in refs):
            raise ValueError("the ref of objects has what is no text")
        self._counts = {"ref-object": len(refs), "bbox": len(boxes)}
        self._items: dict[str, Iterator[dict[str, Any]]] = {
            "ref-object": iter([_text(ref) for ref in refs]),
            "bbox": iter(
                [
                    _box(box, image, _UNITS[bbox_type])
                    for box, image in zip(boxes, image_ids, strict=True)
                ]
            ),
        }

    def next(self, tag: str) -> dict[str, Any]:
        """Return the item that comes in the place of the next ``<ref-object>`` or ``<bbox>``."""
        item = next(self._items[tag], None)
        if item is None:
            raise ValueError(
                f"its text has the place <{tag}>, but objects has only {self._counts[tag]} for it: "
                "give ms-swift's objects beside the messages"
            )
        return item

    def check_all_used(self) -> None:
        """Raise a ValueError if there are more than places for them."""
        for tag, items in self._items.items():
            left = len(list(items))
            if left:
                raise ValueError(
                    f"objects has {self._counts[tag]} for <{tag}>, but the messages have "
                    f"{self._counts[tag] - left} places <{tag}>"
                )


def read_message(message: Any, media: Collection[str], objects: GroundedObjects) -> Any:
    """Put items without a source, which take the row's media, in the places of tags.

    Args:
        message: in the chat format of transformers or OpenAI.
        media: kinds of media that the row has beside its messages.
        objects: of the row.

    Returns:
        The message with places and boxes as items; if it is no message, it as it is.

    Raises:
        ValueError: if there is a tag and nothing to put there. In an assistant's text ``<image>``
            and ``<video>`` are no tags.
    """
    if not isinstance(message, Mapping):
        return message
    content, is_answer = message.get("content"), message.get("role") == "assistant"
    if isinstance(content, str):
        items = _split(content, is_answer, media, objects)
        texts = [item["text"] for item in items if item.keys() == {"type", "text"}]
        whole = "".join(texts) if len(texts) == len(items) else items
        return {**message, "content": whole}
    if isinstance(content, list):
        split = [part for item in content for part in _parts(item, is_answer, media, objects)]
        return {**message, "content": split}
    return message


def read_turn(turn: Any) -> dict[str, Any]:
    """Make a message of ShareGPT's turn.

    Args:
        turn: ``from`` and ``value``, and perhaps what says whether it carries loss.

    Returns:
        The message.

    Raises:
        ValueError: if it is no turn, or nobody known speaks.
    """
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise ValueError(f"{turn!r} is no turn such as {{'from': 'human', 'value': ...}}")
    speaker, text = turn.get("from"), turn["value"]
    if speaker not in _ROLES:
        raise ValueError(f"a turn is from {speaker!r}; known are {', '.join(_ROLES)}")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        calls = from_json_text(text, f"the function call {text!r}")
        calls = calls if isinstance(calls, list) else [calls]
        return {**others, "role": "assistant", "tool_calls": calls}
    return {**others, "role": _ROLES[speaker], "content": text}


def _parts(
    item: Any, is_answer: bool, media: Collection[str], objects: GroundedObjects
) -> list[Any]:
    """An item, or what a text with tags becomes."""
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
    return _split(text, is_answer, media, objects)


def _split(
    text: str, is_answer: bool, media: Collection[str], objects: GroundedObjects
) -> list[dict[str, Any]]:
    pieces = _TAG.split(text)  # text, tag, text, ...
    items = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            items += [_text(piece)] if piece or len(pieces) == 1 else []
        elif piece in ("ref-object", "bbox"):
            items.append(objects.next(piece))
        elif is_answer:
            items.append(_text(f"<{piece}>"))
        elif piece in media:
            items.append({"type": piece})
        else:
            raise ValueError(
                f"its <{piece}> is the place of a medium, but the row has none in {piece!r} or "
                f"'{piece}s': name the column by column_map (where the tag is meant as text, write "
                f"it as two text items, '<' and '{piece}>')"
            )
    return items


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _box(box: Any, image: Any, unit: str) -> dict[str, Any]:
    key = "point_2d" if isinstance(box, list) and len(box) == 2 else "bbox_2d"
    return {**_text("{bbox}"), "fields": {"bbox": {key: box}}, "image": image, "unit": unit}
