"""Speed and memory of training steps, ours beside a plain loop over transformers' model.

Run as ``python -m benchmarks.training`` (Linux; about a quarter of an hour on two cores). It prints
Markdown. Both sides train the same random model of 100 M parameters, which has the proportions of
the 3B but for the vocabulary, on the same samples in each step: short questions and answers about
no, one or two images. Ours is the step of the recipe, once with packed rows and once with padded
batches; theirs pads the same batches to the longest and lets the model compute the loss. Model and
optimizer are timed alone, and together with what makes batches of files. The arithmetic of either
side, by the counter of the recipe's MFU, is what the ratio of times comes to if both are as fast at
it. Memory is that of fresh processes. Other families have models of about that size too; the
experts of transformers' are computed by whichever of its implementations is faster. Of a GPU see
`benchmarks.gpu`.
"""

import argparse
import json
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import Subset

from benchmarks.data_path import jpeg, prose, spread, write_checkpoint

# transformers comes after what makes torchvision known to it
# isort: split
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.encoder import peak_memory
from benchmarks.models import SMALL, take_fastest_experts, with_dimensions
from torchtune_vl.data import PackedRows, PaddedRows, Plan, Row, TrainingRows
from torchtune_vl.data._packing import Planner
from torchtune_vl.datasets import measure_all
from torchtune_vl.models._registry import family_of
from torchtune_vl.recipes import config_path
from torchtune_vl.recipes._check_config import read_config
from torchtune_vl.recipes.finetune import FinetuneRecipe

BATCH_SIZE, STEP_SIZE = 8, 8  # samples of a padded batch, and of an optimizer step
MAX_TOKENS = 2560  # of a packed row: as many as a padded batch has without its padding
MAX_NORM = 1.0  # of the recipe's config too
MOST_STEPS = 1000  # more than are taken; all epochs of so many are planned
IMAGE_COUNTS = (0.25, 0.6, 0.15)  # probabilities of none, one and two
IGNORED = -100
ASSISTANT_HEADER = 3  # tokens from the last <|im_start|> on: itself, "assistant" and "\n"
# Widths and ratios of images, px, and words of questions: lengths spread as in
# `benchmarks/packing.py`, at a tenth of the size, so that the peer's logits fit 24 GB
CPU_MIX = ((72, 614), (0.5, 1.5), 24)
CPU_SETTINGS: dict[str, Any] = {
    "rows": {"_component_": "torchtune_vl.data.PackedRows", "max_tokens": MAX_TOKENS},
    "num_workers": 0,
    "device": "cpu",
    "dtype": "fp32",
    "compute_dtype": None,
    "compile": False,
    "activation_checkpointing": "none",
}
PLANNERS: dict[str, Any] = {"packed": PackedRows(MAX_TOKENS), "padded": PaddedRows(BATCH_SIZE)}


class Mix(NamedTuple):
    """Conversations to make up.

    Args:
        samples: how many.
        widths: least and most of an image, px.
        ratios: least and most of height / width.
        question_words: of the middle question.
    """

    samples: int
    widths: tuple[int, int]
    ratios: tuple[float, float]
    question_words: int


# What differs from the tiny models of the quickstart, by family
CPU_MODELS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "hidden_size": 384,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 6,
            "hidden_size": 320,
            "intermediate_size": 856,
            "num_heads": 4,
            "fullatt_block_indexes": [5],
            "out_hidden_size": 384,
        },
    },
    "qwen3_vl": {  # proportions of the 2B
        "text_config": {
            "hidden_size": 384,
            "intermediate_size": 1152,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rope_scaling": {"mrope_section": [24, 20, 20]},
        },
        "vision_config": {
            "depth": 6,
            "hidden_size": 320,
            "intermediate_size": 1280,
            "num_heads": 5,
            "deepstack_visual_indexes": [1, 2, 4],
            "out_hidden_size": 384,
        },
    },
}
# Proportions of the 30B, with a quarter of its experts, which are a third of the width
_EXPERTS = {"num_experts": 32, "moe_intermediate_size": 144, "num_key_value_heads": 1}
CPU_MODELS["qwen3_vl_moe"] = with_dimensions(CPU_MODELS["qwen3_vl"], {"text_config": _EXPERTS})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=8, help="paired steps, each of other samples")
    parser.add_argument("--family", choices=CPU_MODELS, default=next(iter(CPU_MODELS)))
    arguments = parser.parse_args()
    if arguments.runs < 2:
        parser.error("--runs must be at least 2: quartiles are printed")

    with TemporaryDirectory() as temporary:
        print_cpu(Path(temporary), arguments.family, arguments.runs)


def print_cpu(root: Path, family: str, runs: int) -> None:
    """Print the comparison on a CPU."""
    write_model(root, family)
    write_data(root, Mix((runs + 1) * STEP_SIZE, *CPU_MIX))
    ours, theirs = ours_on_cpu(root), theirs_on_cpu(root)
    assert ours.recipe.compute_dtype == theirs.model.dtype
    print_inputs(ours, runs)
    arithmetic = [
        operations(ours, range(i * STEP_SIZE, (i + 1) * STEP_SIZE)) for i in range(1, runs + 1)
    ]
    alone, whole = paired_times({**packed_and_padded(ours), **padded_by_processor(theirs)}, runs)
    print("| rows | supervised tokens per second, ours / transformers | aim | ", end="")
    print("with making batches | arithmetic, transformers / ours |\n|---|---|---|---|---|")
    for name, aim in (("packed", ">= 4"), ("padded", ">= 2")):
        faster, faster_whole = (
            spread([b / a for a, b in zip(times[name], times["theirs"], strict=True)])
            for times in (alone, whole)
        )
        more = spread([counts["theirs"] / counts[name] for counts in arithmetic])
        print(f"| {name} | {faster} | {aim} | {faster_whole} | {more} |", flush=True)

    held = 3 * sum(p.nbytes for p in theirs.model.parameters())  # weights and AdamW's two states
    ours.recipe.cleanup()
    del ours, theirs
    memory = {name: apart(step_memory, root, name) for name in alone}
    print("\n| rows | memory of a step, ours / transformers | ", end="")
    print("with weights and optimizer | aim |\n|---|---|---|---|")
    for name, aim in (("packed", "<= 0.5"), ("padded", "")):
        of_step = memory[name] / memory["theirs"]
        of_all = (memory[name] + held) / (memory["theirs"] + held)
        print(f"| {name} | {of_step:.2f} | {of_all:.2f} | {aim} |")


def print_inputs(ours: "Ours", runs: int) -> None:
    """Print what is trained, and on what."""
    samples = range(STEP_SIZE, (runs + 1) * STEP_SIZE)
    rows = ours.rows(PLANNERS["padded"], samples)
    tokens, patches, _ = map(sum, zip(*(size for row in rows for size in row.sizes), strict=True))
    targets = sum(len(row.batch["targets"]) for row in rows)
    room = sum(row.batch["tokens"].numel() for row in rows)
    parameters = sum(p.numel() for p in ours.recipe.model.parameters())
    print(
        f"{parameters / 1e6:.0f} M parameters, {ours.recipe.compute_dtype}, "
        f"{torch.get_num_threads()} threads, "
        f"{runs} paired steps of {STEP_SIZE} samples: median (quartiles). A sample has "
        f"{tokens / len(samples):.0f} tokens, {patches / 4 / tokens:.0%} of images, "
        f"{targets / tokens:.0%} supervised; batches of {BATCH_SIZE} are {1 - tokens / room:.0%} "
        f"padding, packed rows have up to {MAX_TOKENS} tokens\n"
    )


def operations(ours: "Ours", samples: Sequence[int]) -> dict[str, int]:
    """Count the operations that each side does for a step, by name.

    They are fewer than transformers does: of a padded batch it multiplies all queries by all keys.
    """
    counts = Counter[str]()
    for row in ours.rows(PLANNERS["padded"], samples):
        tokens, _, targets = map(list, zip(*row.sizes, strict=True))
        padded = [row.batch["tokens"].shape[1]] * len(tokens)
        media = row.batch.get("encoder_input", {}).get("vision")
        for name, (documents, with_logits) in {
            "packed": (tokens, sum(targets)),
            "padded": (padded, sum(targets)),
            "theirs": (padded, sum(padded)),
        }.items():
            counts[name] += ours.recipe.flops.step(documents, media, with_logits)
    return counts


class Side(NamedTuple):
    """A way to train.

    Args:
        make: batches of a step, from the numbers of its samples.
        step: trains on them, and returns the loss.
    """

    make: Callable[[Sequence[int]], Any]
    step: Callable[[Any], torch.Tensor]


def paired_times(
    sides: dict[str, Side], runs: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return seconds of each side's steps, alone and with making their batches, taken in turns.

    Before that, all take one step from the same weights, whose losses have to be equal.
    """
    first, *steps = [range(i * STEP_SIZE, (i + 1) * STEP_SIZE) for i in range(runs + 1)]
    # The two sides that share a model do so, since the first learning rate is 0
    losses = [side.step(side.make(first)).item() for side in sides.values()]
    assert max(losses) - min(losses) < 1e-4 * min(losses), losses

    alone: dict[str, list[float]] = {name: [] for name in sides}
    whole: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for samples in steps:
        for name in names:
            start = time.perf_counter()
            batches = sides[name].make(samples)
            made = time.perf_counter()
            sides[name].step(batches)
            end = time.perf_counter()
            alone[name].append(end - made)
            whole[name].append(end - start)
        names.reverse()
    return alone, whole


def step_memory(root: Path, name: str) -> int:
    """Return the bytes that a step adds at its peak to weights, optimizer and batches."""
    if name == "theirs":
        side = padded_by_processor(theirs_on_cpu(root))[name]
    else:
        side = packed_and_padded(ours_on_cpu(root))[name]
    batches = side.make(range(STEP_SIZE))
    side.step(batches)  # makes the optimizer's states
    return peak_memory(lambda: side.step(batches))


def apart(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function does in a process of its own, which starts afresh."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def ours_on_cpu(root: Path) -> "Ours":
    """Our side, computed as transformers' is."""
    return Ours(root, CPU_SETTINGS)


def packed_and_padded(ours: "Ours") -> dict[str, Side]:
    """Both kinds of rows, for one model."""
    return {
        name: Side(partial(ours.rows, planner), ours.step) for name, planner in PLANNERS.items()
    }


def theirs_on_cpu(root: Path) -> "Theirs":
    """Their side."""
    theirs = Theirs(root, BATCH_SIZE, "sdpa", "cpu")
    take_fastest_experts(theirs.model, partial(theirs.backward, theirs.batches(range(STEP_SIZE))))
    theirs.optimizer.zero_grad()
    return theirs


def padded_by_processor(theirs: "Theirs") -> dict[str, Side]:
    """Their batches."""
    return {"theirs": Side(theirs.batches, theirs.step)}


class Ours:
    """The recipe.

    Args:
        root: as :func:`write_model` and :func:`write_data` left it.
        settings: what differs from the config.
    """

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        config = OmegaConf.load(config_path(f"{family_of(root / 'base').package}/full"))
        for key, value in {
            "output_dir": mkdtemp(dir=root),
            "checkpoint_dir": str(root / "base"),
            "dataset.data_files": str(root / "train.jsonl"),
            "max_steps": MOST_STEPS,
            "shuffle": False,
            **settings,
        }.items():
            OmegaConf.update(config, key, value, merge=not isinstance(value, dict))
        path = Path(config.output_dir).with_suffix(".yaml")
        OmegaConf.save(config, path)
        self.recipe = FinetuneRecipe(read_config(["--config", str(path)]))
        self.recipe.setup()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # there is no run to save

    def rows(self, planner: Planner, samples: Sequence[int]) -> list[Row]:
        """Make the rows of these samples, which will be one step."""
        chosen = Subset(self.recipe.rows.dataset, samples)
        with TemporaryDirectory() as directory:
            sizes = measure_all(self.recipe.rows.dataset, samples, show_progress=False)
            plan = Plan.make(
                Path(directory), planner, sizes, rows_per_step=1, shuffle=False, epochs=1
            )
            rows = list(TrainingRows(chosen, planner, plan))
            has_media = plan.has_media(plan.last_step)
        return [row._replace(step_has_media=has_media) for row in rows]

    def step(self, rows: list[Row]) -> torch.Tensor:
        """Take an optimizer step, and return the loss."""
        self.recipe.cfg.rows_per_step = len(rows)
        self.recipe._train_step(iter(rows))
        return torch.tensor(self.recipe.metrics.losses[-1])


class Theirs:
    """A plain loop over transformers' model.

    Args:
        root: as :func:`write_model` and :func:`write_data` left it.
        batch_size: samples of a batch; a step accumulates the gradients of several.
        attention: of transformers.
        device: where to train.
    """

    def __init__(self, root: Path, batch_size: int, attention: str, device: str) -> None:
        self.batch_size = batch_size
        self.device = device
        self.data = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
        self.processor = AutoProcessor.from_pretrained(root / "base")
        self.processor.tokenizer.padding_side = "right"
        self.model = AutoModelForImageTextToText.from_pretrained(
            root / "base", attn_implementation=attention, dtype="auto", device_map=device
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def batches(self, samples: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Make the batches of a step, with labels of the answers."""
        return [
            self.batch([self.data[index]["messages"] for index in samples[i : i + self.batch_size]])
            for i in range(0, len(samples), self.batch_size)
        ]

    def batch(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """Make a batch, padded to the longest."""
        items = chain.from_iterable(messages[0]["content"] for messages in conversations)
        images = [Image.open(item["image"]) for item in items if item["type"] == "image"]
        inputs = self.processor(
            text=[self.processor.apply_chat_template(messages) for messages in conversations],
            images=images or None,
            padding=True,
            return_tensors="pt",
        )
        ids = inputs["input_ids"]
        is_start = ids == self.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
        turns_begun = is_start.cumsum(1)
        is_answer = (turns_begun == turns_begun[:, -1:]).cumsum(1) > ASSISTANT_HEADER
        # The template puts a line break behind the token that ends a turn
        precedes_break = torch.arange(ids.shape[1]) < inputs["attention_mask"].sum(1)[:, None] - 1
        return {**inputs, "labels": ids.where(is_answer & precedes_break, IGNORED)}

    def step(self, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Take an optimizer step, and return the loss."""
        loss = self.backward(batches)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def backward(self, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Accumulate the gradients of batches, and return the loss."""
        targets = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            inputs = {name: x.to(self.device) for name, x in batch.items()}
            loss = self.model(**inputs, num_items_in_batch=targets, use_cache=False).loss
            loss.backward()
            total += loss.detach()
        return total


def write_model(root: Path, family: str) -> None:
    """Write random weights as published ones are, to ``root / "base"``."""
    write_checkpoint(root / "base", with_dimensions(SMALL[family], CPU_MODELS[family]))


def write_data(root: Path, mix: Mix) -> None:
    """Write conversations, and the images that they are about, to ``root``."""
    random = np.random.default_rng(0)
    words = prose().split()

    def text(middle: int, most: int) -> str:
        count = int(np.clip(random.lognormal(np.log(middle), 0.9), 1, most))
        start = int(random.integers(len(words) - count))
        return " ".join(words[start : start + count])

    lines = []
    for number in range(mix.samples):
        content = []
        for place in range(random.choice(3, p=IMAGE_COUNTS)):
            path = root / f"{number}_{place}.jpg"
            width = int(random.uniform(*mix.widths))
            height = int(np.clip(width * random.uniform(*mix.ratios), 56, mix.widths[1]))
            path.write_bytes(jpeg(width, height))
            content.append({"type": "image", "image": str(path)})
        content.append({"type": "text", "text": text(mix.question_words, 2000)})
        answer = [{"type": "text", "text": text(8, 60)}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    (root / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
