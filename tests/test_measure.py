"""Sizes of samples before their media are decoded: those that the transform gives."""

import base64
import contextlib
import io
import re
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from tests import hostile
from tests.conversations import generate_conversation
from tests.videos import CLIPS, write_clip
from torchtune_vl.chat._transform import _naming
from torchtune_vl.media import _images as images
from torchtune_vl.media._videos import Video
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform, Qwen2_5_VLVideoTransform

ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.fixture(scope="module")
def transform(vocabulary: Path) -> Qwen2_5_VLTransform:
    return Qwen2_5_VLTransform(vocabulary / "tokenizer.json")


def with_setting(transform: Qwen2_5_VLTransform, **changed: Any) -> Qwen2_5_VLTransform:
    """The transform with other attributes, without reading the vocabulary again."""
    other = Qwen2_5_VLTransform.__new__(Qwen2_5_VLTransform)
    other.__dict__ = {**transform.__dict__, **changed}
    return other


def asking(*items: dict[str, Any]) -> dict[str, Any]:
    return {"id": "s", "messages": [{"role": "user", "content": list(items)}, ANSWER]}


def size_of(
    transform: Qwen2_5_VLTransform, sample: Any, inference: bool = False
) -> tuple[int, int, int]:
    """Size of the transformed sample, which is refused if training learns nothing from it."""
    made = transform(sample, inference)
    if not inference:
        with _naming(sample):
            transform.check_supervised(made["tokens"], made["mask"])
    vision = made.get("encoder_input", {}).get("vision", {"patches": ()})
    return len(made["tokens"]), len(vision["patches"]), made["mask"][1:].count(False)


def outcome(function: Callable[[Any], Any], sample: Any) -> Any:
    """What a function returns, or the text of its error."""
    try:
        return function(sample)
    except ValueError as error:
        return re.sub("<_io[^>]*>", "a file", str(error))


def check(transform: Qwen2_5_VLTransform, sample: Any) -> None:
    """The size is that of the transformed sample; where it has none, the error is the same."""
    expected = outcome(lambda s: size_of(transform, s), sample)
    assert outcome(lambda s: transform.examine(s)[0], sample) == expected


def check_damaged(transform: Qwen2_5_VLTransform, sample: Any) -> None:
    """As :func:`check`, but that decoding may find what the header does not tell."""
    expected = outcome(lambda s: size_of(transform, s), sample)
    measured = outcome(lambda s: transform.examine(s)[0], sample)
    if isinstance(measured, str) or not isinstance(expected, str):
        assert measured == expected


@given(
    seed=st.integers(0, 10_000),
    limit=st.one_of(st.none(), st.integers(1, 600)),
    truncation=st.sampled_from(["right", "left", "turns"]),
    inference=st.booleans(),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_conversations_of_every_length(
    transform: Qwen2_5_VLTransform,
    seed: int,
    limit: int | None,
    truncation: str,
    inference: bool,
) -> None:
    limited = with_setting(transform, max_seq_len=limit, truncation=truncation)
    sample = {"id": seed, "messages": generate_conversation(seed)}
    expected = outcome(lambda s: size_of(limited, s, inference), sample)
    assert outcome(lambda s: limited.examine(s, inference)[0], sample) == expected


def test_hostile_conversations(transform: Qwen2_5_VLTransform) -> None:
    image = Image.fromarray(hostile.noise(28, 28, 3))
    for name, sample in hostile.conversations(image):
        if "a million" not in name and "10,000 images" not in name:
            check(transform, sample)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_damaged_files(transform: Qwen2_5_VLTransform, tmp_path: Path, kind: str) -> None:
    files = hostile.image_files() if kind == "image" else hostile.video_files()
    small = Qwen2_5_VLVideoTransform(max_pixels=128 * 28 * 28)
    transform = with_setting(transform, video_transform=small)
    transform.image_transform.max_pixels, before = 200_000, transform.image_transform.max_pixels
    sizes = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, path in hostile.write(files, tmp_path).items():
            if "bomb-of-zeros" in name:  # seconds to decode
                continue
            for source in (str(path), path.read_bytes()):
                sample = asking({"type": kind, kind: source})
                check_damaged(transform, sample)
                sizes += not isinstance(outcome(lambda s: transform.examine(s)[0], sample), str)
    transform.image_transform.max_pixels = before
    assert sizes >= 8


def test_missing_files(transform: Qwen2_5_VLTransform, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for source in ("none.jpg", tmp_path, tmp_path / "empty", "https://a.org/b.jpg", "a\0b", b""):
        check(transform, asking({"type": "image", "image": source}))
        assert isinstance(
            outcome(transform.examine, asking({"type": "image", "image": source})), str
        )


def test_sources(transform: Qwen2_5_VLTransform, tmp_path: Path) -> None:
    pixels = hostile.noise(70, 130, 3)
    picture = Image.fromarray(pixels)
    encoded = hostile.encode(picture, "JPEG")
    path = tmp_path / "a picture.jpg"
    path.write_bytes(encoded)
    text = base64.b64encode(encoded).decode()
    with path.open("rb") as handle:
        for source in (
            *(str(path), path, path.as_uri(), f"file://{path}", encoded, bytearray(encoded)),
            *(handle, io.BytesIO(encoded), text, f"data:image/jpeg;base64,{text}"),
            *(picture, picture.convert("LA"), picture.convert("P"), Image.open(path)),
            *(pixels, pixels[..., 0], pixels[::-1], np.dstack([pixels, pixels[..., :1]])),
            *(torch.from_numpy(pixels), torch.from_numpy(pixels).permute(2, 0, 1)),
            *(pixels.astype(float), pixels[None], np.empty((0, 9, 3), np.uint8), 5, None),
        ):
            check(transform, asking({"type": "image", "image": source}))


LIMITS: list[dict[str, Any]] = [
    {"min_pixels": 50_000},
    {"max_pixels": 4_000},
    {"resized_height": 90, "resized_width": 300},
    {"resized_height": 90},
    {"max_pixels": 0},
    {"min_pixels": 9_000, "max_pixels": 8_000},
]


@pytest.mark.parametrize("limits", LIMITS)
def test_limits_of_an_image(transform: Qwen2_5_VLTransform, limits: dict[str, Any]) -> None:
    check(transform, asking({"type": "image", "image": hostile.noise(80, 150, 3), **limits}))


def late_exif(exif: bytes) -> bytes:
    """A PNG whose EXIF comes after its pixels."""
    data = zlib.compress(bytes(151 * 80))
    png = hostile.png_of(150, 80, data)
    chunk = hostile._chunk(b"eXIf", exif)
    return png[: png.index(b"IEND") - 4] + chunk + png[png.index(b"IEND") - 4 :]


def oriented_files() -> dict[str, bytes]:
    """Files of 150 x 80 pixels, of which the formats that can say that they lie on their side."""
    picture = Image.fromarray(hostile.noise(80, 150, 3))
    files = {}
    for orientation in (1, 3, 5, 6, 8):
        exif = hostile.orientation_exif(orientation)
        jpeg, cmyk = (hostile.encode(p, "JPEG") for p in (picture, picture.convert("CMYK")))
        files |= {
            f"jpeg {orientation}": hostile.with_exif(jpeg, exif),
            f"cmyk jpeg {orientation}": hostile.with_exif(cmyk, exif),
            f"png {orientation}": hostile.encode(picture, "PNG", exif=exif),
            f"late png {orientation}": late_exif(exif),
            f"webp {orientation}": hostile.encode(picture, "WEBP", exif=exif),
            f"tiff {orientation}": hostile.encode(picture, "TIFF", tiffinfo={274: orientation}),
        }
    for file_format in ("GIF", "BMP", "PPM", "TGA", "ICO", "MPO"):
        files[file_format] = hostile.encode(picture, file_format)
    return files


@pytest.mark.parametrize("name", oriented_files())
def test_boxes_lie_in_the_upright_image(transform: Qwen2_5_VLTransform, name: str) -> None:
    data = oriented_files()[name]
    # The text of both depends on which side is which
    for box in ([1, 2, 79, 149], [1, 2, 149, 79], [3, 5, 9, 70]):
        item = {"type": "boxes", "boxes": [{"bbox_2d": box, "label": "x"}]}
        check(transform, asking({"type": "image", "image": data}, item))


def test_pixels_are_not_decoded(
    transform: Qwen2_5_VLTransform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write_clip(tmp_path / "clip.mp4", CLIPS["H.264, B-frames"])
    clip_sample = asking({"type": "video", "video": str(clip)})
    named = ("jpeg", "png", "webp", "GIF", "BMP", "MPO")
    samples = [
        asking({"type": "image", "image": data})
        for name, data in oriented_files().items()
        if name.startswith(named)
    ]
    expected = [size_of(transform, sample) for sample in (*samples, clip_sample)]

    def decode(*_: object) -> None:
        raise AssertionError("decodes")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    monkeypatch.setattr(images, "_decode_jpeg", decode)
    monkeypatch.setattr(Video, "_decoded", decode)
    assert [transform.examine(sample)[0] for sample in (*samples, clip_sample)] == expected


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


KINDS = (
    "H.264, B-frames",
    "H.264, open GOPs, stream",
    "H.264, 4:4:4, odd",
    "H.264, variable rate, Matroska",
    "H.264, edit list",
    "H.264 in AVI",
    "H.264, 60 frames/s",
    "H.264, upright",
    "VP9, odd",
    "MPEG-2, stream",
    "GIF",
)
VIDEO_SETTINGS: list[dict[str, Any]] = [
    {},
    {"fps": 7.5},
    {"nframes": 6},
    {"nframes": 600},
    {"video_start": 0.1, "video_end": 0.9},
    {"min_frames": 8, "max_frames": 10},
    {"frame_indices": [0, 1, 5]},
    {"frame_indices": [0, 1000]},
    {"max_pixels": 150_000, "total_pixels": 400_000},
    {"resized_height": 100, "resized_width": 300},
    {"sample_fps": 3},
]


@pytest.mark.parametrize("kind", KINDS)
def test_videos(transform: Qwen2_5_VLTransform, clips: Path, kind: str) -> None:
    small = Qwen2_5_VLVideoTransform(min_pixels=28 * 28, max_pixels=40 * 28 * 28)
    path = write_clip(clips / f"{KINDS.index(kind)}.{CLIPS[kind].suffix}", CLIPS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given_settings in VIDEO_SETTINGS:
            sample = asking({"type": "video", "video": str(path), **given_settings})
            check(with_setting(transform, video_transform=small), sample)
    check(transform, asking({"type": "video", "video": path.read_bytes()}))


def test_frames(transform: Qwen2_5_VLTransform) -> None:
    frames = hostile.noise(5, 60, 90, 3)
    encoded = [hostile.encode(Image.fromarray(frame), "PNG") for frame in frames]
    sideways = hostile.with_exif(
        hostile.encode(Image.fromarray(hostile.noise(90, 60, 3)), "JPEG"),
        hostile.orientation_exif(6),
    )
    for video in (
        *(frames, torch.from_numpy(frames), frames.transpose(0, 3, 1, 2), frames[:1], frames[:0]),
        *(list(frames), encoded, tuple(encoded), [*encoded, sideways], [], [b"no image"] * 2),
        *([*encoded, frames[0, 1:]], frames[0], frames.astype(float)),
    ):
        for given_settings in ({}, {"sample_fps": 4.0}, {"fps": 1}, {"min_pixels": 200_000}):
            check(transform, asking({"type": "video", "video": video, **given_settings}))


def test_templates_and_numbered_media(vocabulary: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{% for i in m.content %}"
        "{% if i.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
        "{{ i.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    )
    sample = asking(
        {"type": "image", "image": hostile.noise(60, 90, 3)}, {"type": "text", "text": "Which?"}
    )
    for changed in ({"add_vision_id": True}, {"chat_template": template}):
        check(Qwen2_5_VLTransform(vocabulary / "tokenizer.json", **changed), sample)


def test_a_handle_stays_where_it_is(transform: Qwen2_5_VLTransform) -> None:
    file = io.BytesIO(hostile.encode(Image.fromarray(hostile.noise(60, 90, 3)), "PNG"))
    file.seek(7)
    with contextlib.closing(file):
        transform.examine(asking({"type": "image", "image": file}))
        assert file.tell() == 7
