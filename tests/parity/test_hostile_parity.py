"""Every hostile input gives the reference's output, or an error that says what to do."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2TokenizerFast, Qwen2VLImageProcessor
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests import hostile
from tests.parity.figures import record
from torchtune_vl.chat import CHAT_TEMPLATE
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform

SIZE = {"shortest_edge": 3136, "longest_edge": 1003520}
REFERENCES = {"torchvision": Qwen2VLImageProcessor, "pil": Qwen2VLImageProcessorPil}
MEMORY = 2**30


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # transformers lets through whatever its decoders raise
        return error


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return hostile.write(hostile.image_files(), tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def video_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return hostile.write(hostile.video_files(), tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module", params=["torchvision", "pil"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def transform_of(vocabulary: Path, **settings: Any) -> Qwen2_5_VLTransform:
    from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_transform

    return qwen2_5_vl_transform(
        vocabulary / "tokenizer.json", max_pixels=SIZE["longest_edge"], **settings
    )


@pytest.fixture(autouse=True)
def _no_leak() -> Any:
    files = open_files()
    yield
    assert open_files() <= files


@pytest.mark.slow
def test_memory(vocabulary: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hostile", vocabulary / "tokenizer.json", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert int(run.stdout.split()[-1]) < MEMORY


def test_there_are_many(image_paths: dict[str, Path], video_paths: dict[str, Path]) -> None:
    assert len(image_paths) + len(video_paths) >= 60


@pytest.mark.filterwarnings("ignore")
def test_images(vocabulary: Path, image_paths: dict[str, Path], backend: str) -> None:
    transform = transform_of(vocabulary, image_backend=backend)
    processor = REFERENCES[backend](size=SIZE)
    for name, path in image_paths.items():
        content = [{"type": "image", "image": str(path)}]
        sample = {"messages": [{"role": "user", "content": content}], "id": 7}
        ours = outcome(lambda sample=sample: transform(sample))
        expected = outcome(
            lambda path=path: processor(images=[load_image(str(path))], return_tensors="pt")
        )
        if isinstance(ours, Exception):
            assert isinstance(ours, ValueError), (name, ours)
            assert str(ours).startswith("sample 7: message 0 (user): item 0: image "), name
            assert name in str(ours)
            assert isinstance(expected, Exception), (name, ours)
        else:
            assert not isinstance(expected, Exception), (name, expected)
            patches = ours["encoder_input"]["vision"]["patches"]
            assert torch.equal(patches, expected["pixel_values"]), name
        record(f"hostile images, {backend} backend", 1, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda d: d / "missing.jpg",
        lambda d: d,
        lambda d: _made(d, lambda p: os.mkfifo(p)),
        lambda d: _made(d, lambda p: p.symlink_to(p)),
        lambda d: Path("/dev/zero"),
        lambda d: d / ("x" * 5000),
        lambda d: d / "nul\0byte.jpg",
    ],
    ids=["missing", "directory", "pipe", "link to itself", "device", "long name", "zero byte"],
)
def test_paths_of_no_file(vocabulary: Path, tmp_path: Path, make: Any) -> None:
    path = make(tmp_path)
    for kind in ("image", "video"):
        content = [{"type": kind, kind: str(path)}]
        with pytest.raises(ValueError, match=f"sample 7: message 0 .*item 0: {kind} "):
            transform_of(vocabulary)({"messages": [{"role": "user", "content": content}], "id": 7})


def _made(directory: Path, make: Callable[[Path], None]) -> Path:
    make(directory / "special")
    return directory / "special"


def test_videos(vocabulary: Path, video_paths: dict[str, Path]) -> None:
    """Whatever can be decoded whole is, and nothing else is made up."""
    transform = transform_of(vocabulary)
    for name, path in video_paths.items():
        content = [{"type": "video", "video": str(path)}]
        sample = {"messages": [{"role": "user", "content": content}], "id": 7}
        ours = outcome(lambda sample=sample: transform(sample))
        if isinstance(ours, Exception):
            assert isinstance(ours, ValueError), (name, ours)
            assert str(ours).startswith("sample 7: message 0 (user): item 0: video "), (name, ours)
            assert name in str(ours)
        else:
            assert torch.isfinite(ours["encoder_input"]["vision"]["patches"]).all()
        record("hostile videos", 1, 0)
    whole = {"video": str(video_paths["mp4-called.webm"])}
    assert "encoder_input" in transform({"messages": [{"role": "user", "content": [whole]}]})


def test_conversations(vocabulary: Path) -> None:
    transform = transform_of(vocabulary)
    image = Image.fromarray(hostile.noise(28, 28, 3))
    tokenizer = Qwen2TokenizerFast.from_pretrained(vocabulary)
    for name, sample in hostile.conversations(image):
        ours = outcome(lambda sample=sample: transform({**sample, "id": 7}))
        if isinstance(ours, Exception):
            assert isinstance(ours, ValueError), (name, ours)
            assert str(ours).startswith("sample 7: "), (name, ours)
            record("hostile conversations", 1, 0)
            continue
        assert len(ours["tokens"]) == len(ours["mask"]) == len(ours["input_pos"]), name
        structure = [t for t in ours["tokens"] if t in (151644, 151645)]
        turns = len(sample["messages"]) + (sample["messages"][0]["role"] != "system")
        assert structure == [151644, 151645] * turns, name
        if name not in ("forged", "placeholders without images", "10,000 images", "role of tokens"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text = tokenizer.apply_chat_template(
                    sample["messages"], chat_template=CHAT_TEMPLATE, tokenize=False
                )
                assert ours["tokens"] == tokenizer(text)["input_ids"], name
        record("hostile conversations", 1, 0)


def test_ten_thousand_images(vocabulary: Path) -> None:
    image = Image.fromarray(hostile.noise(28, 28, 3))
    sample = dict(hostile.conversations(image))["10,000 images"]
    transformed = transform_of(vocabulary, patch_dtype="uint8")(sample)
    assert len(transformed["encoder_input"]["vision"]["grid_thw"]) == 10_000
    assert transformed["tokens"].count(151655) == 40_000


def test_an_endless_animation_is_its_first_frame(vocabulary: Path) -> None:
    frames = [Image.fromarray(hostile.noise(56, 56, 3, seed=i)) for i in range(3)]
    gif = hostile.encode(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = transform_of(vocabulary)(
            {"messages": [{"role": "user", "content": [{"image": gif}]}]}
        )
    first = Image.open(hostile.io.BytesIO(gif)).convert("RGB")
    expected = Qwen2VLImageProcessor(size=SIZE)(images=[first], return_tensors="pt")
    patches = sample["encoder_input"]["vision"]["patches"]
    assert torch.equal(patches, expected["pixel_values"])
    assert np.array(first).std() > 0
