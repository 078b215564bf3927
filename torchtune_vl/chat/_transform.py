"""Messages to one sample: token ids, loss mask, positions and the encoder's input."""

import copy
import difflib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
import xxhash

from torchtune_vl.chat import _messages as chat
from torchtune_vl.chat import _processor_files as files
from torchtune_vl.chat import _prompt as prompting
from torchtune_vl.chat._boxes import (
    UNMOVED,
    boxes_in,
    coordinates_in,
    rescaled,
    to_json,
    to_original,
)
from torchtune_vl.chat._changes import draws
from torchtune_vl.chat._chat_template import CHAT_TEMPLATE, is_followed, without_marks
from torchtune_vl.chat._tokenizer import QwenTokenizer, check_surrogates
from torchtune_vl.files._json import JsonObject
from torchtune_vl.media import (
    Augmentation,
    Geometry,
    ImageTransform,
    RemoteLimits,
    VideoTransform,
)
from torchtune_vl.media._augment import Draw, farthest
from torchtune_vl.media._errors import check_choice, naming_sample
from torchtune_vl.media._images import Alpha, Backend
from torchtune_vl.media._said import Said
from torchtune_vl.media._transforms import FPS, MAX_FRAMES, MIN_FRAMES, PatchDtype
from torchtune_vl.modules.layout import concatenate_patches, mrope_positions, vision_index

Turns = Literal["all", "last"]
_NO_LOSS = (
    "no token of an answer carries loss: give it a message of the role assistant with a text or "
    "tool calls (and not of weight 0), or remove the sample"
)
_NO_MEDIA = torch.empty(0, 3, dtype=torch.int64)
AnyMessage = chat.Message | Mapping[str, Any]
_EncodedPart = str | chat.EncodedMedium | chat.Objects
# How each image of a conversation is to be changed
_Changes = Callable[[Sequence[chat.Turn[chat.Part]]], Iterable[Draw]]
_A = TypeVar("_A")
_B = TypeVar("_B")
_log = logging.getLogger(__name__)


class Examined(NamedTuple):
    """What is left of a sample within ``max_seq_len``.

    Args:
        size: how many tokens, patches, and tokens that carry loss it has, the first token aside,
            which nothing predicts.
        truncated: how many ``tokens``, ``images`` and ``videos`` were cut, None if nothing was.
        media: how many images and videos it has.
    """

    size: tuple[int, int, int]
    truncated: dict[str, int] | None
    media: int


class ChatTransform(QwenTokenizer):
    """Turns a conversation with images and videos into what a model trains on or answers.

    A ``ModelTokenizer`` and a ``Transform`` by torchtune's protocols. The ids are those of
    transformers' processors' ``apply_chat_template`` with the published template, and with tools
    those of its tokenizer's; pixels and grids are those of its image and video processors,
    positions those of its models up to release 4.51. A family is a subclass, which says what its
    own is: chat templates, how videos are sampled and sized and stand in the text, boxes.

    Args:
        path: ``vocab.json``, ``tokenizer.json`` or a ``.tiktoken`` rank file.
        merges_file: ``merges.txt``, with ``vocab.json`` only.
        max_seq_len: longest sample in tokens.
        truncation: what goes from a longer one: text and whole media at its "right" or "left" end,
            or the oldest whole "turns", each a user's message with what follows it, but never the
            system's. A prompt for generation is not cut.
        train_on: which answers carry loss, "all" or the "last" one.
        parse_special: "content": tokens that carry structure, such as ``<|im_start|>``, are plain
            text where they occur in a message; "all": they are tokens, as in transformers.
        add_vision_id: whether to number media in the text, "Picture 1: ", "Video 1: ".
        chat_template: Jinja source of another template; what it puts between ``{% generation %}``
            and ``{% endgeneration %}`` carries loss.
        chat_template_file: Jinja file, or ``chat_template.json``, that has it.
        min_pixels, max_pixels, image_backend, alpha, image_mean, image_std, patch_dtype: of
            :class:`~torchtune_vl.media.ImageTransform`, the last three of videos too.
        fps, min_frames, max_frames, video_min_pixels, video_max_pixels, video_total_pixels: of
            :class:`~torchtune_vl.media.VideoTransform`.
        allow_remote: whether https addresses of media are fetched.
        tokens_per_second: temporal positions per second of video; None: one for each step of its
            grid. The family's by default.

    ``ValueError`` if a file is not a vocabulary of Qwen's, or a setting makes no sense.
    """

    geometry: ClassVar[Geometry]
    processors: ClassVar[files.ProcessorClasses]
    default_tokens_per_second: ClassVar[int | None] = None
    has_timed_steps: ClassVar[bool] = False  # whether the text has the time of each of a video
    videos: ClassVar[type[VideoTransform]] = VideoTransform
    plain: ClassVar[Mapping[str | None, prompting.Plain]] = {}  # what code follows of templates

    def __init__(
        self,
        path: str | Path,
        merges_file: str | Path | None = None,
        *,
        max_seq_len: int | None = None,
        truncation: prompting.Truncation = "right",
        train_on: Turns = "all",
        parse_special: prompting.Special = "content",
        add_vision_id: bool = False,
        chat_template: str | None = None,
        chat_template_file: str | Path | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        image_backend: Backend = "torchvision",
        alpha: Alpha = "reference",
        fps: float = FPS,
        min_frames: int = MIN_FRAMES,
        max_frames: int = MAX_FRAMES,
        video_min_pixels: int | None = None,
        video_max_pixels: int | None = None,
        video_total_pixels: float | None = None,
        patch_dtype: PatchDtype = "float32",
        allow_remote: bool = False,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        tokens_per_second: int | None = None,
    ) -> None:
        check_choice("truncation", truncation, prompting.Truncation)
        check_choice("train_on", train_on, Turns)
        check_choice("parse_special", parse_special, prompting.Special)
        check_choice("add_vision_id", add_vision_id, Literal[True, False])
        check_choice("allow_remote", allow_remote, Literal[True, False])
        numbers = {"max_seq_len": max_seq_len, "tokens_per_second": tokens_per_second}
        for name, number in numbers.items():
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(f"{name} is {number!r}: make it an integer of at least 1")
        if chat_template is not None and chat_template_file is not None:
            raise ValueError("chat_template and chat_template_file are two templates: give one")
        if tokens_per_second is not None and self.has_timed_steps:
            problem = "tokens_per_second is of families whose positions follow the clock"
            raise ValueError(f"{problem}: leave it out")
        if chat_template_file is not None:
            chat_template, numbers_media = files.read_chat_template(chat_template_file)
            add_vision_id |= numbers_media
        chat_template = self.template_to_run(chat_template)
        super().__init__(path, merges_file, max_seq_len=max_seq_len)
        plain = self.plain.get(chat_template)
        self.prompts = prompting.PromptBuilder(
            self, parse_special, add_vision_id, chat_template, plain
        )
        remote = RemoteLimits() if allow_remote else None
        shared: dict[str, Any] = {"patch_dtype": patch_dtype, "remote": remote}
        shared |= {"image_mean": image_mean, "image_std": image_std}
        limits: dict[str, Any] = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self.image_transform = ImageTransform(
            self.geometry, backend=image_backend, alpha=alpha, **limits, **shared
        )
        self.video_transform = self.videos(
            geometry=self.geometry,
            fps=fps,
            min_frames=min_frames,
            max_frames=max_frames,
            min_pixels=video_min_pixels,
            max_pixels=video_max_pixels,
            total_pixels=video_total_pixels,
            **shared,
        )
        self.truncation = truncation
        self.train_on = train_on
        self.parse_special = parse_special
        self.tokens_per_second = tokens_per_second or self.default_tokens_per_second
        self._told = Said("media", "texts", "no reasoning")

    @classmethod
    def from_pretrained(cls, checkpoint_dir: str | Path, **settings: Any) -> "ChatTransform":
        """Read vocabulary, chat template and settings from the files of a checkpoint directory.

        ``settings`` are those of the class and go before the directory's; None counts as absent.
        ``ValueError`` if a file is missing, asks for what the transform does not do, or a setting
        is unknown.
        """
        directory = Path(checkpoint_dir)
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory: checkpoint_dir names a checkpoint's")
        known = inspect.getfullargspec(cls.__init__).kwonlyargs
        for name in settings.keys() - {*known}:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            found = f"the nearest is {near[0]!r}" if near else f"there are {', '.join(known)}"
            raise ValueError(f"the transform has no setting {name!r}: {found}")
        vocabulary, merges = directory / "tokenizer.json", None
        if not vocabulary.exists():
            vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
        given = {name: value for name, value in settings.items() if value is not None}
        stated = cls.settings_of(directory)
        if "chat_template" in given:
            stated.pop("chat_template_file", None)
        transform = cls(vocabulary, merges, **{**stated, **given})
        files.check_token_ids(vocabulary, transform)
        return transform

    @classmethod
    def settings_of(cls, directory: Path) -> dict[str, Any]:
        """Read the settings that a checkpoint directory has; ``ValueError`` as on construction."""
        return files.read_settings(directory, cls.geometry, cls.settings_of_videos)

    @classmethod
    def settings_of_videos(cls, videos: JsonObject, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """Read those of videos in ``video_preprocessor_config.json``, without ``fixed`` values."""
        return files.read_limits_of_frames(videos, fixed)

    def config_of_videos(self) -> dict[str, Any]:
        """Write down what :meth:`settings_of_videos` reads."""
        return files.limits_of_frames(self.video_transform)

    @classmethod
    def template_to_run(cls, chat_template: str | None) -> str | None:
        """Return the Jinja source that is run for a template, None if code follows it."""
        return None if chat_template is None or is_followed(chat_template) else chat_template

    @property
    def chat_template(self) -> str:
        """Jinja source of the chat template for conversations without tools."""
        template = self.prompts.chat_template or CHAT_TEMPLATE
        return files.NUMBERS_MEDIA * self.prompts.add_vision_id + without_marks(template)

    @property
    def has_published_template(self) -> bool:
        """Whether the chat template is one that the family was published with."""
        return self.prompts.chat_template is None

    def training_on(self, turns: Turns) -> "ChatTransform":
        """The same transform with another setting of ``train_on``."""
        check_choice("train_on", turns, Turns)
        other = copy.copy(self)
        other.train_on = turns
        vars(other).pop("fingerprint", None)
        return other

    @cached_property
    def fingerprint(self) -> str:
        """Tells the transform from those that may make samples of another size, or none."""
        kind, prompts = type(self), self.prompts
        settings = {
            "kind": (kind.__module__, kind.__qualname__, version("torchtune-vl")),
            "media": (self.image_transform, self.video_transform),  # dataclasses of plain values
            "prompts": (prompts.parse_special, prompts.add_vision_id, prompts.chat_template),
            "length": (self.max_seq_len, self.truncation, self.train_on),
            "special tokens": sorted(self.special_tokens.items()),
        }
        digest = xxhash.xxh3_128(repr(settings).encode("utf-8", "surrogatepass"))
        for token in self.token_bytes(range(self.base_vocab_size)):
            digest.update(len(token).to_bytes(2, "little") + token)
        return digest.hexdigest()

    def processor_files(self) -> dict[str, str]:
        """Write the settings down as transformers and servers read them, text by name of file.

        With these in a checkpoint's directory, transformers' ``AutoProcessor`` gives the same ids,
        grids and pixels of the same images and frames (with ``do_sample_frames`` as many frames of
        a file, chosen by another rule), and :meth:`from_pretrained` a transform of the same
        settings, but for ``max_seq_len``, ``truncation``, ``alpha`` and ``backend`` of images.
        """
        written = files.processor_files(
            self.image_transform, self.config_of_videos(), self.chat_template, self.processors
        )
        if self.prompts.chat_template is not None:
            # With tools too, for which the published one is not used
            written["chat_template.jinja"] = self.chat_template
        return written

    def tokenize_message(self, message: AnyMessage, **kwargs: Any) -> tuple[list[int], list[bool]]:
        """Tokenize one message as :meth:`tokenize_messages` does, without a system prompt."""
        (turn,) = self._encoded(chat.read_conversation([message]))
        prompt = self.prompts.of_message(turn)
        return prompt.tokens, prompt.mask

    def tokenize_messages(
        self, messages: Sequence[AnyMessage], **kwargs: Any
    ) -> tuple[list[int], list[bool]]:
        """Tokenize ``messages`` of :meth:`__call__` to ids and, for each, whether it has no loss.

        They are not cut. ``kwargs`` are ignored: recipes pass those of other tokenizers.
        """
        turns = self._encoded(chat.read_conversation(messages, roles=self.prompts.roles))
        prompt = self.prompts.build(turns, [], inference=False)
        return prompt.tokens, prompt.mask

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Transform one sample.

        Args:
            sample: ``messages``, of torchtune or dicts in the chat format of transformers:
                ``role``, one of the template's, ``content``, and perhaps ``tool_calls`` and
                ``weight``, ``loss`` or ``loss_mask`` (0: no loss). Content is a str or a list of
                items, torchtune's or:

                - ``{"type": "text", "text": str}``, with ``fields`` perhaps, a dict of boxes and
                  points whose coordinates replace ``{name}`` in the text;
                - ``{"type": "image", "image": source}`` or ``"video"``, with settings that the
                  media's transforms know; without a source, the next of ``images`` or ``videos``;
                - ``{"type": "boxes", "boxes": [{"bbox_2d": [x1, y1, x2, y2], "label": str}, ...]}``
                  of the last image before it, or of ``image``, its number from 0; in ``unit``
                  ``"pixels"`` (default), ``"0..1"`` or ``"0..1000"`` of the upright original.

                ``tools``, a list of JSON schemas, is optional, and an ``id`` is named in errors.
            inference: whether to end with the prompt for an answer, which an empty message of the
                assistant at the end (of torchtune's inference recipes) becomes.

        Returns:
            ``tokens``, list[int], and ``mask``, list[bool], of length s, True where the loss
            ignores the token: everywhere but in the text of answers and their ``<|im_end|>``, and
            there too if the message is ``masked`` or of weight 0; ``input_pos``, M-RoPE positions,
            int64 [s, 3]; if there are media ``encoder_input``, whose ``vision`` has ``patches``,
            float32 [n, 1176] or uint8 [n, 588] (with videos [n, 1176]) for patches of 14 pixels,
            ``grid_thw``, int64 [k, 3], and the index of
            :func:`~torchtune_vl.modules.vision_index`; and if something was cut ``truncated``, how
            many ``tokens``, ``images`` and ``videos``.

        Raises:
            ValueError: if a message or medium cannot be read, media and their places do not match,
                or the sample is too long and nothing would be left to learn.
        """
        return self._transformed(sample, inference)

    def to_answer(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Transform a sample of :meth:`__call__` to the prompt for an answer.

        As with ``inference``, but an answer that is begun, by a last message of the assistant with
        a text, is to be gone on with (transformers' ``continue_final_message``).
        """
        return self._transformed(sample, True, goes_on=True)

    def answer_of(self, sample: Mapping[str, Any]) -> str:
        """The answer at the end of a sample of :meth:`__call__`, as a model is to write it.

        That is without a reasoning, as :meth:`final_answer` has it. Boxes are in the pixels of the
        resized image then. No medium is decoded. It is empty if the last message is none of the
        assistant. ``ValueError`` as there.
        """
        with _naming(sample):
            media = sample.get("images"), sample.get("videos")
            *turns, last = chat.read_conversation(sample["messages"], *media, self.prompts.roles)
            if last.role != "assistant":
                return ""
            # Whatever else carries loss
            asked = [replace(t, masked=True) if t.role == "assistant" else t for t in turns]
            encoded = self._encoded([*asked, replace(last, masked=False)], measuring=True)
            tools = chat.read_tools(sample.get("tools"))
            whole = self.prompts.build(encoded, tools, inference=False)
        pairs = zip(whole.tokens, whole.mask, strict=True)
        trained = [t for t, masked in pairs if not masked and t not in self.stop_tokens]
        return self.final_answer(self.decode(trained))

    @property
    def writes_reasoning(self) -> bool:
        """Whether an answer begins with a reasoning, as the chat template asks for it."""
        return False

    def final_answer(self, text: str) -> str:
        """Return what is to be scored of an answer: what follows its reasoning, if it has one."""
        return text

    def answer_tokens(self, text: str) -> list[int]:
        """The ids of an answer, up to and with its end, behind the prompt of :meth:`to_answer`.

        They are those that training has, but for an answer that begins with line breaks, which
        training joins with the one before it. ``ValueError`` as :meth:`encode` raises it.
        """
        return self.prompts.answer(text)

    def boxes_in_answer(self, sample: Mapping[str, Any], text: str) -> list[dict[str, Any]]:
        """Find the boxes and points of an answer to a sample, in pixels of the last image's file.

        They are those of the upright image. No medium is decoded. ``ValueError`` if the sample has
        no image, and as :meth:`__call__` raises it.
        """
        with _naming(sample):
            whole, _ = self._prompts_of(sample, True, measuring=True)
            images = [medium for medium in whole.media.values() if medium.kind == "image"]
            if not images:
                raise ValueError("it has no image that boxes could be of")
            extent = self._extent_of(images[-1])
            return to_original(self.read_boxes(text), images[-1].original_size, extent)

    def augmented(
        self, sample: Mapping[str, Any], augmentation: Augmentation, epoch: int, number: int
    ) -> dict[str, Any]:
        """Transform a sample of :meth:`__call__` for training, with its images augmented.

        Videos stay as they are. An image is not flipped if a text speaks of direction or of writing
        in images, and neither cropped, scaled nor flipped if a text has coordinates, which would
        not move along.

        Args:
            sample: as of a call.
            augmentation: how images are changed.
            epoch: counts from 0.
            number: of the sample in its dataset. With the seed, these two are all that what is
                drawn depends on.

        Returns:
            What a call returns, of the same size; and if there are images ``augmented``, for each
            in the conversation, also if it is cut, a dict of what was done to it: ``window`` [x1,
            y1, x2, y2] of the upright original in pixels; ``place`` of it in the resized image;
            ``flip``; ``brightness``, ``contrast`` and ``saturation``, factors; ``hue`` in turns;
            ``jpeg_quality`` or None; and ``refused``, what was not done and why, or None.
        """
        changes = partial(draws, augmentation, epoch=epoch, number=number)
        return self._transformed(sample, False, changes)

    def _transformed(
        self,
        sample: Mapping[str, Any],
        inference: bool,
        changes: _Changes | None = None,
        goes_on: bool = False,
    ) -> dict[str, Any]:
        """A sample whose images are changed, each as is drawn for it, or as they are."""
        with _naming(sample):
            whole, prompt = self._prompts_of(sample, inference, changes=changes, goes_on=goes_on)
            tokens, mask, media = prompt.tokens, prompt.mask, prompt.media.values()
            grid_thw = torch.cat([medium.grid_thw for medium in media]) if media else _NO_MEDIA
            seconds = [medium.seconds_per_step for medium in media]
            positions = self.positions(tokens, grid_thw, seconds)
            transformed: dict[str, Any] = {"tokens": tokens, "mask": mask, "input_pos": positions}
            if media:
                patches = concatenate_patches([medium.patches for medium in media])
                index = vision_index(grid_thw, self.geometry)
                vision = {"patches": patches, "grid_thw": grid_thw, **index}
                transformed["encoder_input"] = {"vision": vision}
            if prompt is not whole:
                transformed["truncated"] = prompting.difference(whole, prompt)
                self._tell_cut(transformed["truncated"])
            made = [medium.change for medium in whole.media.values() if medium.change]
            if made:
                transformed["augmented"] = [change._asdict() for change in made]
            return transformed

    def examine(
        self, sample: Mapping[str, Any], inference: bool = False, augmented: bool = False
    ) -> Examined:
        """Find how large :meth:`__call__` makes a sample, without decoding its media.

        Of image files the header is read, of video files the list of packets. ``ValueError`` as
        there, but for what only decoding shows, and unless ``inference`` as
        :meth:`check_supervised` raises it. With ``augmented``, find how large :meth:`augmented` may
        make it: boxes that move may get more digits, each of which is a token.
        """
        with _naming(sample):
            changes = _farthest if augmented else None
            whole, prompt = self._prompts_of(sample, inference, measuring=True, changes=changes)
            if not inference:
                self.check_supervised(prompt.tokens, prompt.mask)
        # With fewer digits more may be left, but nothing that the whole does not have
        tokens, media = len(prompt.tokens), (whole if augmented else prompt).media.values()
        if augmented and prompt is not whole:
            tokens = self.max_seq_len or tokens
        patches = sum(len(medium.patches) for medium in media)
        size = tokens, patches, prompt.mask[1:].count(False)
        truncated = None if prompt is whole else prompting.difference(whole, prompt)
        return Examined(size, truncated, len(media))

    def check_supervised(
        self, tokens: Sequence[int], mask: Sequence[bool], problem: str = _NO_LOSS
    ) -> None:
        """Raise ``ValueError`` if the loss is taken of no id but those that end an answer."""
        pairs = zip(tokens[1:], mask[1:], strict=True)
        if {token for token, masked in pairs if not masked} <= {*self.stop_tokens}:
            raise ValueError(problem)

    def positions(
        self,
        tokens: Sequence[int],
        grid_thw: torch.Tensor,
        seconds_per_step: Sequence[float | None],
    ) -> torch.Tensor:
        """Find the M-RoPE positions of ids whose placeholders are expanded, int64 [s, 3].

        ``grid_thw`` is of their media, patches along time, height and width, int64 [k, 3], and
        ``seconds_per_step`` between steps of each, None for an image. ``ValueError`` if they do
        not fit the placeholders.
        """
        rate, size = self.tokens_per_second, self.geometry.merge_size
        steps = [1.0 if s is None or rate is None else rate * s for s in seconds_per_step]
        pads = self.image_pad_id, self.video_pad_id
        return mrope_positions(tokens, grid_thw, steps, placeholder_ids=pads, merge_size=size)

    def _prompts_of(
        self,
        sample: Mapping[str, Any],
        inference: bool,
        measuring: bool = False,
        changes: _Changes | None = None,
        goes_on: bool = False,
    ) -> tuple[prompting.Prompt, prompting.Prompt]:
        """The whole prompt of a sample, and what is left of it within ``max_seq_len``."""
        if "messages" not in sample:
            raise ValueError(f"it has no 'messages', but {sorted(map(str, sample))}")
        media = sample.get("images"), sample.get("videos")
        turns = chat.read_conversation(sample["messages"], *media, self.prompts.roles)
        tools = chat.read_tools(sample.get("tools"))
        last = turns[-1]
        if inference and last.role == "assistant" and not last.tool_calls and not any(last.content):
            turns = turns[:-1]
        if not turns:
            raise ValueError("there is no message to answer")
        encoded = self._encoded(turns, measuring, changes(turns) if changes else ())
        is_begun = goes_on and last.role == "assistant" and turns[-1] is last
        whole = self.prompts.build(encoded, tools, inference and not is_begun)
        if is_begun:
            whole = self.prompts.unended(whole)
        limit, length = self.max_seq_len, len(whole.tokens)
        if limit is None or length <= limit:
            return whole, whole
        help_ = prompting.remedy(whole, limit)
        if inference:
            raise ValueError(f"the prompt has {length} tokens: {help_}")
        prompt = self.prompts.truncate(whole, limit, self.truncation, encoded, tools)
        left = len(prompt.tokens)
        if left > limit:
            raise ValueError(f"the sample has {length} tokens, its last turn alone {left}: {help_}")
        problem = f"the sample has {length} tokens, and none that carries loss would be left of it"
        help_ += f", or choose another truncation (now {self.truncation!r})"
        self.check_supervised(prompt.tokens, prompt.mask, f"{problem}: {help_}")
        return whole, prompt

    def _tell_cut(self, cut: Mapping[str, int]) -> None:
        kind = "media" if cut["images"] or cut["videos"] else "texts"
        if self._told.is_new(kind):
            lost = ", ".join(f"{count} {what}" for what, count in cut.items())
            _log.warning(
                f"A sample is longer than max_seq_len={self.max_seq_len} and loses {lost}. Lost "
                f"{kind} are said once; each sample tells it as 'truncated'."
            )

    def _encoded(
        self,
        turns: Sequence[chat.Turn[chat.Part]],
        measuring: bool = False,
        draws: Iterable[Draw] = (),
    ) -> list[chat.EncodedTurn]:
        """Encode media, and write boxes in the pixels of the images that they belong to."""
        _refuse_left_out(turns, self.prompts.chat_template or CHAT_TEMPLATE)
        encode = partial(self._encode_item, measuring=measuring, draws=iter(draws))
        encoded = _each_item(turns, encode)
        parts = [part for turn in encoded for part in turn.content]
        images = [p for p in parts if isinstance(p, chat.EncodedMedium) and p.kind == "image"]
        written: Any = encoded
        if any(isinstance(part, chat.Objects) for part in parts):
            # They may be of an image that comes later
            written = _each_item(encoded, partial(self._write_item, images=images))
        if self.train_on == "last":
            last = max((i for i, t in enumerate(written) if t.role == "assistant"), default=None)
            return [t if i == last else replace(t, masked=True) for i, t in enumerate(written)]
        return written

    def _encode_item(self, item: chat.Part, measuring: bool, draws: Iterator[Draw]) -> _EncodedPart:
        if isinstance(item, str):
            check_surrogates(item)
            if self.parse_special == "all" and ("<|image_pad|>" in item or "<|video_pad|>" in item):
                raise ValueError(
                    "its text has a placeholder <|image_pad|> or <|video_pad|>: give media as items"
                )
        if not isinstance(item, chat.Medium):
            return item
        kind, given = item.kind, {item.kind: item.source, **item.settings}
        if kind == "image" and (draw := next(draws, None)):
            made = self.image_transform.changed(given, draw, decode=not measuring)
        else:
            transform = self.image_transform if kind == "image" else self.video_transform
            made = transform.measure(given) if measuring else transform(given)
        pixels = made["pixel_values" if kind == "image" else "pixel_values_videos"]
        grid_thw, num_tokens = made[f"{kind}_grid_thw"], made[f"num_{kind}_tokens"]
        seconds, size = made.get("seconds_per_step"), made.get("original_size", (0, 0))
        texts = self.step_texts(made["step_times"]) if kind == "video" else ()
        change = made.get("change")
        return chat.EncodedMedium(kind, pixels, grid_thw, num_tokens, seconds, size, change, texts)

    def step_texts(self, times: Sequence[float]) -> Sequence[str]:
        """Write the ASCII text before each step of a video, or none if a video is one block."""
        return ()

    def _write_item(
        self, item: _EncodedPart, images: Sequence[chat.EncodedMedium]
    ) -> str | chat.EncodedMedium:
        if not isinstance(item, chat.Objects):
            return item
        if not isinstance(item.image, int) or not 0 <= item.image < len(images):
            found = f"image {item.image!r} (from 0), but the conversation has {len(images)} images"
            raise ValueError(f"its boxes are of {found}: put them behind theirs, or set 'image'")
        image = images[item.image]
        original, extent = image.original_size, self._extent_of(image)
        axes = UNMOVED
        if image.change:
            axes = image.change.axes(original, self._resized(image))
        entries = [rescaled(e, item.unit, original, extent, axes) for e in item.entries]
        if not item.fields:
            return self.write_boxes(entries)
        written = {
            f"{{{name}}}": self.write_coordinates(entry.get("bbox_2d") or entry["point_2d"])
            for name, entry in zip(item.fields, entries, strict=True)
        }
        return re.sub("|".join(map(re.escape, written)), lambda found: written[found[0]], item.text)

    def _resized(self, image: chat.EncodedMedium) -> tuple[int, int]:
        ((_, rows, columns),) = image.grid_thw.tolist()
        return rows * self.geometry.patch_size, columns * self.geometry.patch_size

    def _extent_of(self, image: chat.EncodedMedium) -> tuple[int, int]:
        return self.box_extent(*self._resized(image))

    def box_extent(self, height: int, width: int) -> tuple[int, int]:
        """The numbers that boxes have for the lower and the right edge of a resized image."""
        return height, width

    def write_boxes(self, entries: Sequence[Mapping[str, Any]]) -> str:
        """Write boxes and points, in whole numbers, as the family's pre-training had them."""
        return to_json(entries)

    def write_coordinates(self, coordinates: Sequence[int]) -> str:
        """Write four numbers of a box, or two of a point, in the middle of a text."""
        return str(coordinates)

    def read_boxes(self, text: str) -> list[dict[str, Any]]:
        """Find the entries that :meth:`write_boxes` wrote in a text, in the numbers that it has."""
        return boxes_in(text)

    def read_coordinates(self, text: str) -> list[list[float]]:
        """Find what :meth:`write_coordinates` wrote, and whatever else looks like it."""
        return coordinates_in(text)


def _refuse_left_out(turns: Sequence[chat.Turn[chat.Part]], template: str) -> None:
    """Raise ``ValueError`` for a reasoning that a template does not read."""
    for number, turn in enumerate(turns):
        given = turn.given if turn.role == "assistant" else {}
        keys = [k for k in chat.REASONINGS if isinstance(given.get(k), str | list) and given[k]]
        # A server may give it by several names
        if keys and not any(re.search(rf"[.'\"]{key}\b", template) for key in keys):
            remedy = "remove it"
            if keys[0] != chat.REASONINGS[0]:
                remedy += ", or make it reasoning_content for a template that reads that"
            left_out = f"the chat template leaves its {keys[0]} out: {remedy}"
            raise ValueError(f"message {number} ({turn.role}): {left_out}")


def _each_item(turns: Sequence[chat.Turn[_A]], convert: Callable[[_A], _B]) -> list[chat.Turn[_B]]:
    """The turns with each item converted, which errors name."""
    converted = []
    for n, turn in enumerate(turns):
        content = []
        for i, item in enumerate(turn.content):
            try:
                content.append(convert(item))
            except ValueError as error:
                raise ValueError(f"message {n} ({turn.role}): item {i}: {error}") from error
        converted.append(chat.Turn(turn.role, content, turn.masked, turn.given))
    return converted


def _farthest(turns: Sequence[chat.Turn[chat.Part]]) -> Iterable[Draw]:
    return repeat(farthest)


def _naming(sample: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Names the sample in errors, which whatever it holds may cause."""
    return naming_sample(sample["id"]) if "id" in sample else nullcontext()
