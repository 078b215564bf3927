"""Animations in WebP, which FFmpeg does not decode, read like videos."""

from collections.abc import Iterator, Sequence
from io import BytesIO

import numpy as np
from PIL import Image

WEBP_HEAD = 12  # bytes by which a file is known
# Bytes of a chunk's name and size, and within the chunk of a frame those before its duration
_CHUNK_HEAD, _BEFORE_DURATION, _DURATION = 8, 12, 3


def is_webp(head: bytes) -> bool:
    """Whether a file is WebP.

    Args:
        head (bytes): its first ``WEBP_HEAD`` bytes.

    Returns:
        bool: whether it is.
    """
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


class WebPAnimation:
    """The frames of an animation, with the interface of :class:`~torchtune_vl.media._videos.Video`.

    Args:
        data (bytes): the file.

    Attributes:
        num_frames (int): how many frames there are, at least 1.
        fps (float): average number of frames per second.
        size (tuple[int, int]): height and width of the frames in pixels.

    Raises:
        ValueError: if it is no animation or its frames have no durations.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        durations = list(_milliseconds(data))
        if not durations:
            raise ValueError("is a WebP image without an animation: pass it as an image")
        if not sum(durations):
            raise ValueError("has no frame rate; convert it or pass its frames as a list")
        self.num_frames = len(durations)
        self.fps = 1000 * len(durations) / sum(durations)
        try:
            with Image.open(BytesIO(data)) as image:
                self.size = (image.height, image.width)
        except Exception as error:  # Pillow's decoders raise what they like
            raise _undecodable(0, error) from error

    def __enter__(self) -> "WebPAnimation":
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to close."""

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decodes frames, one at a time, without their transparency.

        Args:
            indices (Sequence[int]): numbers of the frames, increasing, below ``num_frames``.

        Yields:
            np.ndarray: uint8 [H, W, 3] for each index.

        Raises:
            ValueError: if a frame cannot be decoded.
        """
        with Image.open(BytesIO(self._data)) as image:
            for index in indices:
                try:
                    image.seek(index)
                    pixels = np.array(image.convert("RGB"))
                except Exception as error:  # as above
                    raise _undecodable(index, error) from error
                yield pixels


def _milliseconds(data: bytes) -> Iterator[int]:
    """The duration of each frame, from the chunks of the container."""
    start = WEBP_HEAD
    while start + _CHUNK_HEAD <= len(data):
        content = start + _CHUNK_HEAD
        if data[start : start + 4] == b"ANMF":
            duration = content + _BEFORE_DURATION
            yield int.from_bytes(data[duration : duration + _DURATION], "little")
        size = int.from_bytes(data[start + 4 : content], "little")
        start = content + size + size % 2


def _undecodable(index: int, error: Exception) -> ValueError:
    return ValueError(
        f"frame {index} cannot be decoded ({type(error).__name__}: {error}); the file is damaged: "
        "fetch it again or remove it from the data"
    )
