"""What `benchmarks.gpu` measures on one GPU, a part to a process.

Weights are random and made on the device: nothing as large as a checkpoint is on a disk. Each part
is a function that yields rows of results, which are kept as they come.
"""

import argparse
import copy
import gc
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.autograd import DeviceType
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from torch.utils.data import ConcatDataset, Subset
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# Before the package, which would look for them
from benchmarks import absentees as absentees
from benchmarks.gpu import PARTS, keep, read
from quickstart.checkpoint import (
    CONFIG,
    PREPROCESSOR_CONFIG,
    write_tiny_checkpoint,
)
from tests.reference import (
    Conversation,
    reference_config,
    reference_inputs,
    reference_model,
)
from torchtune_vl import _torchtune as tune
from torchtune_vl.chat import CHAT_TEMPLATE
from torchtune_vl.data import packed_collate_vision, padded_collate_vision
from torchtune_vl.datasets import _conversations, vision_chat_dataset
from torchtune_vl.datasets._json_records import JsonRecords
from torchtune_vl.files._tensor_names import flat_name
from torchtune_vl.generation import Decoding, Rules, decode
from torchtune_vl.models import model_from_pretrained, transform_from_pretrained
from torchtune_vl.models._registry import family_of
from torchtune_vl.models._weights import load_weights_into
from torchtune_vl.modules import Segments
from torchtune_vl.modules.loss import chunked_cross_entropy
from torchtune_vl.modules.quantized import quantize_layers
from torchtune_vl.recipes import config_path, finetune
from torchtune_vl.recipes._check_config import read_config
from torchtune_vl.training._flops import peak_flops
from torchtune_vl.training._memory import estimate_memory

Row = dict[str, Any]

SEED = 0
# Comparisons run on a CPU too, to try them
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INPUTS = Path("build/gpu/inputs")
# Where `make quickstart` leaves the vocabulary, and where `make gpu-wheels` does
VOCABULARIES = (Path(".assets/tokenizer"), Path("build/gpu-wheels/tokenizer"))
FULL_HD = (1920, 1080)
PHOTOGRAPHS, SAMPLES, IMAGE_COUNTS = 32, 200, (0.25, 0.6, 0.15)
QUESTION_WORDS, ANSWER_WORDS = 600, 40
WORKERS = 8
# Compilation comes with the first rows, whose sizes differ
WARM_UP, STEPS, PROFILED_STEPS = 4, 12, 3
PEERS_BATCH, PEERS_WARM_UP = 4, 1
MAX_NORM, IGNORED = 1.0, -100
RESERVE = 8  # seconds of a part that are kept for what follows its steps
MAX_TOKENS = 16_384
KERNELS = 12
CPU = DeviceType.CPU
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
NEW_TOKENS, DECODING_STEPS, DECODING_WARM_UP, DECODING_RUNS = 41, 32, 6, 3
PROMPT_TOKENS = 600
LOSS_RUNS = 5
NOT_CAPTURED = "bfloat16, steps not captured"

_PUBLISHED_VISION = {
    **CONFIG["vision_config"],
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_3B: dict[str, Any] = {
    **CONFIG,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128_000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "torch_dtype": "bfloat16",
    "vision_config": {**_PUBLISHED_VISION, "out_hidden_size": 2048},
}
_7B: dict[str, Any] = {
    **_3B,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 152_064,
    "vision_config": {**_PUBLISHED_VISION, "out_hidden_size": 3584},
}
MODELS = {"3B": _3B, "7B": _7B}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Between text, of several lengths, and of images that windows do not divide
CONVERSATIONS = (
    Conversation([], 25),
    Conversation([(1, 22, 6)]),
    Conversation([(1, 2, 2), (1, 18, 30), (1, 8, 8)], 40),
    Conversation([], 3),
    Conversation([(1, 16, 16)]),
)


@dataclass(frozen=True)
class Job:
    """What a part knows of its run.

    Args:
        output: results of all parts so far.
        until: when it has to be done, in seconds since the epoch.
    """

    output: Path
    until: float

    def has_time(self) -> bool:
        """Whether another step may begin."""
        return time.time() < self.until - RESERVE


def main() -> None:
    """Measure a part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    arguments = parser.parse_args()
    part = PARTS[arguments.part]
    keep(arguments.output, arguments.part, about=about())
    torch.manual_seed(SEED)
    rows: list[Row] = []
    measure: Callable[..., Iterator[Row]] = globals()[part.function]
    for row in measure(Job(arguments.output, arguments.until), **part.settings):
        rows.append(row)
        keep(arguments.output, arguments.part, rows=rows)
    os._exit(0)  # nothing that is left has to be waited for


def about() -> dict[str, str]:
    """What the numbers depend on."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = "unknown"
    if shutil.which(query[0]):
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        driver = found[0] if found else driver
    packages = {name: version(name) for name in ("transformers", "torchao", "numpy")}
    return {
        "GPU": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none",
        "driver": driver,
        "CUDA": str(torch.version.cuda),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **packages,
        "seed": str(SEED),
    }


# Correctness


def correctness(job: Job) -> Iterator[Row]:
    """Compare our own ways with each other, and then with transformers.

    Bounds of float32 are some tens of what the CPU shows, since sums have another order here. What
    is computed in bfloat16 is as far from float32 as the sample alone, or as transformers.
    """
    torch.backends.cudnn.allow_tf32 = False
    generator = torch.Generator().manual_seed(SEED)
    samples = [conversation.sample(generator) for conversation in CONVERSATIONS]
    with TemporaryDirectory() as directory:
        reference = reference_model(reference_config("head_dim_128"), SEED)
        reference.save_pretrained(directory)
        ours = model_from_pretrained(directory).eval().to(DEVICE)
        names = family_of(directory).names
    yield from comparisons_of_rows(copy.deepcopy(ours), samples)
    yield from comparisons_with(reference.to(DEVICE), ours, names.to_published, samples)
    found = differing_captured(ours, samples)  # in bfloat16 by now
    yield checked("answers that differ by capturing steps, bfloat16", found, 0)


def comparisons_of_rows(model: Any, samples: list[dict[str, Any]]) -> Iterator[Row]:
    """Compare samples in a packed row with the same samples alone."""

    def alone() -> list[torch.Tensor]:
        return [ours_on(model, [sample], packed_collate_vision)[0] for sample in samples]

    exact = alone()
    packed = ours_on(model, samples, packed_collate_vision)
    yield checked("packed and alone: logits, float32, absolute", farthest(packed, exact), 2e-4)
    model.bfloat16()
    packed = ours_on(model, samples, packed_collate_vision)
    found = distance(packed, exact) / (distance(alone(), exact) or 1.0)
    yield checked("packed: error of logits in bfloat16 / alone", found, 1.1)
    changed = [*samples]
    changed[2] = {**samples[2], "tokens": [*samples[2]["tokens"][:-9], *range(9)]}
    after = ours_on(model, changed, packed_collate_vision)
    pairs = [(a, b) for i, (a, b) in enumerate(zip(after, packed, strict=True)) if i != 2]
    found = farthest(*zip(*pairs, strict=True))
    yield checked("packed: change of others by another sample's", found, 0)


def comparisons_with(
    reference: Any, ours: Any, to_published: Any, samples: list[dict[str, Any]]
) -> Iterator[Row]:
    """Compare logits, gradients and answers with those of transformers."""
    sides = ((reference, published, theirs_on), (ours, to_published, ours_on))
    exact = theirs_on(reference, samples)
    found = farthest(ours_on(ours, samples), exact)
    yield checked("transformers: logits, float32, absolute", found, 2e-4)
    exact_gradients, own = (gradients(model, names, samples, f) for model, names, f in sides)
    found = distance(own, exact_gradients)
    yield checked("transformers: gradients, float32, relative", found, 1e-3)
    found = differing_answers(ours, reference, samples)
    yield checked("transformers: greedy answers that differ, float32", found, 0)
    ours.bfloat16(), reference.bfloat16()
    found = distance(ours_on(ours, samples), exact)
    found /= distance(theirs_on(reference, samples), exact) or 1.0
    yield checked("error of logits in bfloat16 / transformers'", found, 1.1)
    theirs, own = (gradients(model, names, samples, f) for model, names, f in sides)
    found = distance(own, exact_gradients) / (distance(theirs, exact_gradients) or 1.0)
    yield checked("error of gradients in bfloat16 / transformers'", found, 1.1)


def checked(name: str, value: float, bound: float) -> Row:
    """A row of a comparison."""
    return {"what": "comparison", "name": name, "value": float(value), "bound": bound}


def ours_on(
    model: Any, samples: Sequence[Mapping[str, Any]], collate: Any = padded_collate_vision
) -> list[torch.Tensor]:
    """Our logits of each sample's tokens."""
    batch = on_device(dict(collate(samples)))
    for key in ("labels", "targets", "output_positions"):
        batch.pop(key, None)
    logits = model(**batch)
    if "mask" in batch:
        return list(logits[0].split([len(sample["tokens"]) for sample in samples]))
    return at_tokens(logits, samples)


def theirs_on(model: Any, samples: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Transformers' logits of each sample's tokens."""
    model.model.rope_deltas = None
    inputs = on_device(reference_inputs(samples))
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return at_tokens(model(**inputs).logits.float(), samples)


def at_tokens(logits: torch.Tensor, samples: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The logits of each sample's tokens, without padding."""
    return [row[: len(s["tokens"])] for row, s in zip(logits, samples, strict=True)]


def on_device(batch: Any) -> Any:
    """Tensors of a batch, nested, on the GPU."""
    types = (torch.Tensor, Segments)
    return tree_map_only(types, lambda x: x.to(DEVICE, non_blocking=True), batch)


@torch.no_grad()
def farthest(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest difference of an entry."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def distance(ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The distance of tensors from exact ones, relative to the length of these."""
    pairs = [*zip(ours, exact, strict=True)]
    squares = sum(float((a.float() - b.float()).pow(2).sum()) for a, b in pairs)
    length = sum(float(b.float().pow(2).sum()) for _, b in pairs)
    return (squares / (length or 1.0)) ** 0.5


def published(gradients: Mapping[str, Any]) -> dict[str, Any]:
    """Transformers' tensors by published names."""
    return {flat_name(name): gradient for name, gradient in gradients.items()}


def gradients(
    model: Any,
    by_flat_names: Callable[[dict[str, Any]], Mapping[str, Any]],
    samples: list[dict[str, Any]],
    logits_of: Callable[..., list[torch.Tensor]],
) -> list[torch.Tensor]:
    """Gradients of all parameters in the order of their names, of a sum of all logits."""
    model.zero_grad()
    logits = torch.cat(logits_of(model, samples)).float()
    generator = torch.Generator().manual_seed(1)
    (logits * torch.randn(logits.shape, generator=generator).to(DEVICE)).sum().backward()
    found = by_flat_names({name: p.grad.clone() for name, p in model.named_parameters()})
    return [found[name] for name in sorted(found)]


class Tokenizer:
    """Nothing ends an answer, and nobody reads it."""

    stop_tokens = ()

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """No bytes."""
        return b""


def differing_answers(ours: Any, reference: Any, samples: list[dict[str, Any]]) -> int:
    """How many greedy answers are not those of transformers."""
    rules = Rules(12)
    prompts = [{k: s[k] for k in s if k != "labels"} for s in samples]
    answered = decode(ours, Tokenizer(), enumerate(prompts), rules, len(prompts))
    own = {number: answer.tokens for number, _, answer in answered}
    differing = 0
    for number, sample in enumerate(samples):
        inputs = on_device(reference_inputs([sample]))
        reference.model.rope_deltas = None
        ids = reference.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=0)
        differing += ids[0, len(sample["tokens"]) :].tolist() != own[number]
    return differing


def differing_captured(model: Any, samples: list[dict[str, Any]]) -> int:
    """How many answers change when steps are captured as CUDA graphs."""
    prompts = [{k: s[k] for k in s if k != "labels"} for s in samples]
    tokens = []
    for captures in (True, False):
        model.requires_grad_(not captures)
        answered = decode(model, Tokenizer(), enumerate(prompts), Rules(24), len(prompts))
        tokens.append({number: answer.tokens for number, _, answer in answered})
    return sum(tokens[0][number] != tokens[1][number] for number in tokens[0])


def resuming(job: Job) -> Iterator[Row]:
    """Train a tiny model for six steps by the recipe, go on from the third, and compare losses."""
    root = Path(mkdtemp())
    write_tiny_checkpoint(root / "base", vocabulary(), SEED)
    write_data(root, 24, (64, 200), 12)
    settings = {
        "output_dir": str(root / "run"),
        "checkpoint_dir": str(root / "base"),
        "dataset": dataset_of(root),
        "rows.max_tokens": 1024,
        "rows.max_patches": None,
        "rows_per_step": 2,
        "max_steps": 6,
        "save_every_n_steps": 3,
        "keep_last": 9,
        "num_workers": 2,
        "compile": False,
        "device": DEVICE.type,
    }
    whole = losses_of(settings, root)
    for made_later in ("steps/step_6", "epoch_*"):
        for path in (root / "run").glob(made_later):
            shutil.rmtree(path)
    resumed = losses_of({**settings, "resume": True}, root)
    found = [abs(a - b) / (abs(a) or 1.0) for a, b in zip(whole[3:], resumed[3:], strict=False)]
    yield checked("losses after resuming, relative", max(found, default=math.inf), 1e-3)
    yield checked("steps that were not taken", 12 - len(whole) - len(resumed), 0)


def losses_of(settings: Mapping[str, Any], root: Path) -> list[float]:
    """Run the recipe to its end, and return the losses of all steps."""
    recipe = finetune.FinetuneRecipe(read_settings("full", settings, root))
    recipe.setup()
    with mock.patch.object(recipe.metrics, "show"):  # it draws
        recipe.train()
    recipe.cleanup()
    return recipe.metrics.history["losses"]


# Inputs


def read_settings(config: str, settings: Mapping[str, Any], root: Path) -> Any:
    """A config of ours, with what differs from it."""
    content = OmegaConf.load(config_path(f"qwen2_5_vl/{config}"))
    for key, value in settings.items():
        OmegaConf.update(content, key, value, merge=not isinstance(value, dict))
    path = root / "config.yaml"
    OmegaConf.save(content, path)
    return read_config(["--config", str(path)])


def dataset_of(root: Path) -> dict[str, str]:
    """The dataset of a config."""
    component = "benchmarks.gpu_parts.conversations"
    return {"_component_": component, "data_files": str(root / "train.jsonl")}


def conversations(tokenizer: Any, data_files: str) -> Any:
    """`vision_chat_dataset` of JSON Lines, which are found without the package `datasets`."""

    def records(*_: Any, **__: Any) -> tuple[Any, list[str]]:
        own = JsonRecords([data_files])
        return ConcatDataset([Subset(own, range(len(own)))]), [data_files]

    with mock.patch.object(_conversations, "load_records", records):
        return vision_chat_dataset(tokenizer, source="json", data_files=data_files)


def vocabulary() -> Path:
    """The directory of the tokenizer's files."""
    found = [path for path in VOCABULARIES if (path / "vocab.json").exists()]
    if not found:
        raise FileNotFoundError("there is no vocabulary: run `make gpu-wheels` with a network")
    return found[0]


def inputs(size: str) -> Path:
    """Directory with ``train.jsonl``, and ``base``, a checkpoint without weights."""
    root = INPUTS / size
    if (root / "base" / "config.json").exists():
        return root
    base = root / "base"
    base.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(vocabulary() / name, base / name)
    write_data(root, SAMPLES, (FULL_HD[0],) * 2, QUESTION_WORDS)
    for name, content in {
        "preprocessor_config.json": PREPROCESSOR_CONFIG,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "config.json": MODELS[size],
    }.items():
        (base / name).write_text(json.dumps(content), encoding="utf-8")
    return root


def write_data(root: Path, samples: int, widths: tuple[int, int], question_words: int) -> None:
    """Write conversations, and JPEGs that they are about, to ``root``."""
    random = np.random.default_rng(SEED)
    words = "\n".join(topics.values()).split()
    photographs = []
    for number in range(PHOTOGRAPHS):
        width = int(random.integers(widths[0], widths[1] + 1))
        path = (root / f"{number}.jpg").absolute()
        photograph(random, width, width * FULL_HD[1] // FULL_HD[0]).save(path, quality=85)
        photographs.append(str(path))

    def text(middle: int, most: int) -> str:
        count = int(np.clip(random.lognormal(np.log(middle), 0.9), 1, most))
        start = int(random.integers(len(words) - count))
        return " ".join(words[start : start + count])

    lines = []
    for _ in range(samples):
        count = random.choice(3, p=IMAGE_COUNTS)
        content = [
            {"type": "image", "image": str(random.choice(photographs))} for _ in range(count)
        ]
        content.append({"type": "text", "text": text(question_words, 1200)})
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": text(ANSWER_WORDS, 200)},
        ]
        lines.append(json.dumps({"messages": turns}))
    (root / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def photograph(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """A picture of large shapes with fine detail: its JPEG is about as large as a photograph's."""
    shapes = Image.fromarray(random.integers(0, 256, (12, 20, 3), np.uint8))
    pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    detail = random.integers(-12, 13, (height, width, 1), np.int16)
    return Image.fromarray(np.clip(pixels + detail, 0, 255).astype(np.uint8))


# Training


class NoCheckpoint:
    """A checkpointer without weights: they are made on the device."""

    def __init__(self, checkpoint_dir: str, output_dir: str) -> None:
        pass

    def load_checkpoint(self) -> dict[str, Any]:
        """Nothing."""
        return {tune.MODEL_KEY: {}}


class RandomWeights(dict[str, torch.Tensor]):
    """Weights of a model on the meta device, each made on the GPU when it is asked for."""

    def __init__(self, model: Any, given: Mapping[str, torch.Tensor]) -> None:
        super().__init__(given)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}

    def __missing__(self, name: str) -> torch.Tensor:
        is_norm = "norm" in name
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.full(shape, float(is_norm), device=DEVICE)
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * 0.02


def start_recipe(config: Any) -> Any:
    """Set the recipe up, with random weights."""

    def load(model: Any, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
        load_weights_into(model, RandomWeights(model, weights), device)

    with mock.patch.object(finetune, "load_weights_into", load):
        recipe = finetune.FinetuneRecipe(config)
        recipe.setup()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # there is no run to save
    return recipe


def config_of(size: str, config: str, overrides: Mapping[str, Any]) -> Any:
    """The config of a run without an end on the benchmark's data."""
    root = inputs(size).absolute()
    settings = {
        "output_dir": mkdtemp(),
        "checkpoint_dir": str(root / "base"),
        "checkpointer._component_": "benchmarks.gpu_parts.NoCheckpoint",
        "dataset": dataset_of(root),
        "max_steps": 100_000,
        "shuffle": False,
        "rows_per_step": 1,
        "num_workers": WORKERS,
        **overrides,
    }
    return read_settings(config, settings, Path(settings["output_dir"]))


def training(
    job: Job, size: str, config: str, overrides: Mapping[str, Any], is_profiled: bool = False
) -> Iterator[Row]:
    """Train by the recipe, its data workers included, and then look into steps, perhaps."""
    settings = config_of(size, config, overrides)
    estimate = estimate_memory(settings)
    total = torch.cuda.get_device_properties(0).total_memory
    computed = sum(estimate.values())
    if computed > 1.3 * total:  # what is compiled takes less than computed, but not so much
        reason = f"{computed / 1e9:.0f} GB computed: not tried in {total / 1e9:.0f}"
        yield {"what": "left out", "reason": reason, "estimate": estimate}
        return
    recipe = start_recipe(settings)
    with recipe._load(recipe.rows) as loader:
        begun = time.perf_counter()
        for _ in range(WARM_UP):
            recipe._train_step(loader)
        torch.cuda.synchronize()
        warm_up = time.perf_counter() - begun
        torch.cuda.reset_peak_memory_stats()
        yield {**steps_of(recipe, loader, job), "estimate": estimate, "warm_up_seconds": warm_up}
        if is_profiled and job.has_time():
            yield profile_of(recipe, loader)


def steps_of(recipe: Any, loader: Iterator[Any], job: Job) -> Row:
    """Time steps, from one loss that came to the host to the next."""
    recipe.metrics.begin()
    taken = len(samples_taken(recipe))
    rates: list[float] = []
    start = last = time.perf_counter()
    tokens = 0
    while len(rates) < STEPS and (job.has_time() or not rates):
        recipe._train_step(loader)
        now = time.perf_counter()
        rates.append((recipe.metrics.tokens - tokens) / (now - last))
        last, tokens = now, recipe.metrics.tokens
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = peak_flops(torch.cuda.get_device_name())
    return {
        "what": "training",
        "tokens_per_second": rates,
        "mfu": recipe.metrics.operations / seconds / peak if peak else None,
        "waiting": recipe.metrics.waited / seconds,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "losses": recipe.metrics.losses,
        "samples": samples_taken(recipe)[taken:],
    }


def samples_taken(recipe: Any) -> list[list[int]]:
    """The samples of each row so far."""
    log = recipe.output_dir / "samples" / "process_0.jsonl"
    return [json.loads(line)["samples"] for line in log.read_text().splitlines()]


def profile_of(recipe: Any, loader: Iterator[Any]) -> Row:
    """Count what the host waits for in steps, and the kernels that take longest."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(PROFILED_STEPS):
            recipe._train_step(loader)
        torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{Path(w.filename).name}:{w.lineno}"
        for w in warned
        if "called a synchronizing" in str(w.message)
    ]
    with torch.profiler.profile() as profiled, torch.profiler.record_function("steps"):
        for _ in range(PROFILED_STEPS):
            recipe._train_step(loader)
    # The end of the profile waits, too
    events = list(profiled.events() or [])
    (steps,) = (e.time_range for e in events if e.name == "steps" and e.device_type == CPU)
    names = [e.name for e in events if steps.start <= e.time_range.start <= steps.end]
    # Operators have the time of the kernels that they launch, and are no kernels themselves
    kernels = [e for e in profiled.key_averages() if e.device_type != CPU and e.key != "steps"]
    kernels.sort(key=lambda e: e.self_device_time_total, reverse=True)
    total = sum(e.self_device_time_total for e in kernels) or 1.0
    return {
        "what": "profile",
        "steps": PROFILED_STEPS,
        "waits": sum(name in WAITS for name in names),
        "copies_to_host": sum(name.startswith("Memcpy DtoH") for name in names),
        "synchronising": len(places),
        "places": Counter(places),
        "kernels": [
            {"name": e.key[:70], "share": e.self_device_time_total / total, "calls": e.count}
            for e in kernels[:KERNELS]
        ],
    }


def peer(job: Job, size: str, dtype: str, like: str) -> Iterator[Row]:
    """Train transformers' model in a plain loop on the samples of another part's rows, padded.

    With float32 weights it computes in bfloat16 by autocast, as our configs do.
    """
    root = inputs(size)
    rows = read(job.output).get(like, {}).get("rows", [])
    found = [row["samples"] for row in rows if "samples" in row]
    steps = found[0] if found else [[*range(i, i + 5)] for i in range(0, 5 * STEPS, 5)]
    transform = transform_from_pretrained(root / "base", max_seq_len=MAX_TOKENS)
    dataset = conversations(transform, str(root / "train.jsonl"))
    attention = "flash_attention_2" if find_spec("flash_attn") else "sdpa"
    config = Qwen2_5_VLConfig.from_pretrained(root / "base")
    with DEVICE:
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=DTYPES[dtype], attn_implementation=attention
        ).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    casting: AbstractContextManager[Any] = nullcontext()
    if dtype == "fp32":
        casting = torch.autocast(DEVICE.type, torch.bfloat16)
    batches = [peer_batches([dataset[i] for i in row]) for row in steps]
    rates: list[float] = []
    for number, row in enumerate([*batches[:PEERS_WARM_UP], *batches]):
        if number > PEERS_WARM_UP and not job.has_time():
            break
        start = time.perf_counter()
        peer_step(model, optimizer, row, casting)
        seconds = time.perf_counter() - start
        if number == PEERS_WARM_UP - 1:
            torch.cuda.reset_peak_memory_stats()
        elif number >= PEERS_WARM_UP:
            rates.append(sum(int(b["attention_mask"].sum()) for b in row) / seconds)
    yield {
        "what": "training",
        "tokens_per_second": rates,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "attention": attention,
    }


def peer_batches(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Arguments of transformers' forward, padded to the longest of each few samples."""
    return [peer_batch(samples[i : i + PEERS_BATCH]) for i in range(0, len(samples), PEERS_BATCH)]


def peer_batch(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Arguments for some samples."""
    ids, labels = (
        pad_sequence([torch.tensor(s[key]) for s in samples], True, padding)
        for key, padding in (("tokens", 0), ("labels", IGNORED))
    )
    lengths = torch.tensor([len(s["tokens"]) for s in samples])
    batch = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "mm_token_type_ids": (ids == CONFIG["image_token_id"]).int(),
    }
    vision = [s["encoder_input"]["vision"] for s in samples if "encoder_input" in s]
    if vision:
        batch["pixel_values"] = torch.cat([v["patches"] for v in vision])
        batch["image_grid_thw"] = torch.cat([v["grid_thw"] for v in vision])
    return batch


def peer_step(
    model: Any,
    optimizer: Any,
    batches: Sequence[dict[str, torch.Tensor]],
    casting: AbstractContextManager[Any],
) -> float:
    """Take an optimizer step, and return the loss."""
    targets = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    total = torch.zeros((), device=DEVICE)
    for batch in batches:
        given = on_device(batch)
        with casting:
            loss = model(**given, num_items_in_batch=targets, use_cache=False).loss
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


def loading(job: Job) -> Iterator[Row]:
    """Take rows from the recipe's data workers, and train on none."""
    recipe = start_recipe(config_of("3B", "lora", {"compile": False}))
    tokens, start = 0, 0.0
    with recipe._load(recipe.rows) as loader:
        for number, row in enumerate(loader):
            if number == 2 * WORKERS:  # as many as are made beforehand
                start, tokens = time.perf_counter(), 0
            tokens += sum(size.tokens for size in row.sizes)
            if number >= 6 * WORKERS or not job.has_time():
                break
    seconds = time.perf_counter() - start
    yield {"what": "loading", "tokens_per_second": tokens / seconds, "workers": WORKERS}


# Losses


def losses(job: Job) -> Iterator[Row]:
    """Time the output layer's loss and its gradients: ours, torch's and Liger's."""
    options: dict[str, Any] = {"dtype": DTYPES["bf16"], "device": DEVICE}
    width, entries = _3B["hidden_size"], _3B["vocab_size"]
    hidden = torch.randn(MAX_TOKENS, width, **options).requires_grad_()
    weight = torch.randn(entries, width, **options).mul_(width**-0.5).requires_grad_()
    targets = torch.randint(entries, (MAX_TOKENS,), device=DEVICE)

    def ours() -> torch.Tensor:
        return chunked_cross_entropy(hidden, lambda x: F.linear(x, weight), targets).sum()

    def of_torch() -> torch.Tensor:
        chunked = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=chunked)

    def of_liger() -> torch.Tensor:
        liger = import_module("liger_kernel.transformers")
        loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)
        return cast(torch.Tensor, loss)

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": ours,
        "torch, `F.linear_cross_entropy`": of_torch,
        "Liger": of_liger,
    }
    for way, loss in ways.items():
        row: Row = {"what": "loss", "way": way}
        try:
            row["times"] = [seconds_of(loss, [hidden, weight]) for _ in range(1 + LOSS_RUNS)][1:]
            row["allocated"] = torch.cuda.max_memory_allocated()
        except (ImportError, AttributeError, RuntimeError, ValueError) as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        yield row


def seconds_of(loss: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor]) -> float:
    """Seconds of a loss and its gradients, from whose memory the peak is counted."""
    for x in inputs:
        x.grad = None
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    loss().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start


# Decoding


def decoding(job: Job) -> Iterator[Row]:
    """Time steps of decoding by 3B, beside transformers' where it has the same weights."""
    root = inputs("3B")
    names = family_of(root / "base").names
    config = Qwen2_5_VLConfig.from_pretrained(root / "base")
    config._attn_implementation = "sdpa"
    with DEVICE:
        reference = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    reference.eval().requires_grad_(False)
    weights = names.from_published(published(reference.state_dict()))
    for kind in ("bfloat16", NOT_CAPTURED, "int8", "int4"):
        for batch in (1, 8):
            row: Row = {"what": "decoding", "weights": kind, "batch": batch}
            beside = reference if kind in ("bfloat16", NOT_CAPTURED) else None
            try:
                model = answering_model(root / "base", weights, kind)
                row |= decoding_times(model, beside, batch)
            except (RuntimeError, ValueError) as error:  # not all kernels are on all devices
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            yield row
            gc.collect()
            torch.cuda.empty_cache()


def answering_model(base: Path, weights: Mapping[str, torch.Tensor], kind: str) -> Any:
    """Our model with these weights, quantized perhaps, or as in training."""
    with torch.device("meta"):
        model = model_from_pretrained(base, weights=False)
    own = {name: weights[name] for name, _ in model.named_parameters()}
    model.load_state_dict(own, assign=True)
    if kind in ("int8", "int4"):
        quantize_layers(model.decoder.layers, kind)
    return model.eval().requires_grad_(kind == NOT_CAPTURED)


@torch.no_grad()
def decoding_times(model: Any, reference: Any, batch: int) -> Row:
    """Seconds of a step of both sides, in turns."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, 1000, (batch, PROMPT_TOKENS), generator=generator)
    own: list[float] = []
    theirs: list[float] = []
    for _ in range(DECODING_RUNS):
        own.append(own_step(model, ids.tolist()))
        if reference is not None:
            theirs.append(their_step(reference, ids.to(DEVICE)))
    return {"step": own, "theirs": theirs}


def own_step(model: Any, prompts: list[list[int]]) -> float:
    """Seconds of a step of ours, each of which ends as its tokens come to the host."""
    position = torch.arange(PROMPT_TOKENS)[:, None].expand(-1, 3)
    asked = [(i, {"tokens": ids, "input_pos": position}) for i, ids in enumerate(prompts)]
    decoding = Decoding(model, Tokenizer(), Rules(NEW_TOKENS), len(prompts))
    decoding.read(asked)
    decoding.write_first_tokens()
    for _ in range(DECODING_WARM_UP):
        decoding.step()
    start = time.perf_counter()
    for _ in range(DECODING_STEPS):
        decoding.step()
    return (time.perf_counter() - start) / DECODING_STEPS


def their_step(model: Any, ids: torch.Tensor) -> float:
    """Seconds of a step of transformers, which waits in each for whether all have ended."""
    times: list[float] = []

    def look(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        times.append(time.perf_counter())
        return scores

    count = 1 + DECODING_WARM_UP + DECODING_STEPS
    model.model.rope_deltas = None
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        pad_token_id=CONFIG["bos_token_id"],
        logits_processor=[look],
    )
    return (times[-1] - times[DECODING_WARM_UP]) / (len(times) - 1 - DECODING_WARM_UP)


if __name__ == "__main__":
    main()
