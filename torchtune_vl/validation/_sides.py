"""Both sides of the comparison, from the files of one directory each and nothing else."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch

from torchtune_vl.chat import QwenTokenizer
from torchtune_vl.media import Geometry, ImageTransform
from torchtune_vl.models._registry import Family, families, family_of
from torchtune_vl.validation._inputs import Conversation
from torchtune_vl.validation._report import Outcome, attempt, attempted
from torchtune_vl.validation._torchvision import import_torchvision

import_torchvision()  # before transformers, which looks for it at import

import transformers  # noqa: E402
from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: E402
from transformers.image_utils import load_image  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

Backend = Literal["torchvision", "pil"]
BACKENDS: dict[Backend, str] = {"torchvision": "torchvision", "pil": "PIL"}

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# What qwen-vl-utils gives a video, and transformers' class by default: the published
# preprocessor_config.json states limits of images, which its video processor would take too
_FRAME_LIMITS: dict[str, Any] = {"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28}


class Processed(NamedTuple):
    """An image or video as the encoder takes it: float [n, 1176] and int64 [1, 3]."""

    patches: torch.Tensor
    grid_thw: torch.Tensor


def family_in(directory: Path) -> Family:
    """Find the family of a directory; of one without a config, the first that there is."""
    return family_of(directory) if (directory / "config.json").is_file() else families()[0]


class _Side:
    """Reads a directory, each part on its own, so that one may fail; its limit may be replaced."""

    def __init__(self, directory: Path, max_pixels: int | None = None) -> None:
        self.directory = directory
        self._limits = {} if max_pixels is None else {"max_pixels": max_pixels}


class Reference(_Side):
    """transformers' side."""

    @property
    def no_torchvision(self) -> str:
        """Why transformers has one image backend and no other processor; empty if it has all."""
        return import_torchvision()

    def _processor(self, part: str, suffix: str = "", **settings: Any) -> Any:
        """Read with the class that the family names, whatever the files say."""
        name = getattr(family_in(self.directory).transform.processors, part)
        cls = getattr(transformers, name + suffix)
        return cls.from_pretrained(self.directory, **_LOCAL, **settings)

    @attempted
    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.directory, **_LOCAL)

    @cached_property
    def image_processors(self) -> dict[Backend, Outcome]:
        """Outcomes of reading the image processor of each backend that there is."""
        pil = attempt(self._processor, "images", "Pil", **self._limits)
        if self.no_torchvision:
            return {"pil": pil}
        return {"pil": pil, "torchvision": attempt(self._processor, "images", **self._limits)}

    @attempted
    def video_processor(self) -> Any:
        processor = self._processor("videos")
        if processor.cap_pixels_per_frame:  # states limits of videos
            return processor
        return self._processor("videos", cap_pixels_per_frame=True, **_FRAME_LIMITS)

    @attempted
    def processor(self) -> Any:
        processor = self._processor("processor")
        processor.image_processor = self.image_processors["torchvision"].unwrap()
        processor.video_processor = self.video_processor.unwrap()
        return processor

    @attempted
    def rope(self) -> Any:
        """Make a model without weights, which numbers positions."""
        # transformers says less well what is wrong
        if not (self.directory / "config.json").is_file():
            raise FileNotFoundError(f"{self.directory} has no config.json")
        config = transformers.AutoConfig.from_pretrained(self.directory, **_LOCAL)
        with torch.device("meta"):
            return transformers.AutoModelForImageTextToText.from_config(config).model

    def model(self, dtype: torch.dtype) -> Any:
        self.rope.unwrap()
        load = transformers.AutoModelForImageTextToText.from_pretrained
        return load(self.directory, dtype=dtype, **_LOCAL).eval()

    def tokens(self) -> list[bytes]:
        """Return the bytes of each token without the added ones, in the order of ids."""
        to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
        vocab = self.tokenizer.value.backend_tokenizer.get_vocab(with_added_tokens=False)
        return [bytes(map(to_byte.__getitem__, t)) for t in sorted(vocab, key=vocab.__getitem__)]

    def merges(self) -> list[str]:
        """Return the merges in the lines of a ``merges.txt``."""
        backend = json.loads(self.tokenizer.value.backend_tokenizer.to_str())
        return [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]

    def image(self, path: str, backend: Backend) -> Processed:
        inputs = self.image_processors[backend].value(load_image(path), return_tensors="pt")
        return Processed(inputs["pixel_values"], inputs["image_grid_thw"])

    def video(self, path: str, indices: Sequence[int]) -> Processed:
        frames, _ = _frames(path, indices)
        inputs = self.video_processor.value(frames, do_sample_frames=False, return_tensors="pt")
        return Processed(inputs["pixel_values_videos"], inputs["video_grid_thw"])

    def chat(
        self, conversation: Conversation, frames: Sequence[Sequence[int]], asks: bool
    ) -> dict[str, torch.Tensor]:
        """Make the model's inputs; the template is the directory's, with tools the tokenizer's."""
        processor, messages, tools = self.processor.value, conversation.messages, conversation.tools
        render = (processor if tools is None else processor.tokenizer).apply_chat_template
        given = {"tools": tools} if tools else {}
        text = render(messages, tokenize=False, add_generation_prompt=asks, **given)
        media: dict[str, Any] = {"images": [*map(load_image, conversation.values("image"))] or None}
        videos = [*map(_frames, conversation.values("video"), frames)]
        if videos:
            media["videos"], media["video_metadata"] = map(list, zip(*videos, strict=True))
            media["do_sample_frames"] = False
        return processor(text=[text], return_tensors="pt", **media)

    def positions(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number the positions of a conversation as the installed release does: int64 [s, 3]."""
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        given = {name: inputs[name] for name in names if name in inputs}
        positions, _ = self.rope.value.get_rope_index(inputs["input_ids"], **given)
        return positions[:, 0].T


class Ours(_Side):
    """Our side."""

    @property
    def geometry(self) -> Geometry:
        return family_in(self.directory).geometry

    @attempted
    def tokenizer(self) -> QwenTokenizer:
        """Read the files that :meth:`ChatTransform.from_pretrained` reads."""
        has_one = (self.directory / "tokenizer.json").exists()
        names = ["tokenizer.json"] if has_one else ["vocab.json", "merges.txt"]
        return QwenTokenizer(*(self.directory / name for name in names))

    @attempted
    def settings(self) -> dict[str, Any]:
        return family_in(self.directory).transform.settings_of(self.directory) | self._limits

    @attempted
    def transform(self) -> Any:
        """Read it all; special tokens in texts are tokens, as in transformers."""
        read = family_in(self.directory).transform.from_pretrained
        return read(self.directory, parse_special="all", **self._limits)

    @cached_property
    def image_transforms(self) -> dict[Backend, ImageTransform]:
        names = ("min_pixels", "max_pixels", "image_mean", "image_std")
        settings = {k: v for k, v in self.settings.value.items() if k in names}
        return {b: ImageTransform(self.geometry, backend=b, **settings) for b in BACKENDS}

    def image(self, path: str, backend: Backend) -> Processed:
        processed = self.image_transforms[backend]({"image": path})
        return Processed(processed["pixel_values"], processed["image_grid_thw"])

    def video(self, path: str) -> Processed:
        processed = self.transform.value.video_transform({"video": path})
        return Processed(processed["pixel_values_videos"], processed["video_grid_thw"])

    def timing(self, path: str) -> tuple[list[int], float]:
        """Return the frames of a video that our side takes, and the seconds between its steps."""
        measured = attempt(self.transform.value.video_transform.measure, {"video": path}).value
        # Of one that it refuses the other side is given the first frame
        return (measured["frame_indices"], measured["seconds_per_step"]) if measured else ([0], 1.0)


def obstacle(ours: Ours, reference: Reference) -> str:
    """Return why conversations and videos cannot be compared; empty if they can."""
    if not reference.no_torchvision and (ours.transform.error or reference.processor.error):
        return "unreadable: see vocabulary and image settings"
    return reference.no_torchvision


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


def continue_behind_media(positions: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Let what follows a medium begin behind its largest position, as the weights have learned it.

    transformers >= 5.3 lets it begin at half the larger side of the medium's grid. Before a video
    has ended that is among its own temporal positions, and not where its ``generate`` goes on.
    """
    moved = positions.clone()
    behind_media = ((kinds[1:] == 0) & (kinds[:-1] != 0)).nonzero().flatten() + 1
    for start in behind_media.tolist():
        moved[start:] += moved[:start].max() + 1 - moved[start, 0]
    return moved
