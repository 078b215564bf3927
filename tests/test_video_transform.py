import base64
import gc
import io
import json
import subprocess
import sys
import warnings
from contextlib import suppress
from zlib import crc32

import av
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.videos import CLIPS, VP9, Clip, pictures, write_clip, x264, x265
from torchtune_vl.media import _videos
from torchtune_vl.media._sources import RemoteLimits
from torchtune_vl.media._videos import open_video
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLVideoTransform

SMALL = {"min_pixels": 4 * 28 * 28, "max_pixels": 24 * 28 * 28}
FASTSTART = {"movflags": "faststart"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def clip(folder):
    return write_clip(folder / "clip.mp4", CLIPS["H.264, B-frames"])


@pytest.fixture
def transform():
    return Qwen2_5_VLVideoTransform(**SMALL, patch_dtype="uint8")


def encoded(folder, clip):
    return write_clip(folder / f"encoded.{clip.suffix}", clip).read_bytes()


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# The sample


def test_sample_of_a_file(clip):
    sample = Qwen2_5_VLVideoTransform()({"video": clip, "fps": 6, "answer": 3})
    assert sample["pixel_values_videos"].shape == (4 * 20 * 28, 1176)
    assert sample["pixel_values_videos"].dtype == torch.float32
    assert sample["video_grid_thw"].tolist() == [[4, 20, 28]]
    assert sample["video_grid_thw"].dtype == torch.int64
    assert sample["num_video_tokens"] == 4 * 10 * 14
    assert sample["seconds_per_step"] == 2 / (8 / 40 * 30)
    assert sample["frame_indices"] == [0, 6, 11, 17, 22, 28, 33, 39]
    assert sample["answer"] == 3
    assert sample["video"] == clip


def test_settings_of_none_are_absent(transform, clip):
    settings = dict.fromkeys(["fps", "nframes", "video_start", "frame_indices", "sample_fps"])
    expected = transform({"video": clip})["pixel_values_videos"]
    assert torch.equal(transform({"video": clip, **settings})["pixel_values_videos"], expected)


def test_leaves_the_callers_sample_and_frames_alone(transform):
    for frames in (noise(3, 56, 56, 3), noise(2, 3, 56, 56), torch.from_numpy(noise(2, 60, 70, 3))):
        sample = {"video": frames, "answer": 3}
        before = frames.copy() if isinstance(frames, np.ndarray) else frames.clone()
        result = transform(sample)
        result["pixel_values_videos"].zero_()
        assert sample.keys() == {"video", "answer"}
        assert (frames == before).all()


def test_reads_flipped_and_read_only_arrays_without_a_warning(transform):
    frames = noise(4, 60, 70, 3)
    expected = transform({"video": frames})["pixel_values_videos"]
    flipped = np.ascontiguousarray(frames[::-1, :, ::-1])[::-1, :, ::-1]
    frames.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (flipped, frames, list(frames), torch.tensor(frames).permute(0, 3, 1, 2)):
            assert torch.equal(transform({"video": same})["pixel_values_videos"], expected)


def test_an_odd_frame_is_repeated(transform):
    frames = noise(3, 56, 56, 3)
    patches = transform({"video": frames})["pixel_values_videos"].view(2, -1, 3, 2, 196)
    assert not torch.equal(patches[0, :, :, 0], patches[0, :, :, 1])
    assert torch.equal(patches[1, :, :, 0], patches[1, :, :, 1])


# Sources


DURATIONS = [40, 100, 40, 40, 40, 40, 40]  # milliseconds of each frame


@pytest.fixture
def animation(tmp_path):
    """An animation in WebP that keeps all values, and its frames."""
    frames = [Image.fromarray(frame) for frame in noise(7, 60, 80, 3)]
    path = tmp_path / "animation.webp"
    options = {"save_all": True, "append_images": frames[1:], "lossless": True}
    frames[0].save(path, duration=DURATIONS, **options)
    return path, frames


def test_animations_in_webp_are_videos(transform, animation):
    path, frames = animation
    for source in (
        path,
        str(path),
        path.as_uri(),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
    ):
        sample = transform({"video": source, "fps": 10})
        assert sample["frame_indices"] == [0, 2, 4, 6]
        chosen = transform({"video": [frames[i] for i in sample["frame_indices"]]})
        assert torch.equal(sample["pixel_values_videos"], chosen["pixel_values_videos"])
        assert sample["seconds_per_step"] == pytest.approx(2 / (4 / 0.34))
        measured = transform.measure({"video": source, "fps": 10})
        assert measured["pixel_values_videos"].shape == sample["pixel_values_videos"].shape


def test_images_in_webp_are_no_videos(transform, tmp_path):
    Image.new("RGB", (60, 80)).save(tmp_path / "still.webp")
    with pytest.raises(ValueError, match="without an animation: pass it as an image"):
        transform({"video": tmp_path / "still.webp"})


def test_animations_that_are_cut_off(transform, animation):
    data = animation[0].read_bytes()
    for length in (30, 200, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=r"video data of .* (damaged|no animation|without)"):
            transform({"video": data[:length], "nframes": 2})


class Pipe(io.RawIOBase):
    """A handle that reads in one direction."""

    def __init__(self, data):
        self.file = io.BytesIO(data)

    def read(self, size=-1):
        return self.file.read(size)

    def seekable(self):
        return False


def test_same_patches_from_every_source(transform, clip):
    data = clip.read_bytes()
    handle = io.BytesIO(data)
    handle.seek(100)
    sources = [
        str(clip),
        f"file://{clip}",
        data,
        bytearray(data),
        f"data:video/mp4;base64,{base64.b64encode(data).decode()}",
        handle,
        Pipe(data),
    ]
    expected = transform({"video": clip})
    for source in sources:
        ours = transform({"video": source})
        assert torch.equal(ours["pixel_values_videos"], expected["pixel_values_videos"])
        assert ours["frame_indices"] == expected["frame_indices"]
    assert handle.tell() == 100
    with clip.open("rb") as file:
        assert transform({"video": file})["num_video_tokens"] == expected["num_video_tokens"]
        assert file.tell() == 0


def test_images_of_every_kind_are_frames(transform, tmp_path):
    arrays = list(pictures(4, 60, 70))
    path = tmp_path / "frame.png"
    Image.fromarray(arrays[1]).save(path)
    video = [Image.fromarray(arrays[0]), path, arrays[2], torch.from_numpy(arrays[3])]
    expected = transform({"video": np.stack(arrays)})["pixel_values_videos"]
    assert torch.equal(transform({"video": video})["pixel_values_videos"], expected)


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        ("nowhere/clip.mp4", "video file 'nowhere/clip.mp4'.*correct the path"),
        (".", "video file '.'.*directory"),
        ("https://example.com/clip.mp4", "video URL 'https://example.com/clip.mp4'.*remote"),
        ("http://example.com/clip.mp4", "only https"),
        ("rtsp://example.com/clip", "only https"),
        ("concat:a.mp4|b.mp4", "cannot be read"),
        (b"", "video data of 0 bytes: is empty"),
        (b"no video " * 100, "video data of 900 bytes: FFmpeg cannot read it.*no video"),
        (7, "object of type int"),
        (None, "object of type NoneType"),
        ([], "video list of 0 images: has no frames"),
        ([None], "frame 0, image object of type NoneType: is no image"),
        ([noise(30, 30, 3), "nowhere.png"], "frame 1, image file 'nowhere.png'.*correct the path"),
        ([noise(30, 40, 3), noise(40, 30, 3)], "frame 1 is 30 x 40 pixels, frame 0 40 x 30"),
        (noise(0, 30, 30, 3), r"ndarray of shape \(0, 30, 30, 3\).*has no frames"),
        (noise(2, 0, 30, 3), r"has no pixels: height and width are \(0, 30\)"),
        (noise(2, 5, 1001, 3), "more than 200 times"),
        (noise(30, 30, 3), r"\[T, H, W, 3\]"),
        (noise(2, 30, 30, 4), r"\[T, H, W, 3\]"),
        (np.uint8(3)[None].reshape(()), r"\[T, H, W, 3\]"),
        (np.zeros((2, 30, 30, 3), np.float32), "float32.*must be uint8"),
        (torch.zeros(2, 3, 30, 30), "float32.*must be uint8"),
    ],
    ids=lambda option: str(option)[:30],
)
def test_no_video(transform, video, reason):
    with pytest.raises(ValueError, match=reason):
        transform({"video": video})


def test_remote_limits_reach_the_frames_of_a_list():
    transform = Qwen2_5_VLVideoTransform(remote=RemoteLimits())
    with pytest.raises(ValueError, match="not on the public internet"):
        transform({"video": ["https://127.0.0.1/frame.png"]})
    with pytest.raises(ValueError, match="not on the public internet"):
        transform({"video": "https://127.0.0.1/clip.mp4"})


# Settings


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fps": 0}, "fps is 0: make it a number, 0 < fps < inf"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": "2"}, "fps is '2'"),
        ({"fps": 2, "nframes": 4}, "both fps and nframes"),
        ({"nframes": 1}, "0 of 40 frames are asked for: ask for 2 to 40 by nframes"),
        ({"nframes": 42}, "42 of 40 frames are asked for: ask for 2 to 40 by nframes"),
        ({"nframes": 4.0}, "nframes is 4.0: make it an integer"),
        ({"nframes": True}, "nframes is True"),
        ({"max_frames": 1}, "0 of 40 frames are asked for.* max_frames"),
        ({"min_frames": -1}, "min_frames is -1"),
        ({"video_start": 1, "video_end": 1}, "set them further apart"),
        ({"video_start": 2}, r"40 frames \(1.33 s\)"),
        ({"video_end": float("inf")}, "video_end is inf"),
        ({"video_end": "1.0"}, "video_end is '1.0': make it a number"),
        ({"sample_fps": 2}, "for a file, set fps"),
        ({"frame_indices": [0], "fps": 2}, "both frame_indices and fps"),
        ({"frame_indices": [0], "video_end": 2}, "both frame_indices and video_end"),
        ({"frame_indices": []}, "increasing numbers from 0 to 39"),
        ({"frame_indices": [3, 3]}, r"\[3, 3\]: make it increasing"),
        ({"frame_indices": [3, 2]}, "increasing"),
        ({"frame_indices": [-1, 2]}, "increasing numbers from 0"),
        ({"frame_indices": [0, 40]}, "from 0 to 39"),
        ({"frame_indices": [0.5]}, "make it a list of integers"),
        ({"frame_indices": 3}, "make it a list of integers"),
        ({"min_pixels": 0}, "min_pixels is 0: make it an integer of at least 1"),
        ({"max_pixels": 1.5}, "max_pixels is 1.5"),
        ({"max_pixels": 3000}, "min_pixels is 3136 and max_pixels 3000"),
        ({"total_pixels": -1}, "total_pixels is -1: make it a number, 0 < "),
        ({"resized_height": 56}, "give both or none"),
        ({"resized_height": 27, "resized_width": 56}, "resized_height is 27"),
    ],
    ids=str,
)
def test_settings_that_a_file_cannot_have(transform, clip, settings, reason):
    with pytest.raises(ValueError, match=rf"video file '{clip}': .*{reason}"):
        transform({"video": clip, **settings})


@pytest.mark.parametrize(
    "settings", [{"fps": 2}, {"nframes": 2}, {"video_end": 1.0}, {"frame_indices": [0]}], ids=str
)
def test_settings_that_frames_cannot_have(transform, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} chooses among.*sample_fps"):
        transform({"video": noise(4, 30, 30, 3), **settings})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"fps": -1}, "fps is -1"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"min_frames": 2.5}, "min_frames is 2.5"),
        ({"total_pixels": 0}, "total_pixels is 0"),
        ({"min_pixels": 4000, "max_pixels": 3999}, "min_pixels is 4000 and .* 3999"),
        ({"max_pixels": 50176}, "a config has video_min_pixels and video_max_pixels"),
        ({"patch_dtype": "float16"}, "patch_dtype is 'float16': make it one of"),
        ({"patch_dtype": "uint8", "image_mean": (0.5, 0.5, 0.5)}, "use float32"),
    ],
    ids=str,
)
def test_invalid_arguments(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        Qwen2_5_VLVideoTransform(**arguments)


def test_a_limit_beyond_the_transforms_is_mentioned(transform):
    with pytest.warns(UserWarning, match="these hold"):
        transform({"video": noise(2, 300, 300, 3), "max_pixels": 10**6})


def test_numbers_of_numpy_are_numbers(transform, clip):
    settings = {"nframes": np.int64(6), "video_end": np.float32(1), "max_pixels": np.int32(9000)}
    assert len(transform({"video": clip, **settings})["frame_indices"]) == 6
    indices = torch.tensor([1, 4])
    assert transform({"video": clip, "frame_indices": indices})["frame_indices"] == [1, 4]


def test_one_frame(transform, folder):
    data = encoded(folder, Clip("mp4", frames=1))
    with pytest.raises(ValueError, match=r"of a step: for one.*frame_indices to \[0\]"):
        transform({"video": data})
    assert transform({"video": data, "frame_indices": [0]})["video_grid_thw"][0, 0] == 1


# Files


def test_facts_of_a_file(folder):
    times = (0, 40, 50, 200, 210, 333)
    with open_video(encoded(folder, Clip("mkv", frames=6, times=times))) as video:
        assert video.num_frames == 6
        assert video.times.tolist() == [time / 1000 for time in times]
    with open_video(encoded(folder, Clip("mp4", rate=25, hidden=5))) as video:
        assert (video.num_frames, video.fps) == (35, 25)
        assert video.times == pytest.approx(np.arange(35) / 25)
    with open_video(encoded(folder, CLIPS["H.264 in AVI"])) as video:
        assert video.times == pytest.approx(np.arange(40) / 30)


@pytest.mark.parametrize(
    ("parameters", "indices", "needed"),
    [
        # Key frames alone
        ("keyint=10:bframes=0:scenecut=0", [0, 10, 30], 3),
        # Predicted frames need all from the key frame on, but none of the other GOPs
        ("keyint=10:bframes=0:scenecut=0", [2, 7, 35], 8 + 6),
        ("keyint=10:bframes=0:scenecut=0", [39], 10),
        ("keyint=10:bframes=0:scenecut=0", range(40), 40),
        # Of I b b b P b b b P ... the b that are not asked for are left out
        ("keyint=80:bframes=3:b-adapt=0:b-pyramid=none:scenecut=0", [12], 4),
        ("keyint=80:bframes=3:b-adapt=0:b-pyramid=none:scenecut=0", [3, 13, 14], 5 + 3),
    ],
)
def test_decodes_no_frame_too_many(folder, parameters, indices, needed):
    path = write_clip(folder / "sparse.mp4", Clip("mp4", options=x264(parameters)))
    expected = decoded(path)
    with open_video(path) as video:
        given_out = count_decoded(video)
        for i, frame in zip(indices, video.frames(indices), strict=True):
            assert np.array_equal(frame, expected[i])
        assert len(given_out) == needed


def count_decoded(video):
    """A list that grows by each frame that the decoder gives out."""
    given_out, decode = [], video._decode_between

    def spy(*between):
        for frame in decode(*between):
            given_out.append(frame.pts)
            yield frame

    video._decode_between = spy
    return given_out


def test_reads_no_packets_between_distant_frames(folder):
    path = write_clip(folder / "long.mkv", Clip("mkv", frames=200, options=x264("keyint=10")))
    with open_video(path) as video:
        container = Counting(video._container)
        video._container = container
        list(video.frames([0, 100, 199]))
        assert container.packets < 25


class Counting:
    def __init__(self, container):
        self.container, self.packets = container, 0

    def __getattr__(self, name):
        return getattr(self.container, name)

    def demux(self, stream):
        for packet in self.container.demux(stream):
            self.packets += 1
            yield packet


def test_careless_key_frames(folder, clip):
    """A file without a list of its key frames claims that each frame is one."""
    data = clip.read_bytes()
    careless = data.replace(b"stss", b"free")
    assert careless != data
    expected = decoded(clip)
    with open_video(careless) as video:
        for indices in ([33], [5, 6, 38], list(range(40))):
            for i, frame in zip(indices, video.frames(indices), strict=True):
                assert np.array_equal(frame, expected[i])


def stream_bytes(folder, frames, **fields):
    return encoded(folder, Clip("ts", frames=frames, options=x264("keyint=9"), **fields))


@pytest.mark.parametrize("begins", ["whole", "in the middle", "short"])
def test_streams_one_after_the_other(folder, begins):
    """Their timestamps begin anew."""
    first = stream_bytes(folder, 5 if begins == "short" else 40)
    if begins == "in the middle":
        first = first[len(first) // 3 // 188 * 188 :]
    path = folder / "both.ts"
    path.write_bytes(first + stream_bytes(folder, 25))
    expected = decoded(path)
    with open_video(path) as video:
        assert video.num_frames == len(expected)
        last = len(expected) - 1
        for indices in ([last // 2], [3, last - 20, last]):
            for i, frame in zip(indices, video.frames(indices), strict=True):
                assert np.array_equal(frame, expected[i])


def test_streams_of_two_sizes(folder, transform):
    data = stream_bytes(folder, 20) + stream_bytes(folder, 20, size=(64, 96))
    with pytest.raises(ValueError, match="is 96 x 64 pixels, frame 0 128 x 96: give all one size"):
        transform({"video": data})


@pytest.mark.parametrize(
    ("clip", "offset"),
    [
        (Clip("mkv", "libx265", options=x265("keyint=12:bframes=4:b-adapt=0")), 0),
        (Clip("mp4", "libx265", options=x265("keyint=12:bframes=4:open-gop=0:radl=2")), 0),
        (Clip("mkv", options=x264("keyint=10:open-gop=1:bframes=3:b-adapt=0")), 0),
        (Clip("ts", "libx265", options=x265("keyint=12:bframes=4:b-adapt=0")), -2),
        (Clip("ts", "mpeg2video", rate=25, options={"bf": "2", "g": "12"}), 0),
        (Clip("ts", "mpeg2video", rate=25, options={"bf": "2", "g": "12"}), -2),
        (Clip("ts", "mpeg2video", rate=25, options={"bf": "2", "g": "12"}), 3),
        (Clip("mpg", "mpeg2video", rate=25, options={"bf": "2", "g": "12"}), 3),
    ],
    ids=str,
)
def test_piece_of_a_stream(folder, clip, offset):
    """Frames that need some from before the piece do not count, as a whole decode shows none."""
    path, piece = folder / f"whole.{clip.suffix}", folder / f"piece.{clip.suffix}"
    with av.open(str(write_clip(path, clip))) as source, av.open(str(piece), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        _, key, *_ = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        for packet in packets[key + offset :]:
            packet.stream = stream
            target.mux(packet)
    expected = decoded(piece)
    with open_video(piece) as video:
        assert video.num_frames == len(expected)
        for indices in (range(len(expected)), [0, 1], [0, 13, 14], [9]):
            for i, frame in zip(indices, video.frames(indices), strict=True):
                assert np.array_equal(frame, expected[i])


def test_layers_of_h265(folder):
    """Frames of a lower layer that none of it is predicted from may serve a higher one."""
    for layers, skipping in (("H.265, two layers", False), ("H.265, open GOPs", True)):
        with open_video(encoded(folder, CLIPS[layers])) as video:
            assert video._can_skip == skipping


def thread_count(path):
    with open_video(path) as video:
        return video._stream.codec_context.thread_count


def test_threads_are_those_of_torch(clip):
    before = torch.get_num_threads()
    try:
        for threads in (3, 1):
            torch.set_num_threads(threads)
            assert thread_count(clip) == threads
        torch.set_num_threads(3)
        assert list(DataLoader([clip], collate_fn=lambda _: thread_count(clip), num_workers=1)) == [
            1
        ]
    finally:
        torch.set_num_threads(before)


# Damage


@pytest.fixture(params=[1, 4])
def threads(request):
    """Of torch, and so of the decoder."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def place_of_frame(path, number):
    """Where the bytes of a frame are."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    packet = sorted(packets, key=lambda packet: packet.pts)[number]
    return packet.pos, packet.size


@pytest.mark.parametrize("name", ["H.264, B-frames", "H.264, no B-frames"])
def test_damaged_frame(folder, name, threads):
    clip = CLIPS[name]
    path = write_clip(folder / f"damaged.{clip.suffix}", clip._replace(frames=60))
    position, size = place_of_frame(path, 14)
    data = bytearray(path.read_bytes())
    data[position + size // 2 : position + size] = bytes(size - size // 2)
    with open_video(bytes(data)) as video:
        list(video.frames([0, 1, 50]))  # of other GOPs
        with pytest.raises(
            ValueError, match=r"frame \d+ at 0\.[45]\d s cannot be decoded.*damaged"
        ):
            list(video.frames([0, 14, 50]))


def test_errors_that_the_decoder_of_h265_would_hide(folder, threads):
    """Of arbitrary bytes it finds some impossible, and guesses what they should be."""
    options = {
        "preset": "veryfast",
        "x265-params": "log-level=none:aq-mode=1:crf=12:pools=none:frame-threads=1:bframes=0",
    }
    clip = Clip("mp4", "libx265", frames=2, size=(240, 320), options=options)
    path = write_clip(folder / "noisy.mp4", clip)
    position, size = place_of_frame(path, 0)
    refused = 0
    for seed in range(30):
        data, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
        for place in rng.integers(position + 40, position + size, 60):
            data[place] ^= 1 << int(rng.integers(8))
        with open_video(bytes(data)) as video:
            refused += frame_or_none(video, 0) is None
    assert refused


@pytest.mark.parametrize("frame", [0, 14, 33, 59])
@pytest.mark.parametrize("name", ["H.264, B-frames", "H.265, open GOPs", "VP9 in MP4", "MPEG-4"])
def test_lost_frame_is_an_error_or_changes_nothing(folder, name, frame):
    clip = CLIPS[name]
    path = write_clip(folder / f"lost.{clip.suffix}", clip._replace(frames=60))
    expected = decoded(path)
    position, size = place_of_frame(path, frame)
    data = bytearray(path.read_bytes())
    data[position : position + size] = bytes(size)
    with open_video(bytes(data)) as video:
        frames = [frame_or_none(video, i) for i in range(frame, 60)]
    assert frames[0] is None
    assert all(
        f is None or np.array_equal(f, e) for f, e in zip(frames, expected[frame:], strict=True)
    )


def frame_or_none(video, number):
    """None if it cannot be decoded."""
    with suppress(ValueError):
        (frame,) = video.frames([number])
        return frame


@pytest.mark.parametrize("eighths", range(1, 8))
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi"])
def test_file_that_is_cut_off(folder, transform, suffix, eighths):
    clip = Clip(suffix, "mpeg4", frames=100, muxer=FASTSTART)
    if suffix == "webm":
        clip = clip._replace(codec="libvpx-vp9", options=VP9)
    data = encoded(folder, clip)
    with pytest.raises(ValueError, match=r"is cut off after \d\.\d\d s|cannot read|no frames"):
        transform({"video": data[: len(data) * eighths // 8]})


def num_frames(data):
    """0 if it is cut off."""
    with suppress(ValueError), open_video(data) as video:
        return video.num_frames
    return 0


def test_cut_between_frames(folder):
    """The packets of the sound end in the middle, those of the picture do not."""
    data = encoded(folder, Clip("mp4", audio=True, muxer=FASTSTART))
    outcomes = [num_frames(data[:n]) for n in range(len(data) // 4, len(data), 211)]
    assert set(outcomes) <= {0, 40}
    assert outcomes.count(0) > 20


def test_stream_that_is_cut_off(folder, threads):
    """Nothing tells how long it was."""
    path = write_clip(folder / "cut.ts", Clip("ts", frames=60, options=x264("keyint=12")))
    data, whole = path.read_bytes(), {frame.tobytes() for frame in decoded(path)}
    for length in range(len(data) // 8, len(data), len(data) // 8):
        with open_video(data[:length]) as video:
            assert 0 < video.num_frames < 60
            frames = [frame_or_none(video, i) for i in range(video.num_frames)]
            assert sum(frame is None for frame in frames) < 9  # of the GOP where it ends
            assert all(frame is None or frame.tobytes() in whole for frame in frames)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("H.264, B-frames", "frames of 128 x 96 pixels, more than 12,287: make it smaller"),
        ("VP9 in MP4", "cannot be decoded"),  # the size is in its frames
    ],
)
def test_large_frames(monkeypatch, folder, transform, name, reason):
    data = encoded(folder, CLIPS[name])
    transform({"video": data})
    monkeypatch.setattr(_videos, "MAX_PIXELS", 96 * 128 - 1)
    with pytest.raises(ValueError, match=reason):
        transform({"video": data})


def playlist(clip):
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n".encode()


def bad_files(folder, clip):
    data = clip.read_bytes()
    sound, silent = folder / "sound.mp4", folder / "silent.mkv"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(silent), "w") as container:
        container.add_stream("mpeg4", rate=30)
        container.start_encoding()
    return {
        "text": (b"<html>404 Not Found</html>", "FFmpeg cannot read it"),
        "header": (data[:40], "FFmpeg cannot read it"),
        "no index": (data[: len(data) // 2], "FFmpeg cannot read it"),
        "sound": (sound.read_bytes(), "holds no video"),
        "no frames": (silent.read_bytes(), "FFmpeg cannot read it"),
        "codec": (data.replace(b"avc1", b"zzzz"), "cannot decode its codec"),
        "playlist": (playlist(clip), "FFmpeg cannot read it"),
        "list of files": (f"ffconcat version 1.0\nfile {clip.name}\n".encode(), "cannot read it"),
    }


@pytest.mark.parametrize(
    "kind",
    ["text", "header", "no index", "sound", "no frames", "codec", "playlist", "list of files"],
)
def test_bad_file(transform, folder, clip, kind, capfd):
    data, reason = bad_files(folder, clip)[kind]
    path = folder / "bad.mp4"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ValueError, match=rf"video (file '{path}'|data of).*{reason}"):
            transform({"video": source})
    assert capfd.readouterr() == ("", "")


def test_closes_every_file(transform, folder, clip):
    damaged = bytearray(clip.read_bytes())
    position, size = place_of_frame(clip, 14)
    damaged[position : position + size] = bytes(size)
    bad = {**bad_files(folder, clip), "damaged": (bytes(damaged), "cannot be decoded")}
    gc.collect()  # of tests before, whose files would be closed meanwhile
    before = psutil.Process().num_fds()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, (data, reason) in {"good": (clip.read_bytes(), ""), **bad}.items():
            path = folder / f"closed {name}"
            path.write_bytes(data)
            if reason:
                with pytest.raises(ValueError, match=reason):
                    transform({"video": path, "frame_indices": [14]})
            else:
                transform({"video": path})
        with open_video(clip) as video:
            next(video.frames([0, 20]))
            container = video._container
        gc.collect()
    with pytest.raises(AssertionError, match="not open"):
        container.seek(0)
    assert psutil.Process().num_fds() == before


# One hour

MEASURE = """
import json, psutil, resource, sys, time
import numpy as np, torch
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLVideoTransform

torch.set_num_threads(1)
transform = Qwen2_5_VLVideoTransform(patch_dtype="uint8")
transform({"video": np.zeros((2, 56, 56, 3), np.uint8)})
before, start = psutil.Process().memory_info().rss, time.perf_counter()
sample = transform({"video": sys.argv[1]})
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
grid = sample["video_grid_thw"].tolist()
print(json.dumps([peak - before, seconds, sample["frame_indices"], grid]))
"""


def repeat(path, minute, times):
    """Writes a video several times, one after the other, without encoding it again."""
    with av.open(str(minute)) as source, av.open(str(path), "w") as target:
        template = source.streams.video[0]
        stream = target.add_stream_from_template(template)
        for i in range(times):
            source.seek(0)
            for packet in source.demux(template):
                if packet.size:
                    shift = int(i * template.duration)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = stream
                    target.mux(packet)


@pytest.mark.slow
def test_one_hour(tmp_path):
    options = {"preset": "ultrafast", "x264-params": "keyint=48:bframes=2:scenecut=0"}
    clip = Clip("mp4", frames=24 * 60, rate=24, size=(360, 640), options=options)
    minute = write_clip(tmp_path / "minute.mp4", clip)
    hour = tmp_path / "hour.mp4"
    repeat(hour, minute, 60)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(hour)], capture_output=True, text=True, check=True
    )
    growth, seconds, indices, grid = json.loads(run.stdout.splitlines()[-1])
    assert growth < 2**30
    assert len(indices) == 768
    assert (indices[0], indices[-1]) == (0, 24 * 3600 - 1)

    with av.open(str(minute)) as container:
        sums = [crc32(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    with open_video(hour) as video:
        given_out = count_decoded(video)
        assert video.num_frames == 24 * 3600
        for i, frame in zip(indices, video.frames(indices), strict=True):
            assert crc32(frame) == sums[i % len(sums)]
        needed = sum(last % 48 + 1 for last in {i // 48: i for i in indices}.values())
        assert len(given_out) <= needed
        print(
            f"one hour: {growth / 2**20:.0f} MiB more at most, {seconds:.1f} s, grid {grid}, "
            f"{len(given_out)} of {video.num_frames} frames decoded"
        )
