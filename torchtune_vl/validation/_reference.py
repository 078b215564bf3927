"""transformers' side of the comparison, from the files of one directory and nothing else."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch

from torchtune_vl.models._families import family_of_files
from torchtune_vl.validation._report import Outcome, attempt
from torchtune_vl.validation._torchvision import import_torchvision

Backend = Literal["torchvision", "pil"]
BACKENDS: tuple[Backend, ...] = ("torchvision", "pil")

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

# What qwen-vl-utils gives a video, and transformers' class by default: the published
# preprocessor_config.json states limits of images, which its video processor would take too
_VIDEO_LIMITS: dict[str, Any] = {
    "cap_pixels_per_frame": True,
    "min_pixels": 128 * 28 * 28,
    "max_pixels": 768 * 28 * 28,
}


class Processed(NamedTuple):
    """An image or video as the encoder takes it: float [n, 1176] and int64 [1, 3]."""

    patches: torch.Tensor
    grid_thw: torch.Tensor


class Reference:
    """Reads a directory with transformers, each part on its own, so that one may fail.

    Args:
        directory: a checkpoint's directory.
        max_pixels: largest area of images, in place of the directory's.

    Attributes:
        directory: as given.
        no_torchvision: why torchvision cannot be used; empty if it can. Without it transformers
            has one image backend, no video processor and so no processor of conversations.
    """

    def __init__(self, directory: Path, max_pixels: int | None = None) -> None:
        self.directory = directory
        self.no_torchvision = import_torchvision()
        self._limits = {} if max_pixels is None else {"max_pixels": max_pixels}

    @cached_property
    def tokenizer(self) -> Outcome:
        """Outcome of reading the tokenizer."""
        from transformers import AutoTokenizer

        return attempt(AutoTokenizer.from_pretrained, self.directory, **_LOCAL)

    @cached_property
    def image_processors(self) -> dict[Backend, Outcome]:
        """Outcomes of reading the image processor of each backend that there is."""
        suffixes: dict[Backend, str] = {"pil": "Pil"}
        if not self.no_torchvision:
            suffixes["torchvision"] = ""
        return {
            backend: attempt(self._read_image_processor, suffix)
            for backend, suffix in suffixes.items()
        }

    def _read_image_processor(self, suffix: str) -> Any:
        processor = self._class_of("images", suffix)
        return processor.from_pretrained(self.directory, **_LOCAL, **self._limits)

    def _class_of(self, part: str, suffix: str = "") -> Any:
        """Transformers' class of a part of the processor of the directory's family."""
        import transformers

        names = family_of_files(self.directory).transform.processors
        return getattr(transformers, f"{getattr(names, part)}{suffix}")

    @cached_property
    def video_processor(self) -> Outcome:
        """Outcome of reading the video processor."""
        return attempt(self._read_video_processor)

    def _read_video_processor(self) -> Any:
        processor_class = self._class_of("videos")
        processor = processor_class.from_pretrained(self.directory, **_LOCAL)
        if processor.cap_pixels_per_frame:  # states limits of videos
            return processor
        return processor_class.from_pretrained(self.directory, **_VIDEO_LIMITS, **_LOCAL)

    @cached_property
    def processor(self) -> Outcome:
        """Outcome of reading the whole processor."""
        return attempt(self._read_processor)

    def _read_processor(self) -> Any:
        processor = self._class_of("processor").from_pretrained(self.directory, **_LOCAL)
        for part, outcome in (
            ("image_processor", self.image_processors["torchvision"]),
            ("video_processor", self.video_processor),
        ):
            if outcome.error:
                raise outcome.error
            setattr(processor, part, outcome.value)
        return processor

    @cached_property
    def rope(self) -> Outcome:
        """Outcome of making a model without weights, which numbers positions."""
        return attempt(self._without_weights)

    def _without_weights(self) -> Any:
        from transformers import AutoConfig, AutoModelForImageTextToText

        # Without one transformers silently takes the dimensions of a model of 72B
        if not (self.directory / "config.json").is_file():
            raise FileNotFoundError(f"{self.directory} has no config.json")
        config = AutoConfig.from_pretrained(self.directory, **_LOCAL)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config).model

    # Tokenizer

    def tokens(self) -> list[bytes]:
        """Return the bytes of each token without the added ones, in the order of ids."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
        vocab = self.tokenizer.value.backend_tokenizer.get_vocab(with_added_tokens=False)
        in_order = sorted(vocab, key=vocab.__getitem__)
        return [bytes(to_byte[character] for character in token) for token in in_order]

    def merges(self) -> list[str]:
        """Return the merges in the lines of a ``merges.txt``."""
        backend = json.loads(self.tokenizer.value.backend_tokenizer.to_str())
        return [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]

    def added_tokens(self) -> dict[str, Any]:
        """Return id and kind of each added token, and the tokens that end and pad."""
        tokenizer = self.tokenizer.value
        added = tokenizer.added_tokens_decoder
        return {
            **{token.content: (token_id, token.special) for token_id, token in added.items()},
            "end": tokenizer.eos_token,
            "padding": tokenizer.pad_token,
        }

    def text_ids(self, text: str) -> list[int]:
        """Encode a text."""
        return self.tokenizer.value(text).input_ids

    # Media

    def image(self, path: str, backend: Backend) -> Processed:
        """Load and process an image."""
        inputs = self.image_processors[backend].value(self.load(path), return_tensors="pt")
        return Processed(inputs["pixel_values"], inputs["image_grid_thw"])

    def load(self, source: str) -> Any:
        """Load an image as transformers does."""
        from transformers.image_utils import load_image

        return load_image(source)

    def frames(self, path: str, indices: Sequence[int]) -> tuple[np.ndarray, Any]:
        """Decode a video from its start, and pick frames, as their numbers say, upright.

        transformers' own loader believes headers about the number of frames, and leaves a video
        that was filmed upright on its side.

        Args:
            path: the file.
            indices: numbers of frames.

        Returns:
            uint8 [T, H, W, 3], and transformers' facts about the video.
        """
        from transformers.video_utils import VideoMetadata

        chosen, picked, total = set(indices), [], 0
        with av.open(path) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            for total, frame in enumerate(container.decode(stream), start=1):
                if total - 1 in chosen:
                    pixels = frame.to_ndarray(format="rgb24")
                    picked.append(np.rot90(pixels, frame.rotation // 90))
        metadata = VideoMetadata(total, fps=float(rate or 0), frames_indices=list(indices))
        return np.stack(picked), metadata

    def video(self, path: str, indices: Sequence[int]) -> Processed:
        """Decode and process frames of a video."""
        frames, _ = self.frames(path, indices)
        inputs = self.video_processor.value(frames, do_sample_frames=False, return_tensors="pt")
        return Processed(inputs["pixel_values_videos"], inputs["video_grid_thw"])

    # Conversations

    def chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        frame_indices: Sequence[Sequence[int]],
        add_generation_prompt: bool,
    ) -> dict[str, torch.Tensor]:
        """Process a conversation with the directory's chat template.

        Args:
            messages: in transformers' chat format.
            tools: JSON schemas; with them the template is that of the tokenizer.
            frame_indices: frames of each video.
            add_generation_prompt: whether to end with the prompt for an answer.

        Returns:
            The model's inputs.
        """
        processor = self.processor.value
        template = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        if tools is None:
            text = processor.apply_chat_template(messages, **template)
        else:
            text = processor.tokenizer.apply_chat_template(
                messages, tools=tools or None, **template
            )
        videos = [
            self.frames(path, indices)
            for path, indices in zip(media_of(messages, "video"), frame_indices, strict=True)
        ]
        arguments: dict[str, Any] = {}
        if videos:
            arguments = {
                "videos": [frames for frames, _ in videos],
                "video_metadata": [metadata for _, metadata in videos],
                "do_sample_frames": False,
            }
        images = [self.load(path) for path in media_of(messages, "image")]
        return processor(text=[text], images=images or None, return_tensors="pt", **arguments)

    def positions(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number the positions of a conversation as the installed release does: int64 [s, 3]."""
        positions, _ = self.rope.value.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            second_per_grid_ts=inputs.get("second_per_grid_ts"),
        )
        return positions[:, 0].T

    # Model

    def model(self, dtype: torch.dtype) -> Any:
        """Load the model."""
        if self.rope.error:
            raise self.rope.error
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(
            self.directory, dtype=dtype, **_LOCAL
        ).eval()


def continue_behind_media(positions: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Let what follows a medium begin behind its largest position, as the weights have learned it.

    transformers >= 5.3 lets it begin at half the larger side of the medium's grid. Before a video
    has ended that is among its own temporal positions, and not where its ``generate`` goes on.

    Args:
        positions: as transformers numbers them, int64 [s, 3].
        kinds: of each token, 0 for text, int64 [s].

    Returns:
        The positions, moved by what is missing behind each medium.
    """
    moved = positions.clone()
    behind_media = ((kinds[1:] == 0) & (kinds[:-1] != 0)).nonzero().flatten() + 1
    for start in behind_media.tolist():
        moved[start:] += moved[:start].max() + 1 - moved[start, 0]
    return moved


def media_of(messages: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """Return the images or videos of a conversation, in order."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [item[kind] for content in contents for item in content if item["type"] == kind]
