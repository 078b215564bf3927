"""Messages to one sample: token ids, loss mask, positions and the encoder's input."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torchtune.data import Message
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from torchtune_vl.models.qwen2_5_vl._chat_template import CHAT_TEMPLATE
from torchtune_vl.models.qwen2_5_vl._image_transform import Qwen2_5_VLImageTransform
from torchtune_vl.models.qwen2_5_vl._patches import PATCH_SIZE, TEMPORAL_PATCH_SIZE
from torchtune_vl.models.qwen2_5_vl._positions import MERGE_SIZE, mrope_positions, vision_index
from torchtune_vl.models.qwen2_5_vl._tokenizer import Qwen2_5_VLTokenizer

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
NO_MEDIA = torch.empty(0, 3, dtype=torch.int64)


class _EncodedImage(NamedTuple):
    patches: torch.Tensor
    grid_thw: torch.Tensor
    num_tokens: int


class Qwen2_5_VLTransform(ModelTokenizer, Transform):
    """Turns a conversation with images into what the model is trained on or generates from.

    The ids are those of transformers' ``Qwen2_5_VLProcessor.apply_chat_template`` with the
    published template, pixels and grids those of its image processor, positions those of
    ``Qwen2_5_VLModel.get_rope_index``.

    Args:
        path: ``vocab.json``, ``tokenizer.json`` or a ``.tiktoken`` rank file.
        merges_file: ``merges.txt``, with ``vocab.json`` only.
        max_seq_len: longest sample in tokens; text beyond it is cut off, an image never is.
        image_transform: settings of images, those of the published checkpoints by default.

    Raises:
        ValueError: if a file is not a Qwen2.5 vocabulary.
    """

    def __init__(
        self,
        path: str | Path,
        merges_file: str | Path | None = None,
        *,
        max_seq_len: int | None = None,
        image_transform: Qwen2_5_VLImageTransform | None = None,
    ) -> None:
        self.tokenizer = Qwen2_5_VLTokenizer(path, merges_file, max_seq_len=max_seq_len)
        self.image_transform = image_transform or Qwen2_5_VLImageTransform()
        self.special_tokens = self.tokenizer.special_tokens
        self.base_vocab_size = self.tokenizer.base_vocab_size
        self.vocab_size = self.tokenizer.vocab_size
        self.pad_id = self.tokenizer.pad_id
        self.stop_tokens = self.tokenizer.stop_tokens
        self.max_seq_len = max_seq_len

    @classmethod
    def from_pretrained(
        cls,
        checkpoint_dir: str | Path,
        *,
        max_seq_len: int | None = None,
        **image_settings: Any,
    ) -> "Qwen2_5_VLTransform":
        """Read vocabulary and image settings from a checkpoint directory.

        Args:
            checkpoint_dir: directory with ``tokenizer.json`` (or ``vocab.json`` and
                ``merges.txt``) and ``preprocessor_config.json``.
            max_seq_len: longest sample in tokens.
            **image_settings: arguments of :class:`Qwen2_5_VLImageTransform` that go before the
                directory's.

        Returns:
            The transform.

        Raises:
            ValueError: if a file is missing, or asks for what the transform does not do.
        """
        directory = Path(checkpoint_dir)
        _check_chat_template(directory)
        vocabulary = directory / "tokenizer.json"
        merges = None
        if not vocabulary.exists():
            vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
        settings = {**_image_settings(directory), **image_settings}
        return cls(
            vocabulary,
            merges,
            max_seq_len=max_seq_len,
            image_transform=Qwen2_5_VLImageTransform(**settings),
        )

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Encode text as :meth:`Qwen2_5_VLTokenizer.encode` does."""
        return self.tokenizer.encode(text, add_bos=add_bos, add_eos=add_eos)

    def decode(
        self, token_ids: Sequence[int] | torch.Tensor, skip_special_tokens: bool = False
    ) -> str:
        """Decode ids as :meth:`Qwen2_5_VLTokenizer.decode` does."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def tokenize_messages(
        self, messages: list[Message], **kwargs: Any
    ) -> tuple[list[int], list[bool]]:
        """Tokenize a conversation, placeholders expanded.

        Args:
            messages: the conversation; it is not cut at ``max_seq_len``.
            **kwargs: ignored; torchtune's recipes pass settings of other tokenizers.

        Returns:
            Ids and, for each, whether the loss ignores it.

        Raises:
            ValueError: if a message cannot be read; it says which and why.
        """
        tokens, mask, _ = self._render(messages)
        return tokens, mask

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Transform one sample.

        Args:
            sample: ``messages``, a list of torchtune's :class:`~torchtune.data.Message` whose
                content items are ``{"type": "text", "content": str}`` and ``{"type": "image",
                "content": image}``, the image being whatever
                :class:`Qwen2_5_VLImageTransform` takes. Where items of type ``image`` have no
                content, the images of ``images`` are put there in order. An ``id``, if there is
                one, names the sample in errors.
            inference: whether to end with the prompt for an answer. An empty assistant message
                at the end, which torchtune's inference recipes add, becomes that prompt.

        Returns:
            ``tokens``, list[int] of length s; ``mask``, list[bool] of length s, True where the
            loss ignores the token: everywhere but in the text of assistant messages and their
            ``<|im_end|>``, and there too if the message is ``masked``; ``input_pos``, M-RoPE
            positions, int64 [s, 3]; and if there are images ``encoder_input``, whose ``vision``
            has ``patches``, float32 [n, 1176] or uint8 [n, 588], ``grid_thw``, int64 [k, 3], and
            the index of :func:`vision_index`.

        Raises:
            ValueError: if a message or image cannot be read, images and their places do not
                match, or the sample is too long; it says which and why.
        """
        try:
            return self._transform(sample, inference)
        except ValueError as error:
            if "id" not in sample:
                raise
            raise ValueError(f"sample {sample['id']!r}: {error}") from error

    def _transform(self, sample: Mapping[str, Any], inference: bool) -> dict[str, Any]:
        messages = _with_images(sample["messages"], sample.get("images"))
        if inference and messages and _asks_for_answer(messages[-1]):
            messages = messages[:-1]
        tokens, mask, images = self._render(messages)
        if inference:
            prompt = self._header("assistant")
            tokens += prompt
            mask += [True] * len(prompt)
        tokens, mask = self._fit(tokens, mask, may_cut=not inference)

        grid_thw = torch.cat([NO_MEDIA, *[image.grid_thw for image in images]])
        transformed: dict[str, Any] = {
            "tokens": tokens,
            "mask": mask,
            "input_pos": mrope_positions(tokens, grid_thw),
        }
        if images:
            transformed["encoder_input"] = {
                "vision": {
                    "patches": torch.cat([image.patches for image in images]),
                    "grid_thw": grid_thw,
                    **vision_index(grid_thw),
                }
            }
        return transformed

    def _render(
        self, messages: Sequence[Message]
    ) -> tuple[list[int], list[bool], list[_EncodedImage]]:
        """Apply the published chat template: ids, mask and the images in their order."""
        if not messages:
            raise ValueError("a conversation needs at least one message")
        tokens: list[int] = []
        mask: list[bool] = []
        images: list[_EncodedImage] = []
        numbered = list(enumerate(messages))
        if messages[0].role != "system":
            numbered.insert(0, (-1, Message(role="system", content=DEFAULT_SYSTEM_PROMPT)))
        for number, message in numbered:
            try:
                parts = self._parts(message)
                message_tokens, message_mask = self._tokenize_parts(message, parts)
            except ValueError as error:
                raise ValueError(f"message {number} ({message.role}): {error}") from error
            tokens += message_tokens
            mask += message_mask
            images += [part for part in parts if isinstance(part, _EncodedImage)]
        return tokens, mask, images

    def _parts(self, message: Message) -> list[str | _EncodedImage]:
        """The images of a message and, each in one piece, the texts before, between and after.

        BPE merges across the seams of text items, and of the line break after the role.
        """
        parts: list[str | _EncodedImage] = [f"{message.role}\n"]
        for number, item in enumerate(message.content):
            if not isinstance(item, Mapping):
                raise ValueError(f"item {number} is of type {type(item).__name__}, expected a dict")
            kind, content = item.get("type"), item.get("content")
            if kind == "text" and isinstance(content, str):
                if isinstance(parts[-1], str):
                    parts[-1] += content
                else:
                    parts.append(content)
            elif kind == "image":
                try:
                    parts.append(self._encode_image(content))
                except ValueError as error:
                    raise ValueError(f"item {number}: {error}") from error
            else:
                raise ValueError(
                    f"item {number}: content of type {kind!r} with a value of type "
                    f"{type(content).__name__}; known are 'text' with a str, and 'image'"
                )
        return parts

    def _encode_image(self, content: Any) -> _EncodedImage:
        transformed = self.image_transform({"image": content})
        return _EncodedImage(
            patches=transformed["pixel_values"],
            grid_thw=transformed["image_grid_thw"],
            num_tokens=transformed["num_image_tokens"],
        )

    def _tokenize_parts(
        self, message: Message, parts: Sequence[str | _EncodedImage]
    ) -> tuple[list[int], list[bool]]:
        masked = message.masked or message.role != "assistant"
        tokens, mask = [self.tokenizer.im_start_id], [True]
        for part in parts:
            if isinstance(part, str):
                ids = self._encode_text(part)
                part_mask = [masked] * len(ids)
            else:
                ids = self._image_tokens(part.num_tokens)
                part_mask = [True] * len(ids)
            tokens += ids
            mask += part_mask
        header_length = _common_prefix_length(tokens, self._header(message.role))
        mask[:header_length] = [True] * header_length
        line_break = self.encode("\n", add_eos=False)
        tokens += [self.tokenizer.im_end_id, *line_break]
        mask += [masked] + [True] * len(line_break)
        return tokens, mask

    def _encode_text(self, text: str) -> list[int]:
        ids = self.encode(text, add_eos=False)
        if self.tokenizer.image_pad_id in ids or self.tokenizer.video_pad_id in ids:
            raise ValueError(
                "its text has a placeholder <|image_pad|> or <|video_pad|> without an image or "
                "video: give media as items of the message's content"
            )
        return ids

    def _image_tokens(self, count: int) -> list[int]:
        t = self.tokenizer
        return [t.vision_start_id, *[t.image_pad_id] * count, t.vision_end_id]

    def _header(self, role: str) -> list[int]:
        return [self.tokenizer.im_start_id, *self.encode(f"{role}\n", add_eos=False)]

    def _fit(
        self, tokens: list[int], mask: list[bool], may_cut: bool
    ) -> tuple[list[int], list[bool]]:
        """Cut text from the right to ``max_seq_len``."""
        limit = self.max_seq_len
        if limit is None or len(tokens) <= limit:
            return tokens, mask
        remedy = f"raise max_seq_len (now {limit}) or shorten the sample"
        if not may_cut:
            raise ValueError(f"the prompt has {len(tokens)} tokens: {remedy}")
        if self.tokenizer.vision_end_id in tokens[limit:]:
            raise ValueError(
                f"the sample has {len(tokens)} tokens and an image would be cut: {remedy}, or "
                "lower max_pixels"
            )
        return tokens[:limit], mask[:limit]


def _asks_for_answer(message: Message) -> bool:
    return message.role == "assistant" and all(
        item == {"type": "text", "content": ""} for item in message.content
    )


def _common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _with_images(messages: Sequence[Message], images: Sequence[Any] | None) -> list[Message]:
    """Put the images of a sample into the places that its messages have for them."""
    if images is None:
        return list(messages)
    places = sum(_is_place(item) for message in messages for item in message.content)
    if places != len(images):
        raise ValueError(
            f"the messages have {places} places for images, but there are {len(images)} images"
        )
    remaining = iter(images)
    return [
        Message(
            role=message.role,
            content=[
                {**item, "content": next(remaining)} if _is_place(item) else item
                for item in message.content
            ],
            masked=message.masked,
            ipython=message.ipython,
            eot=message.eot,
        )
        for message in messages
    ]


def _is_place(item: Mapping[str, Any]) -> bool:
    return isinstance(item, Mapping) and item.get("type") == "image" and item.get("content") is None


def qwen2_5_vl_transform(
    path: str | Path,
    merges_file: str | Path | None = None,
    *,
    max_seq_len: int | None = None,
    min_pixels: int = 3136,
    max_pixels: int = 12845056,
    image_backend: Literal["torchvision", "pil"] = "torchvision",
    patch_dtype: Literal["float32", "uint8"] = "float32",
) -> Qwen2_5_VLTransform:
    """Build the transform from values that a YAML config can hold.

    Args:
        path: ``vocab.json``, ``tokenizer.json`` or a ``.tiktoken`` rank file.
        merges_file: ``merges.txt``, with ``vocab.json`` only.
        max_seq_len: longest sample in tokens; text beyond it is cut off, an image never is.
        min_pixels: images with fewer pixels are enlarged.
        max_pixels: images with more pixels are reduced.
        image_backend: ``"torchvision"`` or ``"pil"``, the image processor of transformers that
            pixels are equal to.
        patch_dtype: ``"float32"``, or ``"uint8"`` for patches of an eighth of the bytes, which
            the model normalizes on its device.

    Returns:
        The transform.

    Raises:
        ValueError: if a file is not a Qwen2.5 vocabulary, or a setting makes no sense.
    """
    return Qwen2_5_VLTransform(
        path,
        merges_file,
        max_seq_len=max_seq_len,
        image_transform=Qwen2_5_VLImageTransform(
            backend=image_backend,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            patch_dtype=patch_dtype,
        ),
    )


_IMAGE_SETTINGS = (
    "min_pixels",
    "max_pixels",
    "image_mean",
    "image_std",
)
# What our image transform always does; the values that a file may state
_FIXED_IMAGE_SETTINGS = {
    "patch_size": PATCH_SIZE,
    "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "merge_size": MERGE_SIZE,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,
}


def _image_settings(directory: Path) -> dict[str, Any]:
    """Settings of images from the files of a checkpoint directory.

    transformers 5 writes them into ``processor_config.json``, and sizes as ``size``.
    """
    path = directory / "preprocessor_config.json"
    config = _read_json(path)
    if config is None:
        path = directory / "processor_config.json"
        config = (_read_json(path) or {}).get("image_processor")
    if config is None:
        raise ValueError(
            f"{directory} has no preprocessor_config.json, which holds the limits of image sizes: "
            "copy it from the published checkpoint"
        )
    for name, value in _FIXED_IMAGE_SETTINGS.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {config[name]!r}, only {value!r} is supported")
    size = config.get("size") or {}
    config = {
        "min_pixels": size.get("shortest_edge"),
        "max_pixels": size.get("longest_edge"),
        **config,
    }
    return {name: config[name] for name in _IMAGE_SETTINGS if config.get(name) is not None}


def _check_chat_template(directory: Path) -> None:
    """Refuse a template that would give other ids than the one this transform writes."""
    jinja = directory / "chat_template.jinja"
    if jinja.exists():
        path, template = jinja, jinja.read_text(encoding="utf-8")
    else:
        path = directory / "chat_template.json"
        template = (_read_json(path) or {}).get("chat_template", CHAT_TEMPLATE)
    if template.strip() != CHAT_TEMPLATE:
        raise ValueError(
            f"{path} is not the published chat template of Qwen2.5-VL, and no other is supported"
        )


def _read_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
