"""Generated conversations, as torchtune's messages and as transformers' chat."""

import random
from typing import Any

import numpy as np
from PIL import Image
from torchtune.data import Message

TEXTS = (
    "What is in this image?",
    "Describe the differences, please.",
    "这张图片里有什么？",
    "Сколько здесь предметов?\n\n1. два\n2. три",
    " leading and trailing spaces  ",
    "\n\nstarts with line breaks",
    "\t\n mixed white space \r\n",
    "e\u0301 combining, 👩‍👩‍👧 joined, ½ ﬁ",
    "def f(x):\n    return x ** 2  # 1234567890\n",
    "<tool_call>\n{}\n</tool_call><|object_ref_start|>cat<|object_ref_end|>",
    "It's 3:45, we'll see; they've DON'T.",
    ".",
    "",
)


def generate_conversation(seed: int) -> list[dict[str, Any]]:
    """A conversation of 1 to 6 turns with 0 to 4 images, in transformers' format."""
    rng = random.Random(seed)
    roles = ["user", "assistant"] * 3
    turns = roles[: rng.randint(1, 6)]
    if rng.random() < 0.5:
        turns = ["system", *turns]
    conversation: list[dict[str, Any]] = [
        {"role": role, "content": [_text(rng) for _ in range(rng.choice((1, 1, 1, 2, 0)))]}
        for role in turns
    ]
    for _ in range(rng.randint(0, 4)):
        content = rng.choice(conversation)["content"]
        content.insert(rng.randint(0, len(content)), _image(rng))
    return conversation


def as_messages(conversation: list[dict[str, Any]]) -> list[Message]:
    return [
        Message(
            role=turn["role"],
            content=[
                {"type": item["type"], "content": item[item["type"]]} for item in turn["content"]
            ],
        )
        for turn in conversation
    ]


def images_of(conversation: list[dict[str, Any]]) -> list[Image.Image]:
    items = [item for turn in conversation for item in turn["content"]]
    return [item["image"] for item in items if item["type"] == "image"]


def _text(rng: random.Random) -> dict[str, Any]:
    return {"type": "text", "text": "".join(rng.choices(TEXTS, k=rng.randint(1, 2)))}


def _image(rng: random.Random) -> dict[str, Any]:
    height, width = rng.randint(20, 200), rng.randint(20, 200)
    pixels = np.random.default_rng(rng.randint(0, 2**32)).integers(0, 256, (height, width, 3))
    return {"type": "image", "image": Image.fromarray(pixels.astype(np.uint8))}
