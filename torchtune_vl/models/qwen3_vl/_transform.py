"""What conversations become for Qwen3-VL (arXiv 2511.21631): its sizes, videos and templates."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from torchtune_vl.chat import ChatTransform, ProcessorClasses
from torchtune_vl.chat import _processor_files as processor_files
from torchtune_vl.chat._chat_template import without_marks
from torchtune_vl.chat._messages import EncodedTurn
from torchtune_vl.chat._prompt import VIDEO, VIDEO_ALONE, Plain
from torchtune_vl.files._json import JsonObject
from torchtune_vl.media import Geometry, ImageTransform, VideoTransform
from torchtune_vl.media._patches import Size, smart_resize
from torchtune_vl.media._transforms import Settings

GEOMETRY = Geometry(
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    window_size=None,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    min_pixels=65536,
    max_pixels=16777216,
)
# As published (Apache-2.0), but for escapes of characters that mark what the loss is taken of:
# it begins (ufdd0) and ends (ufdd1), or an answer is left out (ufddf) as its reasoning is
_TEMPLATES = [
    (files(__package__) / f"{kind}.jinja").read_text(encoding="utf-8")
    for kind in ("instruct", "thinking")
]
_INSTRUCT, _THINKING = _TEMPLATES
_PUBLISHED = {
    text: template
    for template in _TEMPLATES
    for published in [without_marks(template).strip()]
    for text in (published, published.replace(VIDEO, VIDEO_ALONE))
}
# What the width and the height of any image are in boxes
_EXTENT = 1000
# Of a frame, by transformers' `cap_pixels_per_frame`
_MAX_VIDEO_TOKENS = 768
_log = logging.getLogger(__name__)


class Qwen3_VLImageTransform(ImageTransform):
    """:class:`~torchtune_vl.media.ImageTransform` with Qwen3-VL's sizes of patches.

    They have 1,536 numbers where it says 1176, and uint8 ones 768 for 588.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(GEOMETRY, **settings)


@dataclass(eq=False, kw_only=True)
class Qwen3_VLVideoTransform(VideoTransform):
    """:class:`~torchtune_vl.media.VideoTransform` by the rules of ``Qwen3VLVideoProcessor``.

    Of a file ``fps`` frames of each second are taken, ``min_frames`` to ``max_frames`` in all, at
    even distances from the first to the last one; a sample's ``nframes`` is not rounded, and the
    last of an odd number is repeated. A sample's ``video_start`` and ``video_end`` choose the part,
    as of the other families.

    What limits the size is the area of all frames together, ``min_pixels`` to ``total_pixels``,
    also as a sample's settings, in pixels; None: 4,096 and 25,165,824, as published.
    ``max_pixels``, rounded down to whole tokens, is the largest area of a frame; None: any, as
    published, in transformers 4.57 and in servers. transformers >= 5.20 warns that the cap of
    qwen-vl-utils is to come: ``cap_pixels_per_frame`` of ``video_preprocessor_config.json`` sets
    it, to ``max_video_tokens`` (768) tokens.
    """

    geometry: Geometry = GEOMETRY

    def _defaults(self) -> dict[str, Any]:
        limits = {"min_pixels": 4096, "max_pixels": None, "total_pixels": 25165824}
        return {**super()._defaults(), **limits}

    def _count(self, frames: int, rate: float, settings: Settings) -> int:
        if "nframes" in settings:
            return settings["nframes"]
        fps, fewest, most = self._sampling(settings)
        return min(max(int(frames / rate * fps), fewest), most, frames)

    def _spread(self, first: int, last: int, count: int) -> list[int]:
        return np.linspace(first, last, count).round().astype(int).tolist()

    def _resized(self, size: Size, frames: int, settings: Settings) -> Size:
        unit, tokens = self.geometry.unit, self.geometry.unit**2
        least = settings.get("min_pixels", self.min_pixels)
        most = settings.get("total_pixels", self.total_pixels)
        caps = [cap for cap in (settings.get("max_pixels"), self.max_pixels) if cap is not None]
        frames = max(frames, self.geometry.temporal_patch_size)  # one is repeated
        if caps:
            cap = min(caps) // tokens * tokens
            if not cap:
                raise ValueError(f"max_pixels is {min(caps)}, less than a token: {tokens}")
            if caps[0] > min(caps):
                told = "max_pixels of a video is more than that of the transform allows"
                warnings.warn(f"{told}: this holds", stacklevel=2)
            most = max(min(cap, most // frames), int(least * 1.05)) * frames
        if least > most:
            wrong = f"min_pixels is {least} and total_pixels {most}, of all frames together"
            raise ValueError(f"{wrong}: make them min_pixels <= total_pixels")
        if min(size) < unit:
            scale = max(unit / side for side in size)
            size = int(size[0] * scale), int(size[1] * scale)
        return smart_resize(*size, unit, least, most, frames)


class Qwen3_VLTransform(ChatTransform):
    """The transform of conversations for Qwen3-VL, whose videos have their times in the text.

    Arguments are those of :class:`~torchtune_vl.chat.ChatTransform`, but those of videos mean what
    :class:`Qwen3_VLVideoTransform` says. Boxes are JSON in thousandths of the image.

    Each step of a video, of two frames, is ``<0.2 seconds><|vision_start|>``, its placeholders and
    ``<|vision_end|>``: the mean of the times of both frames in the file. The times carry no loss.
    There is no further pair of tokens around the whole video: so ids were in pre-training's own
    code, transformers 4.57 (``Qwen3VLProcessor``). transformers >= 5, and vLLM with it, leave the
    template's ``<|vision_start|>`` and ``<|vision_end|>`` around all steps, two tokens more for
    each video, which no weights have seen; templates that are written here have none.

    Chat templates are the published ones of Instruct (by default) and Thinking, known by their
    text. Instruct's drops media in messages of ``system`` and ``assistant``, and messages of
    ``system`` that are not the first: errors here. Thinking's prompt ends in ``<think>`` and a line
    break, which carry no loss; the reasoning, from a message's ``reasoning_content`` or from before
    ``</think>`` in its text, does, with ``</think>`` and the answer. Without a reasoning the last
    answer's is empty. Answers before the last question lose their reasoning, as do steps of tools
    that have none; as a model does not write them so, they carry no loss, which a warning says once
    if they were to (``train_on`` "all").
    """

    geometry = GEOMETRY
    processors = ProcessorClasses(
        "Qwen3VLProcessor", "Qwen2VLImageProcessorFast", "Qwen3VLVideoProcessor", {}
    )
    videos = Qwen3_VLVideoTransform
    has_timed_steps = True
    plain = {  # noqa: RUF012 (a ClassVar of the parent)
        _INSTRUCT: Plain(frozenset({"system", "user", "assistant"})),
        _THINKING: Plain(frozenset({"system", "user"}), opens="<think>\n"),
    }
    more_tokens = ("<tool_response>", "</tool_response>", "<think>", "</think>")

    @classmethod
    def template_to_run(cls, chat_template: str | None) -> str:
        """Return a published template with what marks the loss, and any other as it is."""
        if chat_template is None:
            return _INSTRUCT
        return _PUBLISHED.get(chat_template.strip(), chat_template)

    @classmethod
    def settings_of_videos(cls, videos: JsonObject, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """Read limits of the area of all frames, and how these are chosen.

        ``ValueError`` for what transformers reads otherwise: limits beside or without ``size``, and
        a number of frames.
        """
        limits = processor_files.limits_of(videos, fixed)
        for name in ("min_pixels", "max_pixels", "num_frames"):
            if name in videos:
                raise videos.error(name, "none: size has the limits, and fps chooses frames")
        if "size" not in videos:
            raise videos.error("size", "limits of the area of all frames")
        names = {"min_pixels": "video_min_pixels", "max_pixels": "video_total_pixels"}
        settings: dict[str, Any] = {names[name]: limits[name] for name in limits}
        if "cap_pixels_per_frame" in videos and videos.flag("cap_pixels_per_frame"):
            tokens = videos.over({"max_video_tokens": _MAX_VIDEO_TOKENS}).whole("max_video_tokens")
            settings["video_max_pixels"] = tokens * GEOMETRY.unit**2
        return settings | processor_files.sampling_of(videos)

    def config_of_videos(self) -> dict[str, Any]:
        """Write down what :meth:`settings_of_videos` reads."""
        videos = self.video_transform
        cap = videos.max_pixels
        return {
            **processor_files.config_of(videos, videos.min_pixels, int(videos.total_pixels)),
            "fps": videos.fps,
            "min_frames": videos.min_frames,
            "max_frames": videos.max_frames,
            "cap_pixels_per_frame": cap is not None,
            "max_video_tokens": (cap or 0) // GEOMETRY.unit**2 or _MAX_VIDEO_TOKENS,
        }

    def processor_files(self) -> dict[str, str]:
        """Write the settings down; a published template has the placeholders of videos alone.

        So transformers >= 5, and servers with it, add no tokens that weights have not seen; 4.57
        replaces them with a pair around them or without.
        """
        written = super().processor_files()
        if self.has_published_template:
            for name in ("chat_template.json", "chat_template.jinja"):
                written[name] = written[name].replace(VIDEO, VIDEO_ALONE)
        return written

    @property
    def has_published_template(self) -> bool:
        """Whether the chat template is that of Instruct or of Thinking."""
        return self.prompts.chat_template in _TEMPLATES

    @property
    def writes_reasoning(self) -> bool:
        """Whether the chat template is that of Thinking."""
        return self.prompts.chat_template == _THINKING

    def check_supervised(self, tokens: Sequence[int], mask: Sequence[bool], *told: str) -> None:
        """Check it as the parent does, and warn once of an answer without the reasoning."""
        super().check_supervised(tokens, mask, *told)
        if not self.writes_reasoning or "no reasoning" in self._told:
            return
        # The prompt's <think>, without loss, one token of line breaks, and the end, which has loss
        empty = self.special_tokens["<think>"], True, self.special_tokens["</think>"], False
        is_empty = empty in zip(tokens, mask, tokens[2:], mask[2:], strict=False)
        if is_empty and self._told.is_new("no reasoning"):
            _log.warning(
                "An answer has no reasoning, where the chat template asks for one: a model that is "
                "trained so ends its reasoning at once. Give answers their reasoning_content, or "
                "train an Instruct model. This is said once."
            )

    def final_answer(self, text: str) -> str:
        """Return what follows the reasoning, nothing if that has not ended."""
        return text.partition("</think>")[2].lstrip("\n") if self.writes_reasoning else text

    def step_texts(self, times: Sequence[float]) -> list[str]:
        """Write the time before each step, in seconds."""
        return [f"<{time:.1f} seconds>" for time in times]

    def positions(
        self,
        tokens: Sequence[int],
        grid_thw: torch.Tensor,
        seconds_per_step: Sequence[float | None],
    ) -> torch.Tensor:
        """Find the M-RoPE positions as of images, of which each step of a video is one."""
        steps = grid_thw
        if any(seconds_per_step):  # of texts and images alone they are quicker
            steps = grid_thw.repeat_interleave(grid_thw[:, 0], 0)
            steps[:, 0] = 1
        return super().positions(tokens, steps, [None] * len(steps))

    def tokenize_message(self, message: Any, **kwargs: Any) -> tuple[list[int], list[bool]]:
        """Tokenize one message as several are."""
        return self.tokenize_messages([message])

    def box_extent(self, height: int, width: int) -> Size:
        """Return 1,000 for both sides of any image."""
        return _EXTENT, _EXTENT

    def _encoded(self, turns: Sequence[Any], *args: Any, **kwargs: Any) -> list[EncodedTurn]:
        drops_later_systems = self.prompts.chat_template == _INSTRUCT
        if drops_later_systems and any(turn.role == "system" for turn in turns[1:]):
            problem = "a message of the system behind the first message is left out by the template"
            raise ValueError(f"{problem}: move its text into the first, or remove it")
        return super()._encoded(turns, *args, **kwargs)
