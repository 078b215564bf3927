"""Video files of every kind, written with PyAV."""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import OutputContainer

MILLISECOND = Fraction(1, 1000)


class Clip(NamedTuple):
    """What a video file holds; ``suffix`` chooses its container."""

    suffix: str
    codec: str = "libx264"
    frames: int = 40
    rate: Fraction | int = 30
    size: tuple[int, int] = (96, 128)  # height, width
    options: Mapping[str, str] = {}
    pixels: str = "yuv420p"
    times: Sequence[int] = ()  # in milliseconds; even steps by default
    display: tuple[float, bool, bool] = (0, False, False)  # degrees, mirrored, upside down
    hidden: int = 0  # frames that an edit list cuts off at the start
    audio: bool = False
    muxer: Mapping[str, str] = {}


def x264(parameters: str) -> dict[str, str]:
    return {"preset": "veryfast", "x264-params": parameters}


def x265(parameters: str) -> dict[str, str]:
    return {"preset": "ultrafast", "x265-params": f"log-level=none:{parameters}"}


VP9 = {"deadline": "realtime", "cpu-used": "8"}
NTSC = Fraction(30000, 1001)
IRREGULAR = tuple(int(t) for t in np.cumsum(np.random.default_rng(3).integers(5, 90, 50)))

CLIPS = {
    "H.264, B-frames": Clip("mp4", options=x264("keyint=12:bframes=3:b-pyramid=normal")),
    "H.264, one long GOP, 29.97": Clip("mkv", frames=90, rate=NTSC, options=x264("keyint=999")),
    "H.264, open GOPs": Clip("mkv", options=x264("keyint=10:open-gop=1:bframes=3:b-adapt=0")),
    "H.264, open GOPs, stream": Clip("ts", options=x264("keyint=10:open-gop=1:bframes=2")),
    "H.264, no B-frames": Clip("mp4", options=x264("keyint=12:bframes=0:scenecut=0")),
    "H.264, key frames only": Clip("mov", options=x264("keyint=1")),
    "H.264, GOPs of two": Clip("mp4", options=x264("keyint=2:bframes=2:b-adapt=0")),
    "H.264, gradual refresh": Clip("mp4", frames=90, options=x264("intra-refresh=1:keyint=20")),
    "H.264, interlaced": Clip("mp4", options=x264("tff=1:keyint=12:bframes=3")),
    "H.264, 4:4:4, odd": Clip("mp4", size=(97, 131), pixels="yuv444p", options=x264("keyint=9")),
    "H.264, 10 bit": Clip("mkv", pixels="yuv420p10le", options=x264("keyint=9")),
    "H.264, variable rate": Clip("mp4", frames=50, times=IRREGULAR, options=x264("keyint=9")),
    "H.264, variable rate, Matroska": Clip("mkv", frames=50, times=IRREGULAR),
    "H.264, sound": Clip("mp4", audio=True, options=x264("keyint=12")),
    "H.264, edit list": Clip("mp4", hidden=17, options=x264("keyint=12")),
    "H.264, fragments": Clip(
        "mp4", options=x264("keyint=12"), muxer={"movflags": "frag_keyframe+empty_moov"}
    ),
    "H.264 in AVI": Clip("avi", options=x264("keyint=12")),
    "H.264, no container": Clip("h264", options=x264("keyint=12")),
    "H.264, Flash": Clip("flv", options=x264("keyint=12")),
    "H.264, 1 frame/s": Clip("mp4", rate=1, frames=30),
    "H.264, 60 frames/s": Clip("mp4", rate=60, frames=61),
    "H.264, 2 frames": Clip("mp4", frames=2),
    "H.264, upright": Clip("mp4", frames=8, size=(224, 96), display=(90, False, False)),
    "H.265, open GOPs": Clip("mp4", "libx265", options=x265("keyint=12:bframes=4")),
    "H.265, closed GOPs": Clip("mkv", "libx265", options=x265("keyint=12:open-gop=0")),
    "H.265, two layers": Clip(
        "mp4", "libx265", options=x265("keyint=20:temporal-layers=2:bframes=3")
    ),
    "H.265, stream": Clip("ts", "libx265", options=x265("keyint=12")),
    "VP9, odd": Clip("webm", "libvpx-vp9", size=(97, 131), options={**VP9, "g": "15"}),
    "VP9 in MP4": Clip("mp4", "libvpx-vp9", rate=24, options={**VP9, "g": "15"}),
    "VP8": Clip("webm", "libvpx", rate=25, options={**VP9, "g": "15"}),
    "MPEG-4": Clip("mp4", "mpeg4", options={"bf": "2", "g": "12"}),
    "MPEG-4 in AVI": Clip("avi", "mpeg4", options={"bf": "2", "g": "12"}),
    "MPEG-2, stream": Clip("ts", "mpeg2video", rate=25, options={"bf": "2", "g": "12"}),
    "Motion JPEG": Clip("avi", "mjpeg", pixels="yuvj420p"),
    "GIF": Clip("gif", "gif", rate=10, frames=20, pixels="rgb8"),
}


def pictures(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Frames uint8 [height, width, 3] that all differ, with edges, slopes and noise that move."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 80, (height, width))
    for i in range(count):
        red = 128 + 100 * np.sin((x + 5 * i) / 11) * np.cos((y - 3 * i) / 17)
        green = np.roll(noise, (i, 2 * i), (0, 1)) + (x + y + 7 * i) % 97
        blue = (x // 8 + y // 8 + i) % 2 * 200 + i % 50
        yield np.stack([red, green, blue], -1).astype(np.uint8)


def write_clip(path: Path, clip: Clip) -> Path:
    """Encodes a clip."""
    muxer = {"avoid_negative_ts": "disabled", "use_editlist": "1"} if clip.hidden else {}
    with av.open(str(path), "w", options={**muxer, **clip.muxer}) as container:
        stream = container.add_stream(clip.codec, rate=clip.rate, options=dict(clip.options))
        stream.height, stream.width = clip.size
        stream.pix_fmt = clip.pixels
        stream.codec_context.thread_count = 1
        if clip.display != (0, False, False):
            degrees, mirrored, upside_down = clip.display
            stream.set_display_rotation(degrees, hflip=mirrored, vflip=upside_down)
        time_base = MILLISECOND if clip.times else 1 / Fraction(clip.rate)
        stream.codec_context.time_base = time_base
        if clip.audio:
            _write_sound(container)
        times = clip.times or range(-clip.hidden, clip.frames - clip.hidden)
        for time, picture in zip(times, pictures(clip.frames, *clip.size), strict=True):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _write_sound(container: OutputContainer) -> None:
    stream = container.add_stream("aac", rate=48000)
    for i in range(60):
        noise = np.random.default_rng(i).standard_normal((1, 1024)).astype(np.float32) / 10
        frame = av.AudioFrame.from_ndarray(noise, "fltp", "mono")
        frame.sample_rate, frame.pts = 48000, 1024 * i
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
