"""Videos beside qwen-vl-utils (which frames, what size), PyAV and transformers (pixels).

A folder of videos of your own joins in: TORCHTUNE_VL_VIDEOS=/my/videos pytest tests/parity
"""

import os
import random
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_vl_utils import vision_process
from transformers import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata, read_video_pyav

from tests.parity.figures import record
from tests.videos import CLIPS, pictures, write_clip
from torchtune_vl.media._videos import open_video
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLVideoTransform

pytest.importorskip("decord")
USERS_FOLDER = os.environ.get("TORCHTUNE_VL_VIDEOS")
USERS_VIDEOS = {path.name: path for path in Path(USERS_FOLDER).iterdir()} if USERS_FOLDER else {}
# decord 0.6 counts frames that an edit list hides, and opens neither of the others
NOT_FOR_DECORD = {"H.264, edit list", "H.264, no container", "GIF"}

SMALL = {"min_pixels": 4 * 28 * 28, "max_pixels": 24 * 28 * 28}
BUDGETS = [
    {},
    SMALL,
    {"max_pixels": 130 * 28 * 28},
    {"max_pixels": 10**7},
    {"min_pixels": 300 * 28 * 28},
    {"total_pixels": 1200 * 28 * 28},
    {"total_pixels": 99_999.5, "min_pixels": 5 * 28 * 28},
    {"resized_height": 60, "resized_width": 95},
]
SAMPLINGS = [
    {},
    {"fps": 1},
    {"fps": 7.3},
    {"fps": 1000},
    {"fps": 5, "max_frames": 7},
    {"fps": 0.1, "min_frames": 5},
    {"nframes": 2},
    {"nframes": 7},
    {"nframes": 10},
    {"nframes": 1000},
    {"video_start": 0.31},
    {"video_end": 0.9, "nframes": 6},
    {"video_start": 0.25, "video_end": 0.71, "fps": 30},
    {"video_start": -3, "video_end": 100.0},
    {"video_start": 0.5, "video_end": 0.5},
    {"video_start": 100},
]


@pytest.fixture(scope="module", params=[*CLIPS, *USERS_VIDEOS])
def clip(request, tmp_path_factory):
    """Name and path of a video."""
    if request.param in USERS_VIDEOS:
        return request.param, USERS_VIDEOS[request.param]
    clip = CLIPS[request.param]
    return request.param, write_clip(tmp_path_factory.mktemp("clip") / f"clip.{clip.suffix}", clip)


@pytest.fixture(scope="module")
def processor(reference_tokenizer):
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), reference_tokenizer, Qwen2VLVideoProcessor()
    )


@lru_cache(maxsize=1)
def whole(path):
    """Every frame, decoded one after the other."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]


def read_by_decord(path, sampling):
    _, metadata, fps = vision_process.VIDEO_READER_BACKENDS["decord"](
        {"video": str(path), **sampling}
    )
    return metadata, fps


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# Which frames


def test_samples_the_frames_of_qwen_vl_utils(clip):
    name, path = clip
    if name in NOT_FOR_DECORD:
        pytest.skip("decord cannot read it")
    transform = Qwen2_5_VLVideoTransform(**SMALL, patch_dtype="uint8")
    outcomes = {"read": 0, "refused": 0}
    for sampling in SAMPLINGS:
        sample = {"video": path, **sampling}
        try:
            metadata, fps = read_by_decord(path, sampling)
        except (ValueError, AssertionError):
            outcomes["refused"] += 1
            with pytest.raises(ValueError, match=r"frames|video_start"):
                transform(sample)
        else:
            outcomes["read"] += 1
            ours = transform(sample)
            assert ours["frame_indices"] == metadata["frames_indices"], sampling
            assert ours["seconds_per_step"] == 2 / fps
            assert ours["seconds_per_step"] == 2 / VideoMetadata(**metadata).sampled_fps
    assert min(outcomes.values()) > 1
    record("videos: sampled frames and seconds, qwen-vl-utils", len(SAMPLINGS), 0)


rates = st.one_of(st.floats(0.05, 240), st.sampled_from([1, 3, 23.976, 25, 30000 / 1001, 30, 60]))
times = st.floats(-10, 10_000)


@settings(max_examples=1000, deadline=None)
@given(
    st.integers(1, 300_000) | st.integers(1, 20),
    rates,
    st.fixed_dictionaries(
        {},
        optional={
            "fps": rates,
            "nframes": st.integers(1, 2000),
            "min_frames": st.integers(0, 800),
            "max_frames": st.integers(1, 2000),
            "video_start": times,
            "video_end": times,
        },
    ),
)
@example(40, 30, {"nframes": 5})  # halves are rounded to even numbers, here of pairs
@example(9, 2, {"nframes": 8})  # and here of the indices
def test_rules_of_sampling(num_frames, video_fps, sampling):
    try:
        assert not ("fps" in sampling and "nframes" in sampling)
        first, last, count = vision_process.calculate_video_frame_range(
            sampling, num_frames, video_fps
        )
        nframes = vision_process.smart_nframes(sampling, count, video_fps)
    except (ValueError, AssertionError):
        with pytest.raises(ValueError, match=r"frame|video_start"):
            Qwen2_5_VLVideoTransform()._sample(num_frames, video_fps, sampling)
    else:
        indices, fps = Qwen2_5_VLVideoTransform()._sample(num_frames, video_fps, sampling)
        assert indices == torch.linspace(first, last, nframes).round().long().tolist()
        assert fps == nframes / max(count, 1e-6) * video_fps


def test_rules_of_sampling_of_the_transform():
    """Those of its constructor are those of a call."""
    rng = random.Random(0)
    for _ in range(300):
        sampling = {
            "fps": rng.uniform(0.1, 30),
            "min_frames": rng.randint(0, 50),
            "max_frames": rng.randint(2, 900),
        }
        num_frames, fps = rng.randint(2, 5000), rng.uniform(1, 60)
        with suppress(ValueError):
            expected = Qwen2_5_VLVideoTransform()._sample(num_frames, fps, sampling)
            assert Qwen2_5_VLVideoTransform(**sampling)._sample(num_frames, fps, {}) == expected


@pytest.mark.parametrize("indices", [[0], [3, 4, 30], [0, 39], list(range(1, 40, 3))])
def test_frame_indices(tmp_path, processor, indices):
    path = write_clip(tmp_path / "clip.mp4", CLIPS["H.264, B-frames"])
    ours = Qwen2_5_VLVideoTransform(**SMALL)({"video": path, "frame_indices": indices})
    assert ours["frame_indices"] == indices
    frames = np.stack([whole(path)[i] for i in indices])
    metadata = {"fps": 30.0, "total_num_frames": 40, "frames_indices": indices}
    assert_equal(ours, reference(processor, frames, [metadata], size=size_of(SMALL)))


# Which size


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize(
    "name", ["H.264, B-frames", "H.264, 4:4:4, odd", "H.264, upright", "H.264, 2 frames"]
)
@pytest.mark.filterwarnings("ignore:max_pixels of a video")
def test_size_of_a_file(tmp_path, name, budget):
    path = write_clip(tmp_path / "clip.mp4", CLIPS[name])
    pixels = vision_process.fetch_video({"video": str(path), **budget})
    ours = Qwen2_5_VLVideoTransform()({"video": path, **budget})
    frames, _, height, width = pixels.shape
    assert ours["video_grid_thw"].tolist() == [[frames // 2, height // 14, width // 14]]
    record("videos: grids, qwen-vl-utils", 1, 0)


class FakeReader:
    """Has qwen-vl-utils size a video that need not exist."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "fake")
        monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "fake", self.read)
        monkeypatch.setattr(vision_process.transforms.functional, "resize", self.resize)

    def size(self, frames, height, width, budget):
        self.shape = frames, 3, height, width
        vision_process.fetch_video({"video": "fake", **budget})
        return self.resized

    def read(self, _):
        return torch.empty(()).expand(self.shape), {}, 2.0

    def resize(self, video, size, **_):
        self.resized = tuple(size)
        return video[:1, :1, :1, :1]


# Sides of less than 15 pixels are rounded to 0 by transformers and up to 28 by qwen-vl-utils
sides = st.integers(15, 5000) | st.sampled_from([360, 640, 720, 1080, 1280, 1920, 3840])


@settings(max_examples=1000, deadline=None)
@given(
    st.integers(1, 384).map(lambda steps: 2 * steps),
    sides,
    sides,
    st.fixed_dictionaries(
        {},
        optional={
            "min_pixels": st.integers(784, 400_000),
            "max_pixels": st.integers(784, 4_000_000),
            "total_pixels": st.integers(10_000, 10**9) | st.floats(10_000, 10**9),
        },
    ),
)
@example(768, 1080, 1920, {})
@example(300, 1080, 1920, {"total_pixels": 20480 * 28 * 28})
# where a share of a pixel decides
@example(492, 1956, 1956, {"total_pixels": 55737753})
@example(138, 1346, 5384, {"total_pixels": 26182508})
@pytest.mark.filterwarnings("ignore:max_pixels of a video")
def test_rules_of_sizes(frames, height, width, budget):
    with pytest.MonkeyPatch.context() as monkeypatch:
        reader = FakeReader(monkeypatch)
        transform = Qwen2_5_VLVideoTransform()
        try:
            expected = reader.size(frames, height, width, budget)
        except (ValueError, AssertionError):
            with pytest.raises(ValueError, match=r"min_pixels|200 times"):
                transform._grid((height, width), frames, 2, budget)
        else:
            if min(expected) > 0:  # where qwen-vl-utils leaves no pixels, a square is left
                steps, rows, columns = transform._grid((height, width), frames, 2, budget)
                assert (2 * steps, rows * 14, columns * 14) == (frames, *expected)


def test_an_odd_frame_counts_twice():
    images = [Image.fromarray(frame) for frame in pictures(3, 336, 392)]
    item = {"video": images, "min_pixels": 4 * 28 * 28, "total_pixels": 300 * 28 * 28}
    _, _, height, width = vision_process.fetch_video(item).shape
    ours = Qwen2_5_VLVideoTransform()(item)
    assert ours["video_grid_thw"].tolist() == [[2, height // 14, width // 14]]


def test_rules_of_sizes_of_transformers():
    """The limits of a transform are those of a processor that caps pixels."""
    rng = random.Random(0)
    for _ in range(25):
        least = rng.randint(1, 30)
        tokens = {"min": least, "max": rng.randint(least, 60), "total": rng.randint(20, 400)}
        limits = {f"{name}_pixels": 784 * count for name, count in tokens.items()}
        limits["total_pixels"] = int(limits["total_pixels"] * 0.9)
        frames = noise(2 * rng.randint(1, 10), rng.randint(15, 200), rng.randint(20, 200), 3)
        processor = Qwen2VLVideoProcessor(
            size=size_of(limits), cap_pixels_per_frame=True, max_video_tokens=tokens["total"]
        )
        theirs = processor(torch.from_numpy(frames).permute(0, 3, 1, 2), return_tensors="pt")
        ours = Qwen2_5_VLVideoTransform(**limits)({"video": frames})
        assert_equal(ours, {**theirs, "second_per_grid_ts": [1.0]})


# Frames


@pytest.mark.parametrize("threads", [1, 3])
def test_frames_of_a_full_decode(clip, threads):
    name, path = clip
    expected = whole(path)
    if name == "H.264, upright":
        expected = [np.rot90(frame) for frame in expected]
    rng = random.Random(name)
    count = len(expected)
    choices = [sorted(rng.sample(range(count), min(count, n))) for n in (1, 1, 2, 3, 5, 9, 20)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with open_video(path) as video:
            assert video.num_frames == count
            for chosen in [*choices, list(range(count))]:
                for i, frame in zip(chosen, video.frames(chosen), strict=True):
                    assert np.array_equal(frame, expected[i]), (chosen, i)
    finally:
        torch.set_num_threads(before)
    record("videos: frames, full decode by PyAV", count, 0)


def test_frames_of_transformers(clip):
    name, path = clip
    with av.open(str(path)) as container:
        stated = container.streams.video[0].frames
    if stated != len(whole(path)) or name == "H.264, upright":
        pytest.skip("transformers' reader trusts the header and turns nothing")
    indices = sorted(random.Random(name).sample(range(stated), min(stated, 7)))
    expected, metadata = read_video_pyav(str(path), lambda metadata: indices)
    with open_video(path) as video:
        assert np.array_equal(np.stack(list(video.frames(indices))), expected)
        assert video.num_frames == metadata.total_num_frames
        assert video.fps == metadata.fps
    record("videos: frames, transformers' read_video_pyav", len(indices), 0)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("upside_down", [False, True])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_display_matrix(tmp_path, degrees, mirrored, upside_down, suffix):
    clip = CLIPS["H.264, upright"]._replace(frames=2, suffix=suffix)
    path = tmp_path / f"clip.{suffix}"
    write_clip(path, clip._replace(display=(degrees, mirrored, upside_down)))
    expected = np.rot90(whole(path)[1], degrees // 90)
    expected = np.fliplr(expected) if mirrored else expected
    expected = np.flipud(expected) if upside_down else expected
    with open_video(path) as video:
        _, frame = video.frames([0, 1])
    assert np.array_equal(frame, expected)
    if suffix == "mp4" and not mirrored and not upside_down:  # decord turns no others
        theirs = vision_process._read_video_decord({"video": str(path)})[0][1].permute(1, 2, 0)
        assert np.abs(theirs.numpy().astype(int) - frame).mean() < 4
        assert np.abs(theirs.numpy()[::-1].astype(int) - frame).mean() > 10


# Patches


def size_of(limits):
    return {"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]}


def reference(processor, frames, metadata=None, **options):
    """transformers' result for frames [T, H, W, 3]."""
    return processor(
        text=["<|video_pad|>"],
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        video_metadata=metadata,
        videos_kwargs={"do_sample_frames": False, "cap_pixels_per_frame": True, **options},
        return_tensors="pt",
    )


def assert_equal(ours, theirs):
    assert ours["video_grid_thw"].tolist() == theirs["video_grid_thw"].tolist()
    assert ours["seconds_per_step"] == theirs["second_per_grid_ts"][0]
    patches, expected = ours["pixel_values_videos"], theirs["pixel_values_videos"]
    assert patches.dtype == torch.float32
    assert torch.equal(patches, expected), (patches - expected).abs().max()
    assert ours["num_video_tokens"] == len(expected) // 4
    record("videos: grids, patches and seconds, transformers", 1, 0)


def test_patches_of_a_file(clip, processor):
    name, path = clip
    ours = Qwen2_5_VLVideoTransform()({"video": path})
    frames = np.stack([whole(path)[i] for i in ours["frame_indices"]])
    if name == "H.264, upright":
        frames = np.rot90(frames, axes=(1, 2)).copy()
    with open_video(path) as video:
        metadata = {
            "fps": video.fps,
            "total_num_frames": video.num_frames,
            "frames_indices": ours["frame_indices"],
        }
    if name not in NOT_FOR_DECORD:
        assert metadata.items() <= read_by_decord(path, {})[0].items()
    theirs = reference(processor, frames, [metadata])
    assert_equal(ours, theirs)
    assert ours["num_video_tokens"] == (theirs["input_ids"] == processor.video_token_id).sum()


@pytest.mark.parametrize("kind", [np.ascontiguousarray, torch.as_tensor])
@pytest.mark.parametrize(
    "shape",
    [
        *[(frames, 70, 90, 3) for frames in (1, 2, 3, 8, 9)],
        *[(frames, 3, 70, 90) for frames in (1, 4, 5)],
        (4, 56, 84, 3),
        (4, 336, 448, 3),
        (3, 500, 30, 3),
        (2, 30, 700, 3),
        (2, 3, 60, 3),
        (2, 1080, 1920, 3),
        (40, 20, 20, 3),
    ],
    ids=str,
)
def test_patches_of_an_array(processor, shape, kind):
    video = noise(*shape)
    ours = Qwen2_5_VLVideoTransform()({"video": kind(video), "sample_fps": 3})
    frames = video.transpose(0, 2, 3, 1) if shape[1] == 3 else video
    metadata = {"fps": 3, "total_num_frames": len(video), "frames_indices": range(len(video))}
    assert_equal(ours, reference(processor, np.ascontiguousarray(frames), [metadata]))
    assert ours["frame_indices"] == list(range(len(video)))


def test_patches_of_images(processor):
    frames = np.stack(list(pictures(5, 100, 130)))
    images = [Image.fromarray(frame) for frame in frames]
    metadata = {"fps": 2.0, "total_num_frames": 5, "frames_indices": range(5)}
    expected = reference(processor, frames, [metadata])
    for video in (images, tuple(frames), list(torch.from_numpy(frames).permute(0, 3, 1, 2))):
        assert_equal(Qwen2_5_VLVideoTransform()({"video": video}), expected)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("rate", [2.0, 0.5, 23.976])
def test_images_by_way_of_qwen_vl_utils(processor, count, rate):
    """Of a size that it keeps: others it resizes twice, once to multiples of 56."""
    images = [Image.fromarray(frame) for frame in pictures(count, 336, 392)]
    item = {"video": images, "sample_fps": rate}
    (video, metadata), fps = vision_process.fetch_video(
        item, return_video_sample_fps=True, return_video_metadata=True
    )
    frames = video.permute(0, 2, 3, 1).to(torch.uint8).numpy()
    theirs = reference(processor, frames, [metadata])
    # Its frames per second go through total_num_frames and back, which rounds
    assert theirs["second_per_grid_ts"][0] == pytest.approx(2 / fps, rel=1e-15)
    assert_equal(Qwen2_5_VLVideoTransform()(item), {**theirs, "second_per_grid_ts": [2 / fps]})


def test_means(processor):
    frames = noise(4, 70, 90, 3)
    means = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    ours = Qwen2_5_VLVideoTransform(**means)({"video": frames, "sample_fps": 24})
    assert_equal(ours, reference(processor, frames, **means))


def test_uint8_patches():
    for frames in (noise(4, 70, 90, 3), noise(5, 56, 84, 3)):
        ours = Qwen2_5_VLVideoTransform(patch_dtype="uint8")({"video": frames})
        theirs = Qwen2VLVideoProcessor(do_rescale=False, do_normalize=False)(
            torch.from_numpy(frames).permute(0, 3, 1, 2), return_tensors="pt"
        )
        assert ours["pixel_values_videos"].dtype == torch.uint8
        assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])
        assert torch.equal(ours["video_grid_thw"], theirs["video_grid_thw"])
        record("videos: uint8 patches, transformers without normalization", 1, 0)
