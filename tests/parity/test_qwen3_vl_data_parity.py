"""Qwen3-VL's conversations, images and videos beside transformers.

Where releases of transformers disagree, about what stands around a video, ours is the text of 4.57:
the tests take away what later ones keep there, and one of them says what that is.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from transformers.video_utils import VideoMetadata

from quickstart.checkpoint import QWEN3_VL_PROCESSOR
from quickstart.vocabulary import write_vocabulary
from tests.conversations import TEXTS
from tests.parity.figures import record
from tests.parity.test_chat_features_parity import call, tool
from tests.videos import CLIPS, Clip, write_clip, x264
from torchtune_vl.media._videos import open_video
from torchtune_vl.models.qwen3_vl import (
    Qwen3_VLImageTransform,
    Qwen3_VLTransform,
    Qwen3_VLVideoTransform,
)

# As published
IMAGES = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    **QWEN3_VL_PROCESSOR,
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
VIDEOS = {
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    **QWEN3_VL_PROCESSOR,
    "video_processor_type": "Qwen3VLVideoProcessor",
}
TEMPLATES = {
    "instruct": "3636d0f0bd6bef02654cdffdc447b79cb2cef8ab02cc75267345946291a489e4",
    "thinking": "36e042fe45641f067b1f2381fcc8955d10d956a3ed333ecdf7f7eb0916f68956",
}
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
RATES = (0.5, 1, 2.0, 3, 7.5, 23.976, 24, 29.97, 30, 59.94, 1 / 3)
THOUGHTS = ("", "Hm.\n", "\n\nLet me see", "a <b> c", "数一数\n\n", " two\n\nlines ")


def template_of(kind: str) -> str:
    marked = (
        Path(Qwen3_VLTransform.__module__.replace(".", "/")).parent / f"{kind}.jinja"
    ).read_text()
    for mark in (r"\ufdd0", r"\ufdd1", r"\ufddf"):
        marked = marked.replace(mark, "")
    return marked


@pytest.fixture(scope="module", params=["instruct", "thinking"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer_files(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of the family, with four more added tokens."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_vocabulary(Qwen3_VLTransform(vocabulary / "qwen.tiktoken"), directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(kind: str, tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(kind)
    for path in tokenizer_files.iterdir():
        (directory / path.name).symlink_to(path)
    (directory / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    (directory / "video_preprocessor_config.json").write_text(json.dumps(VIDEOS))
    template = {"chat_template": template_of(kind)}
    (directory / "chat_template.json").write_text(json.dumps(template))
    return directory


@pytest.fixture(scope="module")
def transform(checkpoint: Path) -> Qwen3_VLTransform:
    made = Qwen3_VLTransform.from_pretrained(checkpoint)
    assert isinstance(made, Qwen3_VLTransform)
    return made


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Qwen3VLProcessor:
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert isinstance(processor, Qwen3VLProcessor)
    assert isinstance(processor.video_processor, Qwen3VLVideoProcessor)
    assert processor.image_processor.size["longest_edge"] == 16777216
    return processor


@pytest.fixture(scope="module")
def model() -> Qwen3VLForConditionalGeneration:
    text = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "head_dim": 64}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 1, "deepstack_visual_indexes": [0]}
    with torch.device("meta"):
        return Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=vision)
        )


def image(rng: random.Random) -> dict[str, Any]:
    height, width = rng.randint(20, 300), rng.randint(20, 300)
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3))
    return {"type": "image", "image": Image.fromarray(pixels.astype(np.uint8))}


def video(rng: random.Random) -> dict[str, Any]:
    shape = (rng.randint(2, 13), rng.randint(10, 90), rng.randint(10, 90), 3)
    frames = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, shape, np.uint8)
    return {"type": "video", "video": frames, "sample_fps": rng.choice(RATES)}


def content(rng: random.Random, media: float = 0.5) -> str | list[dict[str, Any]]:
    texts = [*TEXTS, "look:", "<tool_response>", "</tool_response>", "a<"]
    if rng.random() < 0.3:
        return "".join(rng.choices(texts, k=rng.randint(1, 2)))
    items: list[dict[str, Any]] = [
        {"type": "text", "text": "".join(rng.choices(texts, k=2))} for _ in range(rng.randint(2, 3))
    ]
    while rng.random() < media:
        make = rng.choice((image, video))
        items.insert(rng.randint(0, len(items)), make(rng))
    return items


def answer(rng: random.Random, kind: str) -> dict[str, Any]:
    turn = {"role": "assistant", "content": content(rng, media=0.2 if kind == "thinking" else 0)}
    if rng.random() < 0.4:
        turn["tool_calls"] = [call(rng) for _ in range(rng.randint(1, 2))]
    thought = rng.choice(THOUGHTS)
    way = rng.choice(("none", "key", "tags", "end"))
    if way == "key" and kind == "thinking":  # others leave it out, which is refused
        turn["reasoning_content"] = thought
    if way in ("tags", "end"):
        before = f"<think>{thought}</think>" if way == "tags" else f"{thought}</think>"
        if isinstance(turn["content"], str):
            turn["content"] = before + turn["content"]
        elif not media_of([turn]):  # those in a thought that is left out have no place
            place = rng.randint(0, len(turn["content"]))
            turn["content"].insert(place, {"type": "text", "text": before})
    return turn


def conversation_of(seed: int, kind: str) -> list[dict[str, Any]]:
    """One with tools, thoughts, images and videos, wherever the template has a place for them."""
    rng = random.Random(seed)
    in_answers = 0.4 if kind == "thinking" else 0
    turns: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        turns.append({"role": "system", "content": content(rng, in_answers)})
    for _ in range(rng.randint(1, 3)):
        turns.append({"role": "user", "content": content(rng)})
        while rng.random() < 0.4:
            turns.append(answer(rng, kind))
            turns += [
                {"role": "tool", "content": content(rng, 0.3)} for _ in range(rng.randint(0, 2))
            ]
        if kind == "thinking" and rng.random() < 0.2:
            turns.append({"role": "system", "content": content(rng, in_answers)})
        if rng.random() < 0.8:
            turns.append(answer(rng, kind))
    return turns


def media_of(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    items = [item for turn in conversation for item in turn["content"] if isinstance(item, dict)]
    return [item for item in items if item["type"] != "text"]


def reference(
    processor: Qwen3VLProcessor,
    conversation: list[dict[str, Any]],
    wrapped: bool = False,
    **rendering: Any,
) -> dict[str, torch.Tensor]:
    """What transformers makes of it, without the tokens around a video that 4.57 took away."""
    text = processor.apply_chat_template(conversation, tokenize=False, **rendering)
    videos = [item for item in media_of(conversation) if item["type"] == "video"]
    images = [item["image"] for item in media_of(conversation) if item["type"] == "image"]
    metadata = [
        {
            "fps": item["sample_fps"],
            "total_num_frames": len(item["video"]),
            "frames_indices": list(range(len(item["video"]))),
        }
        for item in videos
    ]
    return processor(
        text=[text if wrapped else text.replace(VIDEO, "<|video_pad|>")],
        images=images or None,
        videos=[torch.from_numpy(v["video"]).permute(0, 3, 1, 2) for v in videos] or None,
        video_metadata=metadata or None,
        videos_kwargs={"do_sample_frames": False, "cap_pixels_per_frame": False},
        return_tensors="pt",
    )


def check_media(
    sample: dict[str, Any], expected: dict[str, torch.Tensor], kinds: list[str], what: Any
) -> None:
    vision = sample["encoder_input"]["vision"]
    patches = vision["patches"].split(vision["grid_thw"].prod(1).tolist())
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        ours = [place for place, k in enumerate(kinds) if k == kind]
        if ours:
            assert torch.equal(vision["grid_thw"][ours], expected[f"{kind}_grid_thw"]), what
            assert torch.equal(torch.cat([patches[i] for i in ours]), expected[pixels]), what


def check(
    transform: Qwen3_VLTransform,
    processor: Qwen3VLProcessor,
    model: Qwen3VLForConditionalGeneration,
    seed: int,
) -> None:
    kind = "thinking" if "<think>" in processor.chat_template else "instruct"
    conversation = conversation_of(seed, kind)
    rng = random.Random(seed)
    tools = [tool(rng) for _ in range(rng.choice((0, 0, 1, 2)))]
    inference = rng.random() < 0.3
    if conversation[-1]["role"] == "assistant" and not conversation[-1]["content"]:
        inference = False  # torchtune's way to ask for an answer
    rendering = {"tools": tools or None, "add_generation_prompt": inference}
    expected = reference(processor, conversation, add_vision_id=seed % 3 == 0, **rendering)
    transform.prompts.add_vision_id = seed % 3 == 0
    sample = transform({"messages": conversation, "tools": tools}, inference=inference)
    transform.prompts.add_vision_id = False
    assert sample["tokens"] == expected["input_ids"][0].tolist(), seed

    positions, _ = model.model.get_rope_index(
        expected["input_ids"],
        expected["mm_token_type_ids"],
        image_grid_thw=expected.get("image_grid_thw"),
        video_grid_thw=expected.get("video_grid_thw"),
    )
    assert torch.equal(sample["input_pos"], positions[:, 0].T), seed
    kinds = [item["type"] for item in media_of(conversation)]
    if kinds:
        check_media(sample, expected, kinds, seed)
    record(f"Qwen3-VL {kind}, conversations: ids, grids, pixels, positions", 1, 0)


@pytest.mark.parametrize("first", [0, 40])
def test_conversations(transform, processor, model, first: int) -> None:
    for seed in range(first, first + 40):
        check(transform, processor, model, seed)


@pytest.mark.slow
def test_many_conversations(transform, processor, model) -> None:
    for seed in range(1000, 2500):
        check(transform, processor, model, seed)


def test_a_video_has_two_tokens_more_in_transformers_5(transform, processor) -> None:
    """The template's tokens around all steps, which 4.57 took away and no weights have seen."""
    start, end = processor.vision_start_token_id, processor.vision_end_token_id
    for seed in range(10):
        item = video(random.Random(seed))
        conversation = [{"role": "user", "content": [item, {"type": "text", "text": "What?"}]}]
        ours = transform({"messages": conversation}, inference=True)["tokens"]
        theirs = reference(processor, conversation, wrapped=True, add_generation_prompt=True)
        ids = theirs["input_ids"][0].tolist()
        assert len(ids) == len(ours) + 2
        first = ids.index(start)
        last = len(ids) - 1 - ids[::-1].index(end)
        assert ids[last - 1] == end
        assert [*ids[:first], *ids[first + 1 : last], *ids[last + 1 :]] == ours


def test_times_share_a_token_with_the_text_before(transform, processor) -> None:
    item = {"type": "video", "video": np.zeros((4, 32, 32, 3), np.uint8), "sample_fps": 3}
    content = [{"type": "text", "text": "look:"}, item]
    conversation = [{"role": "user", "content": content}]
    expected = reference(processor, conversation, add_generation_prompt=True)["input_ids"][0]
    tokens = transform({"messages": conversation}, inference=True)["tokens"]
    assert tokens == expected.tolist()
    assert ":<" in [token.decode() for token in transform.token_bytes(tokens)]
    assert "look:<0.2 seconds><|vision_start|>" in transform.decode(tokens)


def test_answers_that_are_begun(transform, processor) -> None:
    for begun in ("I see", "a\nb"):
        conversation = [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": begun},
        ]
        text = processor.apply_chat_template(
            conversation, tokenize=False, continue_final_message=True
        )
        expected = processor.tokenizer(text)["input_ids"]
        assert transform.to_answer({"messages": conversation})["tokens"] == expected


def test_published_templates_are_known(kind: str, transform, checkpoint: Path) -> None:
    assert hashlib.sha256(transform.chat_template.encode()).hexdigest() == TEMPLATES[kind]
    tokenizer_config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    assert "chat_template" not in tokenizer_config
    marks = transform.prompts.chat_template.count("\\ufdd")
    assert marks == {"instruct": 2, "thinking": 4}[kind]


def test_texts(tokenizer_files: Path, transform, processor) -> None:
    """Four more added tokens, which vocab.json and merges.txt alone do not state."""
    names = "vocab.json", "merges.txt"
    plain = Qwen3_VLTransform(*(tokenizer_files / name for name in names))
    assert plain.special_tokens == transform.special_tokens
    assert plain.vocab_size == 151669
    assert plain.special_tokens["</think>"] == 151668
    tokens = [*plain.special_tokens]
    for seed in range(200):
        rng = random.Random(seed)
        text = "".join(rng.choices((*TEXTS, *tokens), k=6))
        ids = processor.tokenizer(text)["input_ids"]
        for ours in (plain, transform):
            assert ours.encode(text, add_eos=False) == ids
            shown = processor.tokenizer.decode(ids, skip_special_tokens=True)
            assert ours.decode(ids, skip_special_tokens=True) == shown


# Images


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_images(backend: str) -> None:
    reference_class = {"torchvision": Qwen2VLImageProcessor, "pil": Qwen2VLImageProcessorPil}
    theirs = reference_class[backend](**{k: v for k, v in IMAGES.items() if "_type" not in k})
    ours = Qwen3_VLImageTransform(backend=backend)
    raw = Qwen3_VLImageTransform(backend=backend, patch_dtype="uint8")
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(*np.log([20, 1500]), (25, 2))).astype(int).tolist()
    for height, width in [*sizes, (32, 6400), (256, 256), (1, 200), (31, 33)]:
        small = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), np.uint8)
        picture = Image.fromarray(small).resize((width, height))
        expected = theirs(picture, return_tensors="pt")
        made = ours({"image": picture})
        assert torch.equal(made["image_grid_thw"], expected["image_grid_thw"])
        assert torch.equal(made["pixel_values"], expected["pixel_values"])
        record(f"Qwen3-VL, images: grids and pixels, {backend} backend", 1, 0)
        if max(height, width) < 400:
            levels = theirs(picture, do_rescale=False, do_normalize=False, return_tensors="pt")
            first = levels["pixel_values"].unflatten(1, (3, 2, 256))[:, :, 0].flatten(1)
            patches = raw({"image": picture})["pixel_values"]
            assert patches.dtype == torch.uint8
            assert torch.equal(patches.float(), first.float())


# Videos


def test_frames_of_files() -> None:
    """Which frames are taken."""
    theirs = Qwen3VLVideoProcessor(**VIDEOS)
    for seed in range(1200):
        rng = random.Random(seed)
        total, rate = rng.choice((rng.randint(2, 40), rng.randint(2, 40_000))), rng.choice(RATES)
        settings: dict[str, Any] = {}
        if rng.random() < 0.7:
            settings["fps"] = rng.choice((0.1, 0.5, 1, 2, 3.7, 24, 100))
        theirs.min_frames, theirs.max_frames = rng.randint(2, 9), rng.choice((768, 10, 31))
        ours = Qwen3_VLVideoTransform(
            min_frames=theirs.min_frames, max_frames=theirs.max_frames, fps=settings.get("fps", 2)
        )
        metadata = VideoMetadata(total_num_frames=total, fps=rate)
        expected = theirs.sample_frames(metadata, **settings).tolist()
        assert ours._sample(total, rate, {})[0] == expected
        assert (
            Qwen3_VLVideoTransform()._sample(
                total, rate, {"min_frames": theirs.min_frames, "max_frames": theirs.max_frames}
            )[0]
            == theirs.sample_frames(metadata).tolist()
        )
        count = rng.randint(2, total)
        indices = ours._sample(total, rate, {"nframes": count})[0]
        theirs.fps = None
        assert indices == theirs.sample_frames(metadata, num_frames=count).tolist()
        theirs.fps = 2
        record("Qwen3-VL, videos: sampled frames", 3, 0)


@pytest.mark.parametrize("cap", [None, 768, 5], ids=lambda cap: f"cap {cap}")
def test_sizes_of_videos(cap: int | None) -> None:
    theirs = Qwen3VLVideoProcessor(**VIDEOS)
    for seed in range(1500):
        rng = random.Random(seed)
        frames, (height, width) = (
            rng.randint(2, 800),
            np.exp(np.random.default_rng(seed).uniform(*np.log([5, 4000]), 2)).astype(int).tolist(),
        )
        least = rng.choice((4096, 1, 30_000))
        most = rng.choice((25165824, 10**8, 400_000, least))
        if cap and cap * 1024 < least:
            continue  # refused: the cap would be below the least of all frames
        ours = Qwen3_VLVideoTransform(
            min_pixels=least, total_pixels=most, max_pixels=cap and cap * 1024 + rng.randrange(1024)
        )
        limit = most
        if cap:
            theirs.max_video_tokens = cap
            limit = max(min(cap * 1024, most // frames), int(least * 1.05)) * frames
        try:
            expected = smart_resize(frames, height, width, 2, 32, least, limit)
        except ValueError:
            with pytest.raises(ValueError, match="200 times"):
                ours._grid((height, width), frames, 2, {})
            continue
        if np.prod(expected) * frames > 2**28:
            continue
        grid = ours._grid((height, width), frames, 2, {})
        assert grid == (-(-frames // 2), expected[0] // 16, expected[1] // 16)
        count = theirs.get_num_of_video_patches(
            frames,
            height,
            width,
            {
                "size": {"shortest_edge": least, "longest_edge": most},
                "cap_pixels_per_frame": bool(cap),
            },
        )
        assert count == np.prod(grid)
        record("Qwen3-VL, videos: sizes", 1, 0)


@pytest.mark.parametrize(
    ("clip", "settings"),
    [
        (Clip("mp4", frames=63, rate=9, size=(90, 130), options=x264("keyint=9")), {}),
        (CLIPS["H.264, one long GOP, 29.97"], {"fps": 3.3}),
        (CLIPS["H.264, 1 frame/s"], {"cap": True}),
        (CLIPS["VP9, odd"], {"max_frames": 7}),
    ],
    ids=["9 frames/s", "29.97 frames/s", "capped", "odd"],
)
def test_files(
    tmp_path: Path, processor, checkpoint: Path, clip: Clip, settings: dict[str, Any]
) -> None:
    """Frames that transformers chooses itself of all frames of a file."""
    path = write_clip(tmp_path / f"clip.{clip.suffix}", clip)
    with open_video(path) as file:
        every = torch.from_numpy(np.stack([*file.frames(range(file.num_frames))]))
        metadata = {"fps": file.fps, "total_num_frames": file.num_frames}
    own = dict(settings)
    cap = own.pop("cap", False)
    transform = Qwen3_VLTransform.from_pretrained(
        checkpoint, video_max_pixels=768 * 1024 if cap else None, **own
    )
    item = {"type": "video", "video": str(path)}
    conversation = [{"role": "user", "content": [item, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    processor.video_processor.max_frames = own.pop("max_frames", 768)
    expected = processor(
        text=[text.replace(VIDEO, "<|video_pad|>")],
        videos=[every.permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        videos_kwargs={"cap_pixels_per_frame": cap, "do_sample_frames": True, **own},
        return_tensors="pt",
    )
    processor.video_processor.max_frames = 768
    sample = transform({"messages": conversation}, inference=True)
    assert sample["tokens"] == expected["input_ids"][0].tolist()
    check_media(sample, expected, ["video"], path)
    assert transform.examine({"messages": conversation}, inference=True).size[:2] == (
        len(sample["tokens"]),
        len(sample["encoder_input"]["vision"]["patches"]),
    )
    record("Qwen3-VL, video files: ids, grids, pixels", 1, 0)


# Exported files


def test_exported_processor_files(
    kind: str, checkpoint: Path, tmp_path: Path, tokenizer_files: Path
) -> None:
    capped = kind == "thinking"
    settings: dict[str, Any] = {
        "min_pixels": 40_000,
        "max_pixels": 90_000,
        "video_min_pixels": 5000,
        "video_total_pixels": 300_000,
        "video_max_pixels": 20_000 if capped else None,
        "fps": 1.5,
        "min_frames": 5,
        "max_frames": 9,
        "image_mean": [0.5, 0.4, 0.3],
        "add_vision_id": True,
    }
    transform = Qwen3_VLTransform.from_pretrained(checkpoint, **settings)
    for path in tokenizer_files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name, written in transform.processor_files().items():
        (tmp_path / name).write_text(written)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, Qwen3VLProcessor)
    assert isinstance(processor.video_processor, Qwen3VLVideoProcessor)
    assert processor.chat_template == transform.chat_template.replace(VIDEO, "<|video_pad|>")
    named = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert named["image_processor_type"] == "Qwen2VLImageProcessorFast"

    clip = Clip("mp4", frames=63, rate=9, size=(190, 230), options=x264("keyint=9"))
    path = write_clip(tmp_path / "clip.mp4", clip)
    with open_video(path) as file:
        every = torch.from_numpy(np.stack([*file.frames(range(63))]))
    picture = image(random.Random(3))
    content = [picture, {"type": "video", "video": str(path)}, {"type": "text", "text": "Why?"}]
    conversation = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert "Picture 1: " in text
    expected = processor(
        text=[text],
        images=[picture["image"]],
        videos=[every.permute(0, 3, 1, 2)],
        video_metadata=[{"fps": 9.0, "total_num_frames": 63}],
        return_tensors="pt",
    )
    sample = transform({"messages": conversation}, inference=True)
    assert sample["tokens"] == expected["input_ids"][0].tolist()
    check_media(sample, expected, ["image", "video"], capped)
    again = Qwen3_VLTransform.from_pretrained(tmp_path)
    assert again.processor_files() == transform.processor_files()
    assert again.prompts.chat_template == transform.prompts.chat_template
    again = again({"messages": conversation}, inference=True)
    assert again["tokens"] == sample["tokens"]
    record("Qwen3-VL, exported processor files: ids, grids, pixels", 1, 0)
