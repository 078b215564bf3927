"""Time from a JPEG's bytes and a question to a sample, beside transformers' default processor.

Run as ``python -m benchmarks.data_path``. It prints Markdown: how many times faster this project
is than transformers on the same input, in one process on one core; how far it is above the least
that an image costs, which is decoding, the exact resize and writing the result once; what a second
data worker adds, for which the machine should have two cores free; and how large a batch is. All
inputs are made on the spot, from a photograph that scikit-image brings along and from the
documentation of Python; --images adds a folder of your own. It takes about five minutes.
"""

import argparse
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import av
import numpy as np
import psutil
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks import spread
from quickstart.checkpoint import CONFIGS, write_tiny_checkpoint
from quickstart.vocabulary import fetch_vocabulary
from torchtune_vl.chat import ChatTransform
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.models import transform_from_pretrained
from torchtune_vl.validation import import_torchvision

import_torchvision()  # before transformers, which looks for it at import

from qwen_vl_utils import process_vision_info  # noqa: E402
from transformers import AutoProcessor, ProcessorMixin  # noqa: E402
from transformers.image_utils import load_image  # noqa: E402
from transformers.video_utils import load_video  # noqa: E402

ASSETS = Path(__file__).parents[1] / ".assets"
PHOTOGRAPH = Path(str(find_spec("skimage").origin)).parent / "data" / "motorcycle_left.png"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
QUESTION = "What is in this image? Name every object that you can see, and where it is."
TEXT_TOKENS = 270
QUESTIONS = 100  # more than the texts whose tokens a transform keeps
TEXT_BYTES = 100_000
FULL_HD = (1920, 1080)
VIDEO_SIZE, VIDEO_SECONDS, VIDEO_FPS = (640, 360), 16, 24  # 2 sampled frames a second
BATCH_SIZE, EPOCH_SIZE, EPOCHS = 2, 64, 11
LOOP_LENGTH = 2_000_000  # about as long as an image takes
JPEG_QUALITY = 85
JPEG_START = b"\xff\xd8"
SHORTEST_MEASUREMENT = 0.02  # seconds; calls that take less are repeated
PACKAGES = (
    "torch", "transformers", "tokenizers", "torchvision", "qwen-vl-utils", "decord", "Pillow",
    "tiktoken", "simplejpeg", "av",
)  # fmt: skip

Call = Callable[[], Any]


class Case(NamedTuple):
    """An input, what is timed on it, and what we promise of the ratios."""

    name: str
    ours: Call
    theirs: Call
    floor: Call | None = None
    target: str = ""
    floor_target: str = ""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of JPEG and PNG files to add")
    parser.add_argument("--runs", type=int, default=30, help="paired runs of each case")
    parser.add_argument("--family", choices=CONFIGS, default=next(iter(CONFIGS)))
    arguments = parser.parse_args()
    if arguments.runs < 2:
        parser.error("--runs must be at least 2: quartiles are printed")

    torch.set_num_threads(1)
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    print(f"Python {platform.python_version()}, ", end="")
    print(", ".join(f"{package} {version(package)}" for package in PACKAGES))
    with TemporaryDirectory() as temporary:
        checkpoint = Path(temporary, "checkpoint")
        write_checkpoint(checkpoint, CONFIGS[arguments.family])
        with one_core():
            print(f"\nOne core, {arguments.runs} paired runs: median (quartiles)\n")
            print("| input | times faster than transformers | target | time / floor | target |")
            print("|---|---|---|---|---|")
            for case in cases(checkpoint, make_clip(Path(temporary)), arguments.images):
                print(row(case, arguments.runs), flush=True)
        print_batches(checkpoint)


def cases(checkpoint: Path, clip: Path, folder: Path | None) -> Iterator[Case]:
    """Yield the cases, each after a check that both sides agree."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert processor.image_processor.backend == "torchvision"
    transforms = {
        dtype: transform_from_pretrained(checkpoint, patch_dtype=dtype)
        for dtype in ("float32", "uint8")
    }
    transform = transforms["float32"]

    yield text_case(transform, processor, questions_of(transform))
    for name, size, dtype, target, floor_target in (
        ("JPEG 224x224", (224, 224), "float32", "5", ""),
        ("JPEG 640x480", (640, 480), "float32", "2.5", ""),
        ("JPEG 1920x1080", FULL_HD, "float32", "2.5", "1.25"),
        ("JPEG 1920x1080, uint8 patches", FULL_HD, "uint8", "2.7", "1.25"),
    ):
        images = [jpeg(*size)]
        yield image_case(name, transforms[dtype], processor, images, target, floor_target)
    for file_format, images in files_of(folder).items() if folder else ():
        name = f"{len(images)} {file_format} files of {folder.name}"
        target = "2.3" if file_format == "JPEG" else ""
        yield image_case(name, transform, processor, images, target, "")
    yield video_case(transform, processor, clip)
    text = prose()[:TEXT_BYTES]
    tokenizer = processor.tokenizer
    assert transform.encode(text, add_eos=False) == tokenizer(text).input_ids
    yield Case(
        f"{TEXT_BYTES // 1000} kB of text to ids",
        lambda: transform.encode(text, add_eos=False),
        lambda: tokenizer(text).input_ids,
        target="5",
    )


def text_case(
    transform: ChatTransform, processor: ProcessorMixin, questions: Sequence[str]
) -> Case:
    """Questions without an image, none of which comes again before it is forgotten."""
    conversations = [
        [{"role": "user", "content": [{"type": "text", "text": question}]}]
        for question in questions
    ]

    def ours(messages: list[dict[str, Any]]) -> dict[str, Any]:
        return transform({"messages": messages}, inference=True)

    def theirs(messages: list[dict[str, Any]]) -> Mapping[str, Any]:
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        return processor(text=[prompt], return_tensors="pt")

    for messages in conversations:
        assert ours(messages)["tokens"] == theirs(messages)["input_ids"][0].tolist()
    our_next, their_next = cycle(conversations), cycle(conversations)
    return Case(
        f"text, {TEXT_TOKENS} tokens",
        lambda: ours(next(our_next)),
        lambda: theirs(next(their_next)),
        target="15",
    )


def image_case(
    name: str,
    transform: ChatTransform,
    processor: ProcessorMixin,
    images: Sequence[bytes],
    target: str,
    floor_target: str,
) -> Case:
    """Encoded images one after another, each with a question."""

    def ours(image: bytes) -> dict[str, Any]:
        content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        return transform({"messages": [{"role": "user", "content": content}]}, inference=True)

    def theirs(image: bytes) -> Mapping[str, Any]:
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        opened = load_image(Image.open(BytesIO(image)))
        return processor(text=[prompt], images=[opened], return_tensors="pt")

    visions = []
    for image in images:
        sample, expected = ours(image), theirs(image)
        assert sample["tokens"] == expected["input_ids"][0].tolist()
        visions.append(sample["encoder_input"]["vision"])
        if transform.image_transform.patch_dtype == "float32":
            assert torch.equal(visions[-1]["patches"], expected["pixel_values"])
    sizes = [
        (vision["grid_thw"][0, 1:] * transform.geometry.patch_size).tolist() for vision in visions
    ]
    outputs = [(vision["patches"].shape, vision["patches"].numpy().dtype) for vision in visions]
    del visions, sample, expected

    def floor() -> None:
        for image, size, output in zip(images, sizes, outputs, strict=True):
            least_work(image, size, *output)

    return Case(
        name,
        lambda: [ours(image) for image in images],
        lambda: [theirs(image) for image in images],
        floor,
        target,
        floor_target,
    )


def least_work(
    image: bytes, size: tuple[int, int], shape: tuple[int, ...], dtype: np.dtype
) -> None:
    """Decode an image, resize it exactly, and write an array as large as its patches once."""
    if image.startswith(JPEG_START):
        pixels_HWC = simplejpeg.decode_jpeg(image)
    else:
        pixels_HWC = np.array(Image.open(BytesIO(image)).convert("RGB"))
    if pixels_HWC.shape[:2] != tuple(size):
        pixels_NCHW = torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)
        F.interpolate(pixels_NCHW, size, mode="bicubic", antialias=True)
    np.empty(shape, dtype).fill(1)


def video_case(transform: ChatTransform, processor: ProcessorMixin, clip: Path) -> Case:
    """A video file and a question; qwen-vl-utils reads it for transformers.

    Where steps stand apart in the text, transformers reads it itself, by decord too, and is given
    the text without the pair of tokens around them, as ours is.
    """
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]

    def ours() -> dict[str, Any]:
        return transform({"messages": messages}, inference=True)

    def theirs() -> Mapping[str, Any]:
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        if transform.has_timed_steps:
            sample = processor.video_processor.sample_frames
            frames, metadata = load_video(str(clip), backend="decord", sample_indices_fn=sample)
            return processor(
                text=[prompt.replace(VIDEO, "<|video_pad|>")],
                videos=[frames],
                video_metadata=[metadata],
                do_sample_frames=False,
                return_tensors="pt",
            )
        _, videos, settings = process_vision_info(
            messages, return_video_kwargs=True, return_video_metadata=True
        )
        frames, metadata = zip(*videos, strict=True)
        return processor(
            text=[prompt],
            videos=list(frames),
            video_metadata=list(metadata),
            return_tensors="pt",
            **settings,
        )

    sample, expected = ours(), theirs()
    assert sample["tokens"] == expected["input_ids"][0].tolist()
    steps = int(sample["encoder_input"]["vision"]["grid_thw"][0, 0])
    width, height = VIDEO_SIZE
    name = f"video {width}x{height}, {2 * steps} of {VIDEO_SECONDS * VIDEO_FPS} frames"
    return Case(name, ours, theirs, target="2")


def row(case: Case, runs: int) -> str:
    """Measure a case and return its row of the table."""
    calls = {"ours": case.ours, "theirs": case.theirs}
    if case.floor:
        calls["floor"] = case.floor
    times = paired_times(calls, runs)
    faster = spread([b / a for a, b in zip(times["ours"], times["theirs"], strict=True)])
    above = ""
    if case.floor:
        above = spread([a / b for a, b in zip(times["ours"], times["floor"], strict=True)])
    target = f">= {case.target}" if case.target else ""
    floor_target = f"<= {case.floor_target}" if case.floor_target else ""
    return f"| {case.name} | {faster} | {target} | {above} | {floor_target} |"


def paired_times(calls: Mapping[str, Call], runs: int) -> dict[str, list[float]]:
    """Return seconds of each call, taken in turns, in an order that reverses with each run."""
    repeats = {name: repeats_of(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(runs):
        for name in names:
            times[name].append(seconds(calls[name], repeats[name]))
        names.reverse()
    return times


def repeats_of(call: Call) -> int:
    """Return how often a call has to be repeated to be measured."""
    call()  # compiles and fills caches
    return math.ceil(SHORTEST_MEASUREMENT / seconds(call, 1))


def seconds(call: Call, repeats: int) -> float:
    """Return the mean time of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def print_batches(checkpoint: Path) -> None:
    """Print what a second data worker adds, and the bytes of a batch."""
    datasets = {
        dtype: Questions(
            transform_from_pretrained(checkpoint, patch_dtype=dtype),
            jpeg(*FULL_HD),
        )
        for dtype in ("float32", "uint8")
    }
    print(f"\nDataLoader, JPEGs of 1920x1080 in batches of {BATCH_SIZE}, {EPOCHS} paired epochs\n")
    print("| patches | throughput of 2 workers / 1 | target | processor time of a sample, 2 / 1 |")
    print("|---|---|---|---|")
    for dtype, dataset in datasets.items():
        throughput, work = worker_ratios(dataset, padded_collate_vision)
        print(f"| {dtype} | {throughput} | >= 1.8 | {work} |", flush=True)
    throughput, work = worker_ratios(Loops(), len)
    print(f"| none, a loop in Python: what the machine has to give | {throughput} | | {work} |")

    print("\nBytes of a batch with one image of 1920x1080\n")
    print("| tensors | float32 | uint8 | ratio | target |\n|---|---|---|---|---|")
    batches = [padded_collate_vision([dataset[0]]) for dataset in datasets.values()]
    images = [batch["encoder_input"] for batch in batches]
    for name, pair, target in (
        ("patches and their index", images, ">= 7.9"),
        ("the same, tokens and positions", batches, ""),
    ):
        float32, uint8 = map(num_bytes, pair)
        print(f"| {name} | {float32:,} | {uint8:,} | {float32 / uint8:.2f} | {target} |")


class Questions(Dataset):
    """The same image and question many times."""

    def __init__(self, transform: ChatTransform, image: bytes) -> None:
        self.transform = transform
        self.image = image

    def __len__(self) -> int:
        return EPOCH_SIZE

    def __getitem__(self, index: int) -> dict[str, Any]:
        content = [{"type": "image", "image": self.image}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        return self.transform({"messages": messages}, inference=True)


class Loops(Dataset):
    """Work for the processor alone."""

    def __len__(self) -> int:
        return EPOCH_SIZE

    def __getitem__(self, index: int) -> int:
        return sum(range(LOOP_LENGTH))


def worker_ratios(dataset: Dataset, collate: Call) -> tuple[str, str]:
    """Compare 2 workers with 1: samples per second, and processor time of the workers per sample.

    The trainer's process takes part of a core too. Where there is none left for it, throughput does
    not double, though a sample costs the workers no more than before.
    """
    loaders = {
        workers: DataLoader(
            dataset,
            batch_size=BATCH_SIZE,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=True,
        )
        for workers in (1, 2)
    }

    def epoch(workers: int) -> tuple[float, float]:
        start, worked = time.perf_counter(), processor_time_of_workers()
        for _ in loaders[workers]:
            pass
        return time.perf_counter() - start, processor_time_of_workers() - worked

    for workers in loaders:  # starts them
        epoch(workers)
    pairs = [(epoch(1), epoch(2)) for _ in range(EPOCHS)]
    throughput = [one[0] / two[0] for one, two in pairs]
    work = [two[1] / one[1] for one, two in pairs]
    return spread(throughput), spread(work)


def processor_time_of_workers() -> float:
    """Return the seconds that all child processes have worked."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(t.user + t.system for t in times)


def num_bytes(batch: Any) -> int:
    """Return the bytes of all tensors in nested dicts."""
    if isinstance(batch, torch.Tensor):
        return batch.nbytes
    return sum(map(num_bytes, batch.values())) if isinstance(batch, Mapping) else 0


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process on one core, whatever threads its libraries start (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def write_checkpoint(directory: Path, config: Mapping[str, Any]) -> None:
    """Write a random model of these dimensions, with the published vocabulary."""
    write_tiny_checkpoint(directory, fetch_vocabulary(ASSETS / "tokenizer"), config=config)


def prose() -> str:
    """English, with some code: what Python's help() knows of the language."""
    return "\n".join(topics.values())


def questions_of(transform: ChatTransform) -> list[str]:
    """Different questions of ``TEXT_TOKENS`` tokens, with all that the chat template adds."""
    messages = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
    template = transform({"messages": messages}, inference=True)["tokens"]
    ids, length = transform.encode(prose(), add_eos=False), TEXT_TOKENS - len(template)
    return [transform.decode(ids[i * length :][:length]) for i in range(QUESTIONS)]


def jpeg(width: int, height: int) -> bytes:
    """A photograph of this size, reduced, or continued as in a mirror where it is too small."""
    pixels_HWC = np.array(Image.open(PHOTOGRAPH).convert("RGB"))
    sides = zip((height, width), pixels_HWC.shape[:2], strict=True)
    margins = [(0, max(0, wanted - given)) for wanted, given in sides]
    continued = Image.fromarray(np.pad(pixels_HWC, [*margins, (0, 0)], mode="symmetric"))
    file = BytesIO()
    ImageOps.fit(continued, (width, height)).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def files_of(folder: Path) -> dict[str, list[bytes]]:
    """The JPEG and PNG files of a folder by their format, which is found in the files."""
    files: dict[str, list[bytes]] = {"JPEG": [], "PNG": []}
    for path in sorted(folder.iterdir()):
        with suppress(OSError), Image.open(path) as image:
            if image.format in files:
                files[image.format].append(path.read_bytes())
    return {name: images for name, images in files.items() if images}


def make_clip(directory: Path) -> Path:
    """A camera that moves over a photograph, in H.264."""
    width, height = VIDEO_SIZE
    photograph = Image.open(BytesIO(jpeg(*FULL_HD)))
    path = directory / "clip.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=VIDEO_FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(VIDEO_SECONDS * VIDEO_FPS):
            view = photograph.crop((2 * i, i, 2 * i + width, i + height))
            container.mux(stream.encode(av.VideoFrame.from_image(view)))
        container.mux(stream.encode())
    return path


if __name__ == "__main__":
    main()
