"""transformers' side of the comparison, from the files of one directory and nothing else."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch

from torchtune_vl.chat import ProcessorClasses
from torchtune_vl.models._families import families, family_of
from torchtune_vl.models._family import Family
from torchtune_vl.validation._inputs import Conversation
from torchtune_vl.validation._report import Outcome, attempt
from torchtune_vl.validation._torchvision import import_torchvision

Backend = Literal["torchvision", "pil"]
BACKENDS: dict[Backend, str] = {"torchvision": "torchvision", "pil": "PIL"}

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


def family_in(directory: Path) -> Family:
    """Find the family of a directory; of one without a config, the first that there is."""
    return family_of(directory) if (directory / "config.json").is_file() else families()[0]


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

    def _read(self, part: str, suffix: str = "", **settings: Any) -> Any:
        """Read a processor with the class that the family names, whatever the files say."""
        import transformers

        classes: ProcessorClasses = family_in(self.directory).transform.processors
        cls = getattr(transformers, getattr(classes, part) + suffix)
        return cls.from_pretrained(self.directory, **_LOCAL, **settings)

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
        return {b: attempt(self._read, "images", s, **self._limits) for b, s in suffixes.items()}

    @cached_property
    def video_processor(self) -> Outcome:
        """Outcome of reading the video processor."""

        def read() -> Any:
            processor = self._read("videos")
            states_limits = processor.cap_pixels_per_frame
            return processor if states_limits else self._read("videos", **_VIDEO_LIMITS)

        return attempt(read)

    @cached_property
    def processor(self) -> Outcome:
        """Outcome of reading the whole processor."""

        def read() -> Any:
            processor = self._read("processor")
            processor.image_processor = self.image_processors["torchvision"].unwrap()
            processor.video_processor = self.video_processor.unwrap()
            return processor

        return attempt(read)

    @cached_property
    def rope(self) -> Outcome:
        """Outcome of making a model without weights, which numbers positions."""

        def make() -> Any:
            from transformers import AutoConfig, AutoModelForImageTextToText

            # transformers says less well what is wrong with a directory without one
            if not (self.directory / "config.json").is_file():
                raise FileNotFoundError(f"{self.directory} has no config.json")
            config = AutoConfig.from_pretrained(self.directory, **_LOCAL)
            with torch.device("meta"):
                return AutoModelForImageTextToText.from_config(config).model

        return attempt(make)

    def model(self, dtype: torch.dtype) -> Any:
        """Load the model."""
        self.rope.unwrap()
        from transformers import AutoModelForImageTextToText

        load = AutoModelForImageTextToText.from_pretrained
        return load(self.directory, dtype=dtype, **_LOCAL).eval()

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
        return {
            **{t.content: (i, t.special) for i, t in tokenizer.added_tokens_decoder.items()},
            "end": tokenizer.eos_token,
            "padding": tokenizer.pad_token,
        }

    # Media

    def image(self, path: str, backend: Backend) -> Processed:
        """Load and process an image."""
        from transformers.image_utils import load_image

        inputs = self.image_processors[backend].value(load_image(path), return_tensors="pt")
        return Processed(inputs["pixel_values"], inputs["image_grid_thw"])

    def video(self, path: str, indices: Sequence[int]) -> Processed:
        """Decode and process frames of a video."""
        frames, _ = _frames(path, indices)
        inputs = self.video_processor.value(frames, do_sample_frames=False, return_tensors="pt")
        return Processed(inputs["pixel_values_videos"], inputs["video_grid_thw"])

    # Conversations

    def chat(
        self,
        conversation: Conversation,
        frame_indices: Sequence[Sequence[int]],
        add_generation_prompt: bool,
    ) -> dict[str, torch.Tensor]:
        """Process a conversation with the directory's chat template.

        Args:
            conversation: with tools the template is that of the tokenizer.
            frame_indices: frames of each video.
            add_generation_prompt: whether to end with the prompt for an answer.

        Returns:
            The model's inputs.
        """
        from transformers.image_utils import load_image

        processor, tools = self.processor.value, conversation.tools
        template = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        if tools is None:
            text = processor.apply_chat_template(conversation.messages, **template)
        else:
            text = processor.tokenizer.apply_chat_template(
                conversation.messages, tools=tools or None, **template
            )
        media: dict[str, Any] = {}
        if conversation.sources("video"):
            videos = map(_frames, conversation.sources("video"), frame_indices)
            media["videos"], media["video_metadata"] = map(list, zip(*videos, strict=True))
            media["do_sample_frames"] = False
        images = [load_image(path) for path in conversation.sources("image")]
        return processor(text=[text], images=images or None, return_tensors="pt", **media)

    def positions(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number the positions of a conversation as the installed release does: int64 [s, 3]."""
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        given = {name: inputs[name] for name in names if name in inputs}
        positions, _ = self.rope.value.get_rope_index(inputs["input_ids"], **given)
        return positions[:, 0].T


def _frames(path: str, indices: Sequence[int]) -> tuple[np.ndarray, Any]:
    """Decode a video from its start, and pick frames, as their numbers say, upright.

    transformers' own loader believes headers about the number of frames, and leaves a video that
    was filmed upright on its side.

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
