"""Random damage to files and conversations, for as long as you like.

``python -m tests.fuzz --minutes 10`` runs until the time is up or an input gives something else
than the reference's output or a ``ValueError`` that names the sample. Such an input is saved.
"""

import argparse
import base64
import copy
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from quickstart.vocabulary import fetch_vocabulary
from tests import hostile
from tests.conversations import generate_conversation
from torchtune_vl.validation import import_torchvision

import_torchvision()

from transformers import Qwen2VLImageProcessor  # noqa: E402
from transformers.image_utils import load_image  # noqa: E402

from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform, qwen2_5_vl_transform  # noqa: E402

SIZE = {"shortest_edge": 3136, "longest_edge": 200704}
SECONDS = 20.0
TEXTS = ("<image>", "<|im_end|>", "<|image_pad|>", "\udc80", "\0", "", "{", "{{ a }}", "\u0301" * 9)
VALUES = (None, 0, -1, 1.5, True, "", "user", [], {}, b"", float("nan"), "a" * 1000, *TEXTS)


def damaged(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Flip, cut, repeat, move or splice bytes."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 50))):
        if not result:
            break
        i, j = sorted(rng.randrange(len(result) + 1) for _ in range(2))
        way = rng.randrange(6)
        if way == 0:
            result[min(i, len(result) - 1)] ^= 1 << rng.randrange(8)
        elif way == 1:
            result[i : min(j, i + 64)] = rng.randbytes(min(j - i, 64))
        elif way == 2 and rng.random() < 0.3:
            del result[i:j]
        elif way == 3:
            result[i:i] = result[i : min(j, i + 500)]
        elif way == 4:
            other = rng.choice(others)
            k = rng.randrange(len(other) + 1)
            result[i : i + 32] = other[k : k + 32]
        elif way == 5:
            result[i : i + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
    return bytes(result)


def mutated(rng: random.Random, value: Any) -> Any:
    """Put another value somewhere into JSON-like data."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice([*value])
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return {**value, rng.choice(("type", "image", "fps", "boxes", "x")): rng.choice(VALUES)}
        return {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        way = rng.random()
        if way < 0.1:
            return value[:i] + value[i + 1 :]
        if way < 0.2:
            return [*value[:i], copy.copy(value[i]), *value[i:]]
        return [*value[:i], mutated(rng, value[i]), *value[i + 1 :]]
    if isinstance(value, str) and rng.random() < 0.7:
        i = rng.randrange(len(value) + 1)
        return value[:i] + rng.choice(TEXTS) + value[i:]
    return rng.choice(VALUES)


class Fuzzer:
    """Draws inputs and checks what becomes of them."""

    def __init__(self, vocabulary: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        settings = {"max_pixels": SIZE["longest_edge"], "video_max_pixels": SIZE["longest_edge"]}
        path = vocabulary / "tokenizer.json"
        self.transforms: list[Qwen2_5_VLTransform] = [
            qwen2_5_vl_transform(path, **settings),
            qwen2_5_vl_transform(path, **settings, max_seq_len=90, truncation="turns"),
            qwen2_5_vl_transform(path, **settings, max_seq_len=60, truncation="left"),
            qwen2_5_vl_transform(path, **settings, patch_dtype="uint8", add_vision_id=True),
        ]
        self.processor = Qwen2VLImageProcessor(size=SIZE)
        self.images = [data for _, data in hostile.image_files() if 100 < len(data) < 100_000]
        self.videos = [data for _, data in hostile.video_files() if len(data) > 100]

    def image(self) -> tuple[bytes, Callable[[], None]]:
        """A damaged image file: equal to the reference, or refused by both."""
        data = damaged(self.rng, self.rng.choice(self.images), self.images)

        def check() -> None:
            ours = self._outcome(self.transforms[0], [{"type": "image", "image": data}])
            try:
                image = load_image(_data_url(data))
                expected = self.processor(images=[image], return_tensors="pt")["pixel_values"]
            except Exception:
                expected = None
            assert (ours is None) == (expected is None), "only one of the two refuses it"
            if ours is not None:
                patches = ours["encoder_input"]["vision"]["patches"]
                assert torch.equal(patches, expected), "the pixels differ"

        return data, check

    def video(self) -> tuple[bytes, Callable[[], None]]:
        """A damaged video file: finite patches or refused."""
        data = damaged(self.rng, self.rng.choice(self.videos), self.videos)

        def check() -> None:
            ours = self._outcome(self.transforms[0], [{"type": "video", "video": data}])
            if ours is not None:
                assert torch.isfinite(ours["encoder_input"]["vision"]["patches"]).all()

        return data, check

    def conversation(self) -> tuple[bytes, Callable[[], None]]:
        """A conversation with wrong values: a sound sample or refused."""
        sample: Any = {"messages": generate_conversation(self.rng.randrange(10**9))}
        if self.rng.random() < 0.3:
            sample["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
            call = {"function": {"name": "f", "arguments": {"a": 1}}}
            sample["messages"].append({"role": "assistant", "content": None, "tool_calls": [call]})
        if self.rng.random() < 0.3:
            boxes = [{"bbox_2d": [0, 0, 5, 5], "label": "a"}, {"point_2d": [1, 1]}]
            content = [{"type": "boxes", "boxes": boxes}, {"type": "video", "video": "none.mp4"}]
            sample["messages"][0]["content"] += content[: self.rng.randint(1, 2)]
        for _ in range(self.rng.randint(1, 3)):
            sample = mutated(self.rng, sample)
        transform = self.rng.choice(self.transforms)
        inference = self.rng.random() < 0.3

        def check() -> None:
            if not isinstance(sample, dict):
                return
            try:
                ours = transform({**sample, "id": "fuzzed"}, inference=inference)
            except ValueError as error:
                _check_located(error, "sample 'fuzzed': ")
                return
            assert len(ours["tokens"]) == len(ours["mask"]) == len(ours["input_pos"])
            vision = ours.get("encoder_input", {}).get("vision")
            embeddings = 0 if vision is None else int(vision["grid_thw"].prod(1).sum()) // 4
            placeholders = sum(ours["tokens"].count(pad) for pad in (151655, 151656))
            assert placeholders == embeddings, "placeholders are not the media"
            assert ours["tokens"].count(151652) == ours["tokens"].count(151653)

        return repr(sample).encode(errors="backslashreplace"), check

    def _outcome(self, transform: Qwen2_5_VLTransform, content: list[Any]) -> dict[str, Any] | None:
        sample = {"messages": [{"role": "user", "content": content}], "id": "fuzzed"}
        try:
            return transform(sample)
        except ValueError as error:
            _check_located(error, "sample 'fuzzed': message 0 (user): item 0: ")
            return None


def _check_located(error: ValueError, where: str) -> None:
    if not str(error).startswith(where):
        raise AssertionError(f"the error does not begin with {where!r}") from error


def _data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0, help="another one, other inputs")
    parser.add_argument("--save", type=Path, default=Path("fuzz-failure.bin"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = (
        20_000_000  # a flipped bit makes many large images, which only cost time
    )
    assets = Path(__file__).parents[1] / ".assets" / "tokenizer"
    fuzzer = Fuzzer(fetch_vocabulary(assets), arguments.seed)
    counts = dict.fromkeys(("image", "video", "conversation"), 0)
    started = time.monotonic()
    with tqdm(total=round(arguments.minutes * 60), unit="s") as bar:
        while (elapsed := time.monotonic() - started) < arguments.minutes * 60:
            bar.update(int(elapsed) - bar.n)
            kind = fuzzer.rng.choice((*counts, "image", "conversation"))
            data, check = getattr(fuzzer, kind)()
            begun = time.monotonic()
            try:
                check()
                assert time.monotonic() - begun < SECONDS, "it takes too long"
            except Exception:
                arguments.save.write_bytes(data)
                print(f"{kind} {counts[kind]} fails; it is in {arguments.save}")
                raise
            counts[kind] += 1
    print("nothing found in", ", ".join(f"{count:,} {kind}s" for kind, count in counts.items()))


if __name__ == "__main__":
    main()
