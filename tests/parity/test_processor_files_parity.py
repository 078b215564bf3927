"""Exported processor files: what transformers makes of them is what training saw."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLProcessor

from quickstart.checkpoint import write_tiny_checkpoint
from tests.parity.figures import record
from tests.videos import Clip, write_clip, x264
from torchtune_vl.chat import CHAT_TEMPLATE
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform

TOKEN = 28 * 28
OTHER_TEMPLATE = CHAT_TEMPLATE.replace("You are a helpful assistant.", "Count what you see.")


@pytest.fixture(scope="module", params=["as published", "saved by transformers 5"])
def base(
    request: pytest.FixtureRequest, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("base")
    write_tiny_checkpoint(directory, vocabulary)
    (directory / "model.safetensors").unlink()
    if request.param == "as published":
        return directory
    saved = tmp_path_factory.mktemp("saved")
    AutoProcessor.from_pretrained(directory).save_pretrained(saved)
    assert "image_processor" in (saved / "processor_config.json").read_text()
    shutil.copy(directory / "config.json", saved)
    return saved


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clip = Clip("mp4", frames=63, rate=9, size=(90, 130), options=x264("keyint=9"))
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", clip)


def drawn_settings(seed: int, directory: Path) -> dict[str, Any]:
    rng = random.Random(seed)
    least, frame_least = rng.randint(1, 30) * TOKEN, rng.randint(1, 20) * TOKEN
    settings: dict[str, Any] = {
        "min_pixels": least,
        "max_pixels": least + rng.randint(0, 60_000),
        "video_min_pixels": frame_least,
        "video_max_pixels": frame_least + rng.randint(0, 40_000),
        "video_total_pixels": rng.choice([30, 90, 300, 128_000]) * 10 * TOKEN * 9 // 10,
        "fps": rng.choice([0.5, 1, 2.0, 3.7, 30]),
        "min_frames": rng.choice([0, 3, 4, 9]),
        "max_frames": rng.choice([11, 24, 768]),
        "add_vision_id": rng.random() < 0.5,
        "patch_dtype": "float32",
    }
    if rng.random() < 0.4:
        settings["image_mean"] = [0.5, 0.4, 0.3]
    if rng.random() < 0.4:
        settings["chat_template_file"] = directory / "other.jinja"
        settings["chat_template_file"].write_text(OTHER_TEMPLATE)
    return settings


def export(base: Path, transform: Qwen2_5_VLTransform, directory: Path) -> Path:
    shutil.copytree(base, directory)
    for name, text in transform.processor_files().items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def frames_of(path: Path, indices: list[int]) -> torch.Tensor:
    from torchtune_vl.media._videos import open_video

    with open_video(path) as video:
        return torch.from_numpy(np.stack(list(video.frames(indices)))).permute(0, 3, 1, 2)


def reference(
    processor: Qwen2_5_VLProcessor, messages: list[Any], images: list[Any], **videos: Any
) -> dict[str, Any]:
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(text=[text], images=images, return_tensors="pt", **videos)


@pytest.mark.parametrize(
    "seed", [n if n < 1 else pytest.param(n, marks=pytest.mark.slow) for n in range(8)]
)
def test_servers_see_what_training_saw(seed: int, base: Path, clip: Path, tmp_path: Path) -> None:
    settings = drawn_settings(seed, tmp_path)
    transform = Qwen2_5_VLTransform.from_pretrained(base, **settings)
    exported = export(base, transform, tmp_path / "exported")
    processor = AutoProcessor.from_pretrained(exported)
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 400, (2, 2))
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in sizes]
    content = [
        {"type": "image", "image": images[0]},
        {"type": "video", "video": str(clip)},
        {"type": "image", "image": images[1]},
        {"type": "text", "text": "What changes?"},
    ]
    messages = [{"role": "user", "content": content}]
    ours = transform({"messages": messages}, inference=True)
    video = transform.video_transform({"video": str(clip)})
    metadata = {"fps": 9.0, "total_num_frames": 63, "frames_indices": video["frame_indices"]}
    theirs = reference(
        processor,
        messages,
        images,
        videos=[frames_of(clip, video["frame_indices"])],
        video_metadata=[metadata],
    )
    assert ours["tokens"] == theirs["input_ids"][0].tolist()
    assert theirs["second_per_grid_ts"].tolist() == [pytest.approx(video["seconds_per_step"])]
    assert (
        theirs["image_grid_thw"].tolist()
        == ours["encoder_input"]["vision"]["grid_thw"][[0, 2]].tolist()
    )
    patches = ours["encoder_input"]["vision"]["patches"].split(
        ours["encoder_input"]["vision"]["grid_thw"].prod(1).tolist()
    )
    assert torch.equal(theirs["pixel_values_videos"], patches[1])
    assert torch.equal(theirs["pixel_values"], torch.cat([patches[0], patches[2]]))

    # Of a whole file it takes as many frames if it is asked to choose
    every = frames_of(clip, list(range(63)))
    chosen = reference(
        processor,
        messages,
        images,
        videos=[every],
        video_metadata=[{"fps": 9.0, "total_num_frames": 63}],
        videos_kwargs={"do_sample_frames": True},
    )
    assert ours["tokens"] == chosen["input_ids"][0].tolist()
    record("exported processor files: ids, grids, pixels", 1, 0)

    again = Qwen2_5_VLTransform.from_pretrained(exported)
    assert again.processor_files() == transform.processor_files()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    if "chat_template_file" in settings:
        assert tokenizer.chat_template == transform.chat_template == processor.chat_template
    else:
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_processors_of_others_state_no_limits_of_videos(base: Path) -> None:
    """Theirs hold the limits of images, up to 16,384 tokens a frame."""
    videos = Qwen2_5_VLTransform.from_pretrained(base).video_transform
    assert (videos.min_pixels, videos.max_pixels) == (128 * TOKEN, 768 * TOKEN)
