"""Both sides of the comparison, from the files of one directory each and nothing else."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import transformers
from transformers.image_utils import load_image
from transformers.video_utils import VideoMetadata

from torchtune_vl.chat._prompt import VIDEO, VIDEO_ALONE
from torchtune_vl.media import ImageTransform
from torchtune_vl.media._images import Backend
from torchtune_vl.models._registry import Family, families, family_of
from torchtune_vl.validation._inputs import Conversation
from torchtune_vl.validation._torchvision import import_torchvision

# What the names of transformers' image processors end in
BACKENDS: dict[Backend, str] = {"torchvision": "", "pil": "Pil"}
# Under which names both sides give patches and grids
MEDIA_KEYS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
# Shows progress: takes a sequence and what is in it, and returns the items one after another
Track = Callable[[Sequence[Any], str], Iterable[Any]]

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a function makes of arguments, or the error in that or in an argument."""
    for error in filter(failed, args):
        return error
    try:
        return function(*args, **kwargs)
    except Exception as error:  # decoders and tokenizers raise what they like
        return error


def failed(*results: Any) -> bool:
    """Whether one of the results of attempts is an error."""
    return any(isinstance(result, Exception) for result in results)


def attempted(read: Callable[[Any], Any]) -> Any:
    """Make a property of what is read once, when it is asked for, or of the error in that."""
    return cached_property(lambda self: attempt(read, self))


class _Side:
    """Reads a directory, each part on its own, so that one may fail; its limit may be replaced."""

    def __init__(self, directory: Path, max_pixels: int | None = None) -> None:
        self.directory = directory
        self._limits: dict[str, Any] = {} if max_pixels is None else {"max_pixels": max_pixels}

    @cached_property
    def family(self) -> Family:
        """The family of the directory; without a config, the first that there is."""
        has_config = (self.directory / "config.json").is_file()
        return family_of(self.directory) if has_config else families()[0]


class Ours(_Side):
    """Our side."""

    tokenizer = attempted(lambda self: self.family.transform(*self.vocabulary_files))

    @property
    def vocabulary_files(self) -> list[Path]:
        """The files that :meth:`~torchtune_vl.chat.ChatTransform.from_pretrained` reads."""
        has_one = (self.directory / "tokenizer.json").exists()
        names = ["tokenizer.json"] if has_one else ["vocab.json", "merges.txt"]
        return [self.directory / name for name in names]

    @attempted
    def settings(self) -> dict[str, Any]:
        return self.family.transform.settings_of(self.directory) | self._limits

    @attempted
    def transform(self) -> Any:
        return self._transform()

    @attempted
    def served_transform(self) -> Any:
        """Read it all as servers do, and qwen-vl-utils: what is transparent lies on white."""
        return self._transform(alpha="white")

    def _transform(self, **settings: Any) -> Any:
        """Read it all; special tokens in texts are tokens, as in transformers."""
        read = self.family.transform.from_pretrained
        return read(self.directory, parse_special="all", **settings, **self._limits)

    @cached_property
    def image_transforms(self) -> dict[Backend, ImageTransform]:
        names = ("min_pixels", "max_pixels", "image_mean", "image_std")
        settings = {k: v for k, v in self.settings.items() if k in names}
        return {b: ImageTransform(self.family.geometry, backend=b, **settings) for b in BACKENDS}

    def image(self, path: str, backend: Backend) -> dict[str, Any]:
        return self.image_transforms[backend]({"image": path})

    def video(self, path: str) -> dict[str, Any]:
        return self.transform.video_transform({"video": path})

    def frames(self, video: str) -> list[int]:
        """Return the indices of the frames of a video that are taken."""
        measured = attempt(self.transform.video_transform.measure, {"video": video})
        # Of one that it refuses the other side is given the first
        return [0] if failed(measured) else measured["frame_indices"]


class Reference(_Side):
    """transformers' side."""

    # Why it has one image backend and no other processor; empty if it has all
    no_torchvision = import_torchvision()

    def _processor(self, part: str, suffix: str = "", **settings: Any) -> Any:
        """Read with the class that the family names, whatever the files say."""
        name = getattr(self.family.transform.processors, part).removesuffix("Fast")
        cls = getattr(transformers, name + suffix)
        return cls.from_pretrained(self.directory, **_LOCAL, **settings)

    @attempted
    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.directory, **_LOCAL)

    @cached_property
    def image_processors(self) -> dict[Backend, Any]:
        read = partial(self._processor, "images", **self._limits)
        return {backend: attempt(read, suffix) for backend, suffix in BACKENDS.items()}

    @attempted
    def processor(self) -> Any:
        processor = self._processor("processor")
        processor.image_processor = self._processor("images", **self._limits)
        videos = self._processor("videos")
        limits = self.family.transform.processors.limits_of_videos
        if not videos.cap_pixels_per_frame:  # states no limits of videos, perhaps
            videos = self._processor("videos", **{"cap_pixels_per_frame": False, **limits})
        processor.video_processor = videos
        return processor

    @property
    def knows_tools(self) -> bool:
        """Whether the processor's template writes tools, where the tokenizer's may have to."""
        return "tools" in (self.processor.chat_template or "")

    @property
    def keeps_pair_around_steps(self) -> bool:
        """Whether it leaves the template's pair of tokens around a video of steps with theirs."""
        has_pair = VIDEO in (self.processor.chat_template or "")
        if not (has_pair and self.family.transform.has_timed_steps):
            return False
        start = self.processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
        frames = np.zeros((2, 64, 64, 3), np.uint8)
        metadata = VideoMetadata(2, fps=1.0, frames_indices=[0, 1])
        media: dict[str, Any] = {"videos": [frames], "video_metadata": [metadata]}
        made = self.processor(text=[VIDEO], do_sample_frames=False, **media)
        return made["input_ids"][0].count(start) > 1

    @attempted
    def rope(self) -> Any:
        """Make a model without weights, which numbers positions."""
        if not (self.directory / "config.json").is_file():  # transformers says less well what it is
            raise FileNotFoundError(f"{self.directory} has no config.json")
        config = transformers.AutoConfig.from_pretrained(self.directory, **_LOCAL)
        with torch.device("meta"):
            return transformers.AutoModelForImageTextToText.from_config(config).model

    def model(self, dtype: torch.dtype) -> Any:
        if failed(self.rope):
            raise self.rope
        load = transformers.AutoModelForImageTextToText.from_pretrained
        return load(self.directory, dtype=dtype, **_LOCAL).eval()

    def image(self, path: str, backend: Backend) -> dict[str, Any]:
        return self.image_processors[backend](load_image(path), return_tensors="pt")

    def video(self, path: str, indices: Sequence[int]) -> dict[str, Any]:
        process, (frames, _) = self.processor.video_processor, _frames(path, indices)
        return process(frames, do_sample_frames=False, return_tensors="pt")

    def chat(
        self,
        conversation: Conversation,
        frames: Sequence[Sequence[int]],
        asks: bool,
    ) -> dict[str, torch.Tensor]:
        """Make the model's inputs; the template is the directory's, with tools the tokenizer's."""
        processor, messages, tools = self.processor, conversation.messages, conversation.tools
        is_processors = tools is None or self.knows_tools
        render = (processor if is_processors else processor.tokenizer).apply_chat_template
        text = render(messages, tools=tools or None, tokenize=False, add_generation_prompt=asks)
        if (
            self.family.transform.has_timed_steps
        ):  # which have pairs of their own, the only ones that the weights have seen
            text = text.replace(VIDEO, VIDEO_ALONE)
        images = [*map(load_image, conversation.values("image"))]
        videos = [*map(_frames, conversation.values("video"), frames)]
        media: dict[str, Any] = {"images": images or None, "do_sample_frames": False}
        if videos:
            media["videos"], media["video_metadata"] = map(list, zip(*videos, strict=True))
        return processor(text=[text], return_tensors="pt", **media)

    def positions(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number the positions of a conversation as the installed release does: int64 [s, 3]."""
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        given = {name: inputs[name] for name in names if name in inputs}
        positions, _ = self.rope.get_rope_index(inputs["input_ids"], **given)
        return positions[:, 0].T


def _frames(path: str, indices: Sequence[int]) -> tuple[np.ndarray, VideoMetadata]:
    """Decode a video from its start, and pick frames, upright: uint8 [T, H, W, 3]."""
    # transformers' own loader believes headers about their number, and leaves a video on its side
    chosen, picked, total = set(indices), [], 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        for total, frame in enumerate(container.decode(stream), start=1):
            if total - 1 in chosen:
                picked.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
    metadata = VideoMetadata(total, fps=float(rate or 0), frames_indices=list(indices))
    return np.stack(picked), metadata
