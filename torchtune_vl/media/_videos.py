"""Chosen frames of a video file, without decoding or holding the others."""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import groupby
from typing import Any, BinaryIO, cast

import av
import numpy as np
import torch
from av.packet import Packet
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from torchtune_vl.media._errors import reason_of, refusing
from torchtune_vl.media._images import decoding, turned
from torchtune_vl.media._sources import RemoteLimits, Source, open_bytes

# FFmpeg's own step of 32 KiB would call into Python, which reads the file, far more often
READ_STEP = 2**20
# Twice those of 8K; a decoder holds up to 17 frames
MAX_PIXELS = 2**26
# How many frames a decoder of H.264 or H.265 can hold back to put them in order
MAX_HELD_BACK = 16
# Formats whose files begin wherever a recording began
BROADCASTS = ("mpegts", "mpeg")
# Decoders that see in one packet that no other frame is predicted from its frame, and give the
# others the same pixels without it
SKIPPING = ("h264", "mpeg4", "mpeg2video")
# From version 17 on PyAV converts on one thread per processor unless told otherwise
RGB: dict[str, Any] = {"format": "rgb24"}
if int(av.__version__.split(".")[0]) >= 17:
    RGB["threads"] = 1
DURATION = r"(\d+):(\d+):(\d+(?:\.\d+)?)"
READ_ERRORS = (av.FFmpegError, OSError)
REMOVE = "fetch it again or remove it from the data"
NO_RATE = "has no frame rate; convert it or pass its frames as a list"


@contextmanager
def open_video(source: Source, remote: RemoteLimits | None = None) -> Iterator["Video | WebPVideo"]:
    """Open a video file as ``open_bytes`` does, of any size; it is read piece by piece.

    ``ValueError`` if it is cut off, or holds no video that FFmpeg can decode.
    """
    remedy = f"the file is damaged, cut off or no video: {REMOVE}"
    with open_bytes(source, remote, max_bytes=math.inf) as file:
        head = file.read(12)
        with refusing("FFmpeg cannot read it", remedy, READ_ERRORS):
            is_webp = head[:4] == b"RIFF" and head[8:] == b"WEBP"
            video = WebPVideo(file) if is_webp else Video(file)
        with closing(video):
            yield video


class Video:
    """An open video file: facts about its frames, and any of them decoded.

    Frames are numbered in the order in which they are shown. Opening reads all packets once
    without decoding them, which finds the frames whatever the header says: where it holds no
    number of frames, at a variable frame rate, out of order, or cut by an edit list.

    A frame is decoded from the last key frame before it. Frames in between from which no other is
    predicted are left out where the decoder is sure of that (H.264, MPEG-2, MPEG-4, and H.265 of
    one temporal layer). A file whose timestamps do not put its frames in order is decoded from its
    start. Decoding takes ``torch.get_num_threads()`` threads, of H.264 for slices of a frame alone.
    """

    num_frames: int  # how many a player shows, at least 1
    fps: float  # average number of frames per second, as FFmpeg finds it
    times: np.ndarray  # float64 [num_frames], seconds from the first frame to each
    size: tuple[int, int]  # height and width in pixels, before frames are turned upright

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._reformatter = VideoReformatter()
        self._open()
        self.size = (self._stream.height, self._stream.width)
        self._index_packets()

    def close(self) -> None:
        """Close what FFmpeg holds, but not the file."""
        self._container.close()

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode frames of increasing numbers, one at a time: uint8 [H, W, 3].

        The pixels are those of PyAV's ``to_ndarray(format="rgb24")``, turned upright by quarters
        and mirrored as the file's display matrix says. ``ValueError`` names the frame that cannot
        be decoded without errors.
        """
        wanted = self._ticks[list(indices)].tolist()
        while wanted:
            left, reason = len(wanted), "the decoder gives no frame"
            try:
                for tick, frame in self._decoded(wanted):
                    # Also one that is not asked for: others can be predicted from it
                    if frame.is_corrupt:
                        raise self._undecodable(tick, "the decoder finds errors in it")
                    if wanted[:1] == [tick]:
                        del wanted[0]
                        yield self._upright_rgb(frame)
            except READ_ERRORS as error:
                reason = reason_of(error)
            if len(wanted) == left:
                raise self._undecodable(wanted[0], reason)

    def _open(self) -> None:
        self._file.seek(0)
        self._container = av.open(
            self._file,
            mode="r",
            buffer_size=READ_STEP,
            metadata_errors="replace",
            # Keeps a playlist from opening other files and addresses
            options={"protocol_whitelist": "", "max_pixels": str(MAX_PIXELS)},
        )
        stream = self._container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise ValueError("holds no video; remove it from the data")
        context = stream.codec_context
        if context is None:
            raise ValueError("FFmpeg cannot decode its codec; convert it, to H.264 for example")
        if stream.width * stream.height > MAX_PIXELS:
            size = f"{stream.width} x {stream.height} pixels"
            raise ValueError(f"has frames of {size}, more than {MAX_PIXELS:,}: make it smaller")
        context.thread_count = torch.get_num_threads()
        context.options = {"max_pixels": str(MAX_PIXELS)}
        # An error, not a guess at what a damaged part of a frame showed. H.264's decoder marks such
        # frames, unless threads decode several at a time, and would object to frames that need
        # others from before a seek
        if context.name == "h264":
            context.thread_type = "SLICE"
        else:
            context.thread_type = "AUTO"
            context.options["err_detect"] = "explode"
        # H.265 marks frames from which no other of the same temporal layer is predicted. The number
        # of layers is in the decoder configuration record of ISO/IEC 14496-15, section 8.3.3.1
        record = context.extradata or b""
        one_layer = len(record) > 21 and record[0] == 1 and record[21] >> 3 & 7 == 1
        self._can_skip = context.name in SKIPPING or (context.name == "hevc" and one_layer)
        self._stream = stream

    def _index_packets(self) -> None:
        """Finds the frames. A frame's place is its position in the file, not its number."""
        packets, stored, timed, cut = [], 0, True, False
        for packet in self._container.demux(self._stream):
            stored += packet.dts is not None or packet.pts is not None
            if packet.size:
                pts, duration = packet.pts or 0, packet.duration or 0
                packets.append((pts, pts + duration, packet.is_keyframe, packet.is_discard))
                timed &= packet.pts is not None
                cut = packet.is_corrupt
        if not packets:
            raise ValueError(f"holds no frames; {REMOVE}")
        # The header of an MP4 file lists its packets
        cut |= stored < len(getattr(self._stream, "index_entries", ()))

        self._pts, ends, is_key, hidden = map(np.array, zip(*packets, strict=True))
        self._keys = np.flatnonzero(is_key)
        self._places = {tick: place for place, tick in enumerate(self._pts.tolist())}
        self._next_place = len(packets)
        by_time = self._pts.argsort(kind="stable")
        # Whether timestamps say which frame is shown when. Concatenated streams repeat them; AVI
        # holds none, and FFmpeg's follow the order of the file
        moved = by_time - np.arange(len(packets))
        distinct = (np.diff(self._pts[by_time]) > 0).all()
        has_b_frames = self._stream.codec_context.has_b_frames
        made_up = self._container.format.name == "avi" and has_b_frames and not moved.any()
        self._timed = timed and distinct and np.abs(moved).max() <= MAX_HELD_BACK and not made_up
        if self._timed:
            hidden |= self._undecodable_beginning(hidden)
        # What tells frames apart, in the order in which they are shown: their timestamps, or where
        # these say nothing, their numbers
        self._ticks = self._pts[by_time][~hidden[by_time]]
        seconds_per_tick = float(self._stream.time_base or 0)
        self.times = (self._ticks - self._ticks[:1]) * seconds_per_tick
        rate = self._stream.average_rate or self._stream.guessed_rate
        if not rate and not self.times.any():
            raise ValueError(NO_RATE)
        self.fps = float(rate or (len(self.times) - 1) / self.times[-1])
        if not self._timed:
            self._reopen()
            self._ticks = np.arange(sum(1 for _ in self._container.decode(self._stream)))
            self.times = self._ticks / self.fps
        self.num_frames = len(self.times)
        if not self.num_frames:
            raise ValueError(f"holds no frames; {REMOVE}")

        tag = re.fullmatch(DURATION, self._stream.metadata.get("DURATION", ""))  # of Matroska
        hours, minutes, seconds = tag.groups() if tag else (0, 0, 0)
        stated = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        last = ends.max() * seconds_per_tick
        longest_frame = np.diff(self.times).max(initial=1 / self.fps)
        if cut or last + 2 * longest_frame < stated:
            raise ValueError(f"is cut off after {last:.2f} s; {REMOVE}")

    def _undecodable_beginning(self, hidden: np.ndarray) -> np.ndarray:
        """Which frames need some from before the file: a whole decode does not show them."""
        first = self._keys[0] if len(self._keys) else len(self._pts) - 1
        early = ~hidden & (self._pts < self._pts[first])
        if self._container.format.name not in BROADCASTS:
            early[:first] = False  # begins with a key frame, or is damaged
        if not early.any():
            return early
        given: set[int | None] = set()
        for place, packet in self._packets_from(0):
            with suppress(av.FFmpegError):
                given |= {frame.pts for frame in self._stream.codec_context.decode(packet)}
            if place > first + 4 * MAX_HELD_BACK or self._pts[first] in given:
                break
        return early & ~np.isin(self._pts, [pts for pts in given if pts is not None])

    def _decoded(self, wanted: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Decodes at least the first of the frames that are wanted, and what it needs."""
        if not self._timed:
            self._reopen()
            decoded = self._container.decode(self._stream)
            yield from zip(range(wanted[-1] + 1), decoded, strict=False)
            return
        key, group = next(groupby(wanted, self._key_before))
        start = self._pts[key]
        # Streams that refresh the picture part by part, and careless writers, call frames key
        # frames that are not, which a frame that is hidden does not tell
        begun = key == 0 or start not in self._ticks
        try:
            for frame in self._decode_between(key, set(group)):
                if frame.pts is not None and frame.pts >= start:
                    begun = begun or (frame.pts == start and frame.key_frame)
                    if not begun:
                        break
                    yield frame.pts, frame
        except READ_ERRORS:
            if begun:
                raise
        if not begun:
            self._keys = self._keys[:0]
            yield from self._decoded(wanted)

    def _key_before(self, tick: int) -> int:
        """Place of the last key frame that a frame needs: of those stored and shown before it."""
        keys = self._keys[: self._keys.searchsorted(self._places[tick], "right")]
        usable = keys[self._pts[keys] <= tick]
        return int(usable[-1]) if len(usable) else 0

    def _decode_between(self, key: int, ticks: Collection[int]) -> Iterator[VideoFrame]:
        """Decodes what some frames need, beginning with a key frame."""
        last = max(self._places[tick] for tick in ticks)
        for place, packet in self._packets_from(key):
            context = self._stream.codec_context
            can_skip = self._can_skip and packet.pts not in ticks
            context.skip_frame = "NONREF" if can_skip else "DEFAULT"
            yield from context.decode(packet)
            if place == last:
                break
        yield from self._stream.codec_context.decode(None)

    def _packets_from(self, start: int) -> Iterator[tuple[int, Packet]]:
        """Reads on from a place, with the place of each packet."""
        self._stream.codec_context.flush_buffers()
        # A format that seeks by guessing may arrive behind the key frame, or nowhere
        for place in (start, *self._keys[self._keys < start][-1:].tolist(), None):
            if place is None:
                self._reopen()
            elif place != self._next_place:
                with suppress(av.FFmpegError):
                    self._container.seek(int(self._pts[place]), stream=self._stream)
            packets = self._placed_packets()
            found = next((p for p in packets if p[0] >= start), None)
            if found and found[0] == start:
                yield found
                yield from packets
                return

    def _placed_packets(self) -> Iterator[tuple[int, Packet]]:
        for packet in self._container.demux(self._stream):
            place = self._places.get(packet.pts) if packet.size else None
            if place is not None:
                self._next_place = place + 1
                yield place, packet

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def _undecodable(self, tick: int, reason: str) -> ValueError:
        number = min(self._ticks.searchsorted(tick), self.num_frames - 1)
        problem = f"frame {number} at {self.times[number]:.2f} s cannot be decoded ({reason})"
        return ValueError(f"{problem}; the file is damaged: convert it, {REMOVE}")

    def _upright_rgb(self, frame: VideoFrame) -> np.ndarray:
        # One reformatter saves setting up the conversion for each frame
        rgb = self._reformatter.reformat(frame, **RGB).to_ndarray()
        matrix = cast(SideData | None, frame.side_data.get("DISPLAYMATRIX"))
        if matrix is None:
            return rgb
        # Its elements show the stored point (x, y) at (a * x + c * y, b * x + d * y)
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        sideways = abs(b) > abs(a)  # to the nearest quarter
        x, y = (c, b) if sideways else (a, d)
        return turned(rgb, sideways, y < 0, x < 0)


class WebPVideo:
    """An animation in WebP, which FFmpeg does not decode, with what is used of :class:`Video`."""

    def __init__(self, file: BinaryIO) -> None:
        milliseconds, start = [], file.tell()
        # A chunk has 4 bytes of name, 4 of size and its content, of an even length. That of a frame
        # has 12 bytes before the 3 of its duration
        while len(head := file.read(23)) >= 8:
            if head[:4] == b"ANMF":
                milliseconds.append(int.from_bytes(head[20:], "little"))
            start += 8 + (int.from_bytes(head[4:8], "little") + 1) // 2 * 2
            file.seek(start)
        if not milliseconds:
            raise ValueError("is a WebP image without an animation: pass it as an image")
        if not sum(milliseconds):
            raise ValueError(NO_RATE)
        self.num_frames = len(milliseconds)
        self.fps = 1000 * len(milliseconds) / sum(milliseconds)
        with decoding("frame 0"):
            self._image = Image.open(file)
        self.size = (self._image.height, self._image.width)
        self.close = self._image.close

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode frames of increasing numbers, one at a time, without their transparency."""
        for index in indices:
            with decoding(f"frame {index}"):
                self._image.seek(index)
                pixels = np.array(self._image.convert("RGB"))
            yield pixels
