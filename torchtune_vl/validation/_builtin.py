"""Generated inputs, so that a report says something without any file of the user."""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from torchtune_vl.datasets._chat import RowReader
from torchtune_vl.datasets._media_directory import MediaDirectory
from torchtune_vl.validation._inputs import Conversation, Inputs, conversation_of

TEXTS = [
    "What is in this picture? Describe it in one sentence, please.",
    "It's 3:45 already; we'll see whether they DON'T come. 1234567890 + 0.5 = ?",
    "Was steht auf dem Schild? Größe und Maße in Fußnoten.",
    "¿Cuántas personas hay en la fotografía? ¡Muchísimas!",
    "Où se trouve l'œuvre ? À côté de la fenêtre, bien sûr.",
    "На фотографии три кошки и одна собака; сколько всего животных?",
    "Πόσα παράθυρα έχει το σπίτι στη φωτογραφία;",
    "כמה אנשים יושבים ליד השולחן? שָׁלוֹם",
    "كم عدد السيارات في الصورة؟ العدد ١٢٣.",
    "تصویر میں کتنے درخت ہیں؟",
    "तस्वीर में कितने लोग हैं? उत्तर १२३ में दो।",
    "ছবিতে কয়টি পাখি আছে?",
    "படத்தில் எத்தனை பூக்கள் உள்ளன?",
    "มีแมวกี่ตัวในภาพนี้ ตอบสั้นๆ",
    "Trong ảnh có bao nhiêu chiếc xe máy màu đỏ?",
    "图片里的招牌上写着什么？请逐字抄写。",
    "圖中的價格是新臺幣一百二十元嗎？",
    "写真に写っている動物は何ですか。カタカナで答えてください。",
    "사진 속에 몇 명이 있나요? 한국어로 답해 주세요.",
    "სურათზე რამდენი სახლია?",
    "በሥዕሉ ላይ ስንት ዛፎች አሉ?",
    "စာအုပ်ဘယ်နှစ်အုပ်ရှိသလဲ။",
    "e\u0301 and \u00e9, \ufb01 and fi, \u212b and \u00c5, \u1e9b\u0323, o\u0302\u0323",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 👍🏽 1️⃣ ☃",
    "def area(w: int, h: int) -> int:\n    return w * h  # pixels\n\n\nprint(area(28, 28))\n",
    '{"bbox_2d": [12, 34, 560, 780], "label": "car"}',
    "<table>\r\n\t<tr><td>1</td></tr>\r\n</table>",
    "   leading, trailing and \u00a0 odd \u3000 white\u200bspace \t\n\n  \n ",
    "<tool_call>\n{}\n</tool_call><|box_start|>(1,2)<|box_end|><|object_ref_start|>",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>?<|im_end|>",
    "a" * 3000 + " " * 300 + "\n" * 50 + "1" * 40,
    "",
]


def write_builtin(directory: Path) -> Inputs:
    """Write the generated images and the generated video, and make conversations of them."""
    images = {}
    for name, (width, height, suffix, draw) in _IMAGES.items():
        path = directory / f"{name.replace(' ', '_')}.{suffix}"
        draw(width, height).save(path)
        images[f"built-in {name}, {width} x {height} {suffix.upper()}"] = str(path)
    video = str(directory / "moving_square.mp4")
    _write_video(video)
    return Inputs(
        images=images,
        videos={"built-in moving square, 10 frames of 160 x 120": video},
        conversations=_conversations([*images.values()], video),
        texts={"built-in": TEXTS},
    )


def _gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))


def _noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _page(width: int, height: int) -> Image.Image:
    """Thin dark strokes on white, as in a scanned document."""
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for y, text in zip(range(12, height - 12, 14), TEXTS * height, strict=False):
        draw.text((12, y), text[:120].encode("ascii", "replace").decode(), fill="black")
    draw.rectangle((6, 6, width - 7, height - 7), outline="black")
    return page


def _transparent(width: int, height: int) -> Image.Image:
    image = _gradient(width, height).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((width, height)))
    return image


# Enlarged, reduced, kept, neither side a multiple of 28, narrow; by file type
_IMAGES: dict[str, tuple[int, int, str, Callable[[int, int], Image.Image]]] = {
    "single pixel": (1, 1, "png", _noise),
    "tiny noise": (27, 31, "png", _noise),
    "gradient": (224, 224, "png", _gradient),
    "noise": (301, 199, "png", _noise),
    "photograph-like gradient": (640, 480, "jpg", _gradient),
    "photograph-like noise": (333, 517, "jpg", _noise),
    "page of text": (620, 877, "png", _page),
    "screen of text": (1280, 720, "jpg", _page),
    "banner": (1990, 10, "png", _gradient),
    "column": (15, 1490, "png", _noise),
    "transparent": (180, 140, "png", _transparent),
    "gray": (123, 77, "png", lambda width, height: _noise(width, height).convert("L")),
    "palette": (200, 120, "gif", lambda width, height: _gradient(width, height).quantize(64)),
    "webp": (400, 300, "webp", _gradient),
    # One side more than 200 times the other, which both sides have to refuse
    "thread": (2, 500, "png", _noise),
}


def _write_video(path: str) -> None:
    with av.open(path, "w") as container:
        # Lasts longer than its frames are wide, in positions
        stream: Any = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for i in range(10):
            frame = np.asarray(_gradient(160, 120)).copy()
            frame[30:60, 13 * i : 13 * i + 30] = (250, 40, 10)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# Texts of user and assistant in turn, and the numbers of the images that take the places in them
_CONVERSATIONS: dict[str, tuple[list[str], list[int]]] = {
    "text": ([TEXTS[0], "No picture came with it."], []),
    "text, system prompt, four turns": ([t for u in TEXTS[1:5] for t in (u, u[::-1])], []),
    "one image": ([f"<image>{TEXTS[15]}", "一片渐变色。"], [2]),
    "image after the text": ([f"{TEXTS[5]}<image>", "Ни одного."], [3]),
    "three images of several sizes": (
        ["<image> and <image><image>\nCompare them.", "Noise, a gradient and a banner."],
        [1, 4, 8],
    ),
    "images in two turns": (
        ["<image>This?", "A fading gradient.", "And this? <image>", "Gray noise."],
        [10, 11],
    ),
    "ends with a question": (["<image>Which colour?"], [0]),
    "the same image twice without a text": (["<image><image>", "Twice."], [12, 12]),
    "special tokens in texts": ([TEXTS[28], TEXTS[28]], []),
    "video": (["<video>What moves?", "A red square."], []),
    "video between images": (["<image><video><image>Which one moves?", "The second."], [3, 2]),
}
_WITH_SYSTEM_PROMPT = ("text, system prompt, four turns", "three images of several sizes")


def _conversations(images: Sequence[str], video: str) -> list[Conversation]:
    read = RowReader(MediaDirectory("", is_confining=False), {})
    conversations = []
    for name, (texts, numbers) in _CONVERSATIONS.items():
        speakers = cycle(("human", "gpt"))
        row = {
            "conversations": [
                {"from": speaker, "value": text}
                for speaker, text in zip(speakers, texts, strict=False)
            ],
            "system": "Answer briefly.\n" if name in _WITH_SYSTEM_PROMPT else None,
            "images": [images[number] for number in numbers],
            "video": video if "<video>" in texts[0] else None,
        }
        conversations.append(conversation_of(f"built-in {name}", read(row, 0)))
    return conversations
