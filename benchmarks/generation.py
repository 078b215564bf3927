"""Speed of generation, on a CPU ours beside transformers' ``generate``.

Run as ``python -m benchmarks.generation`` (forty minutes on one core). It prints Markdown. With
``--device cuda`` it times steps there instead, captured ones beside those that are not. Both
sides answer the same prompts by the same random model, greedily, and have to give the same tokens.
The floor of steps is their matrix products alone, with their weights, batch and library. Layers
have the size of the published model of 3B parameters, of other families 2B and 30B, for in smaller
ones all that is no matrix product has a larger part. The experts of transformers' are computed by
whichever of its implementations is faster for the case.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from benchmarks.checkpoint import anonymous_memory, peak_memory
from benchmarks.data_path import paired_times, spread
from benchmarks.models import SMALL, take_fastest_experts, with_dimensions
from torchtune_vl.generation import Decoding, Rules, decode, load_model
from torchtune_vl.media import Geometry
from torchtune_vl.models._registry import family_of
from torchtune_vl.modules.adapters import num_bytes
from torchtune_vl.modules.experts import MixtureOfExperts
from torchtune_vl.modules.layout import mrope_positions, vision_index
from torchtune_vl.modules.linear import linear
from torchtune_vl.modules.quantized import Quantized

# Behind the first token, which reads the prompt, and steps in which the cache grows
STEPS, WARM_UP = 32, 3
NEW_TOKENS = 1 + WARM_UP + STEPS
# Prompts, and tokens of the shortest; each next one is nine tokens longer
CASES = ((1, 40), (1, 600), (8, 40), (8, 600))
# Of the run with answers of unequal lengths
PROMPTS, SHORTEST, LONGEST, PEERS_BATCH = 64, 4, 256, 8
IMAGES = (1, 24, 24)
MEDIA_TOKENS = {
    "vision_start_token_id": 15_002,
    "vision_end_token_id": 15_003,
    "image_token_id": 15_004,
    "video_token_id": 15_005,
}
# Of all families alike: about a twelfth of the layers, and as much of the vocabulary
_TEXT = {
    "hidden_size": 2048,
    "num_hidden_layers": 3,
    "vocab_size": 16_000,
    "bos_token_id": 15_000,
    "eos_token_id": 15_001,
}
_QWEN3_VL: dict[str, Any] = {
    "text_config": {
        **_TEXT,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_scaling": {"mrope_section": [24, 20, 20]},
    },
    "vision_config": {"out_hidden_size": 2048},
    **MEDIA_TOKENS,
}
# A quarter of the experts of the 30B, of which a token takes as many
_EXPERTS = {
    "num_experts": 32,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        **_TEXT,
        "intermediate_size": 11_008,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"out_hidden_size": 2048},
        **MEDIA_TOKENS,
    },
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": with_dimensions(_QWEN3_VL, {"text_config": _EXPERTS}),
}

Prompt = dict[str, Any]
Steps = tuple[float, list[list[int]]]  # seconds of a step, and the tokens of each answer


class Tokenizer:
    """Nothing ends an answer, and nobody reads it."""

    stop_tokens = ()

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """No bytes."""
        return b""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Generation beside transformers' generate")
    parser.add_argument("--runs", type=int, default=7, help="paired runs of each case")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--family", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(peak_of(*options.memory_of))
        return
    with TemporaryDirectory() as directory:
        write_model(directory, options.family)
        if options.device != "cpu":
            device_table(directory, options.device, options.runs)
            return
        reference = AutoModelForImageTextToText.from_pretrained(directory).eval()
        ours = load_model(directory)
        torch.manual_seed(0)
        steps_table(ours, reference, options.runs)
        prompts_table(ours, reference, options.runs)
        whole_table(ours, reference, max(options.runs // 3, 1))
        dtypes_table(directory, ours, options.runs)
        memory_table(directory)


def write_model(directory: str, family: str) -> None:
    """Write a random model, whose attention differs between tokens."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**with_dimensions(SMALL[family], MODELS[family]))
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)


def steps_table(ours: Any, reference: Any, runs: int) -> None:
    """Decode prompts of unequal lengths."""
    print("| prompts | tokens of each | transformers / ours | ours / matrix products |")
    print("|---|---|---|---|")
    for count, shortest in CASES:
        lengths = [shortest + 9 * i for i in range(count)]
        prompts = [text_prompt(length) for length in lengths]
        sides: dict[str, Callable[[], Steps]] = {
            "ours": partial(steps_of, ours, prompts),
            "theirs": partial(steps_of_reference, reference, prompts),
            "floor": partial(products_of_steps, ours, count),
        }
        take_fastest_experts(reference, sides["theirs"])
        times, answers = paired_steps(sides, runs)
        if answers["ours"] != answers["theirs"]:
            raise SystemExit("the answers differ")
        tokens = f"{lengths[0]} to {lengths[-1]}" if count > 1 else f"{lengths[0]}"
        faster, floor = ratios(times, "theirs", "ours"), ratios(times, "ours", "floor")
        print(f"| {count} | {tokens} | {spread(faster)} | {spread(floor)} |", flush=True)


def device_table(directory: str, device: str, runs: int) -> None:
    """Decode on a GPU, with steps that are captured and with those of a model in training."""
    print("| weights | prompts | tokens of each | a step, ms | not captured / captured | replays |")
    print("|---|---|---|---|---|---|")
    kinds: dict[str, Any] = {"bfloat16": {"dtype": torch.bfloat16}, "int8": {"quantize": "int8"}}
    for (weights, how), (count, length) in product(kinds.items(), CASES):
        model = load_model(directory, **how, device=device)
        times: dict[str, list[float]] = {"captured": [], "not": []}
        replays = 0
        for _, side in product(range(runs), times):
            model.requires_grad_(side == "not")
            decoding = Decoding(model, Tokenizer(), Rules(NEW_TOKENS), count)
            times[side].append(steps_by(decoding, [text_prompt(length)] * count)[0])
            if decoding.captured:
                replays = decoding.captured.num_replays
        step = spread([1000 * seconds for seconds in times["captured"]])
        faster = spread(ratios(times, "not", "captured"))
        print(f"| {weights} | {count} | {length} | {step} | {faster} | {replays} |", flush=True)


def steps_of(model: Any, prompts: Sequence[Prompt]) -> Steps:
    """Time steps of ours."""
    return steps_by(Decoding(model, Tokenizer(), Rules(NEW_TOKENS), len(prompts)), prompts)


@torch.no_grad()
def steps_by(decoding: Decoding, prompts: Sequence[Prompt]) -> Steps:
    """Time the steps that are the same, each of which ends as its tokens come to the host."""
    decoding.read([*enumerate(prompts)])
    decoding.write_first_tokens()
    for _ in range(WARM_UP):
        decoding.step()
    start = time.perf_counter()
    for _ in range(STEPS):
        decoding.step()
    seconds = (time.perf_counter() - start) / STEPS
    return seconds, [draft.tokens for draft in decoding.drafts]


def steps_of_reference(model: Any, prompts: Sequence[Prompt]) -> Steps:
    """Time the same steps of transformers."""
    times: list[float] = []

    def look(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        times.append(time.perf_counter())
        return scores

    tokens = answer_by_reference(model, prompts, NEW_TOKENS, logits_processor=[look])
    return (times[-1] - times[WARM_UP]) / STEPS, tokens


@torch.no_grad()
def products_of_steps(model: Any, count: int) -> Steps:
    """Time the matrix products of steps of so many sequences."""
    decoder = model.decoder
    weights = [weight for weight in decoder.layers.parameters() if weight.ndim == 2]
    weights.append((decoder.output or decoder.tok_embeddings).weight)
    for layer in decoder.layers:
        if isinstance(layer.mlp, MixtureOfExperts):  # as if all took the same experts
            experts = layer.mlp.experts
            for weight_NIO in (experts.gate_up_proj.weight, experts.down_proj.weight):
                weights += weight_NIO[: layer.mlp.num_active].mT
    inputs = [torch.ones(count, weight.shape[1]) for weight in weights]
    start = time.perf_counter()
    for _ in range(STEPS):
        for x, weight in zip(inputs, weights, strict=True):
            linear(x, weight)
    return (time.perf_counter() - start) / STEPS, []


def paired_steps(
    sides: dict[str, Callable[[], Steps]], runs: int
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """Return seconds of a step of each side, taken in turns, and the answers."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    answers = {}
    for _, name in product(range(runs), sides):
        seconds, answers[name] = sides[name]()
        times[name].append(seconds)
    return times, answers


def prompts_table(ours: Any, reference: Any, runs: int) -> None:
    """Read prompts: the time of the first token."""
    geometry = ours.encoders["vision"].geometry
    cases = {
        "one of 600 tokens": [text_prompt(600)],
        "8 of 40 to 600 tokens": [text_prompt(40 + 80 * i) for i in range(8)],
        "one with four images of 24x24 patches": [image_prompt(4, geometry)],
        "4 with an image each, and 4 without": [image_prompt(1, geometry), text_prompt(30)] * 4,
    }
    print("\n| prompts | transformers / ours, first token |\n|---|---|")
    for name, prompts in cases.items():
        sides = {
            "ours": partial(answer, ours, prompts, 1),
            "theirs": partial(answer_by_reference, reference, prompts, 1),
        }
        take_fastest_experts(reference, sides["theirs"])
        check_equal(sides)
        faster = ratios(paired_times(sides, runs), "theirs", "ours")
        print(f"| {name} | {spread(faster)} |", flush=True)


def whole_table(ours: Any, reference: Any, runs: int) -> None:
    """Answer many prompts, whose answers have unequal lengths."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (PROMPTS,)).tolist()
    prompts = [text_prompt(20 + length % 50) for length in lengths]
    by_batch = range(0, PROMPTS, PEERS_BATCH)
    first_batch = partial(steps_of_reference, reference, prompts[:PEERS_BATCH])
    take_fastest_experts(reference, first_batch)

    def in_batches() -> list[list[int]]:
        found: list[list[int]] = []
        for first in by_batch:
            own = slice(first, first + PEERS_BATCH)
            written = answer_by_reference(reference, prompts[own], max(lengths[own]))
            pairs = zip(written, lengths[own], strict=True)
            found += [ids[:length] for ids, length in pairs]
        return found

    print(
        f"\n| {PROMPTS} prompts, answers of {SHORTEST} to {LONGEST} tokens | transformers / ours |"
    )
    print("|---|---|")
    sides: dict[str, Callable[[], object]] = {
        f"{size} at a time": partial(answer_to_lengths, ours, prompts, lengths, size)
        for size in (PEERS_BATCH, 32)
    }
    sides[theirs := f"{PEERS_BATCH} at a time, transformers"] = in_batches
    times: dict[str, list[float]] = {name: [] for name in sides}
    answered: list[object] = []
    for _ in range(runs):
        for name, side in sides.items():
            start = time.perf_counter()
            answered.append(side())
            times[name].append(time.perf_counter() - start)
    if any(found != answered[0] for found in answered):
        raise SystemExit("the answers differ")
    for name in [*sides][:-1]:
        print(
            f"| {name}, theirs {PEERS_BATCH} | {spread(ratios(times, theirs, name))} |", flush=True
        )


def dtypes_table(directory: str, ours: Any, runs: int) -> None:
    """Decode with other dtypes of the weights."""
    print("\n| weights | prompts | time, beside float32 | weights, MB |\n|---|---|---|---|")
    others = {"bfloat16": load_model(directory, dtype=torch.bfloat16)}
    for how in get_args(Quantized):
        others[how] = load_model(directory, quantize=how)
    for count in (1, 8):
        prompts = [text_prompt(40 + 9 * i) for i in range(count)]
        models = {"float32": ours, **others}
        sides = {name: partial(steps_of, model, prompts) for name, model in models.items()}
        times, _ = paired_steps(sides, runs)
        for name, model in others.items():
            beside = ratios(times, name, "float32")
            size = sum(num_bytes(t) for t in model.state_dict().values()) / 1e6
            print(f"| {name} | {count} | {spread(beside)} | {size:,.0f} |", flush=True)


def memory_table(directory: str) -> None:
    """Measure what generation takes beyond the model."""
    print("\n| peak memory of 8 answers beyond the model, ours / transformers |\n|---|")
    peaks = []
    for side in ("ours", "theirs"):
        command = [sys.executable, "-m", "benchmarks.generation", "--memory-of", side, directory]
        peaks.append(float(subprocess.check_output(command, env={**os.environ}).split()[-1]))
    print(f"| {peaks[0] / peaks[1]:.2f} ({peaks[0] / 1e6:,.0f} and {peaks[1] / 1e6:,.0f} MB) |")


def peak_of(side: str, directory: str) -> int:
    """The most bytes of anonymous memory that one side takes while it answers."""
    torch.manual_seed(0)
    geometry = family_of(directory).geometry
    prompts = [image_prompt(1, geometry) if i % 2 else text_prompt(300 + 90 * i) for i in range(8)]
    if side == "ours":
        call = partial(answer, load_model(directory), prompts, NEW_TOKENS)
    else:
        model = AutoModelForImageTextToText.from_pretrained(directory).eval()
        call = partial(answer_by_reference, model, prompts, NEW_TOKENS)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # what is mapped comes into memory now
    before = anonymous_memory()
    with peak_memory() as peak:
        call()
    return peak() - before


def text_prompt(length: int) -> Prompt:
    """A prompt of random tokens."""
    tokens = torch.randint(0, 1000, (length,)).tolist()
    return {"tokens": tokens, "input_pos": torch.arange(length)[:, None].expand(-1, 3)}


def image_prompt(count: int, geometry: Geometry) -> Prompt:
    """A prompt about random images."""
    t, h, w = IMAGES
    start, end, placeholder, _ = MEDIA_TOKENS.values()
    image = [start, *[placeholder] * (t * h * w // geometry.merge_size**2), end]
    tokens = [*range(5), *image * count, *range(10)]
    grid_thw = torch.tensor([IMAGES] * count)
    positions = mrope_positions(
        tokens,
        grid_thw,
        [1.0] * count,
        placeholder_ids=(placeholder,),
        merge_size=geometry.merge_size,
    )
    patches = torch.randn(count * t * h * w, geometry.values_per_patch)
    vision = {"patches": patches, "grid_thw": grid_thw}
    media = {"vision": {**vision, **vision_index(grid_thw, geometry)}}
    return {"tokens": tokens, "input_pos": positions, "encoder_input": media}


def answer(model: Any, prompts: Sequence[Prompt], new_tokens: int) -> list[list[int]]:
    """Answer with ours, all at a time."""
    rules = Rules(new_tokens)
    answered = decode(model, Tokenizer(), enumerate(prompts), rules, len(prompts))
    return [found.tokens for _, _, found in sorted(answered, key=lambda a: a[0])]


def answer_to_lengths(
    model: Any, prompts: Sequence[Prompt], lengths: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Answer with ours, each prompt with so many tokens."""
    found: dict[int, list[int]] = {}
    decoding = Decoding(model, Tokenizer(), Rules(LONGEST), batch_size)
    waiting = iter(enumerate(prompts))
    with torch.no_grad():
        while len(found) < len(prompts):
            if taken := decoding.take(waiting):
                decoding.read(taken)
                decoding.write_first_tokens()
            decoding.step()
            for draft in decoding.drafts:
                if len(draft.tokens) == lengths[draft.prompt.number]:
                    draft.ended = "length"
            found |= {draft.prompt.number: draft.tokens for draft in decoding.take_ended()}
    return [found[number] for number in range(len(prompts))]


def answer_by_reference(
    model: Any, prompts: Sequence[Prompt], new_tokens: int, **options: Any
) -> list[list[int]]:
    """Answer with transformers, padded on the left."""
    longest = max(len(prompt["tokens"]) for prompt in prompts)
    padded = [[0] * (longest - len(p["tokens"])) + p["tokens"] for p in prompts]
    input_ids = torch.tensor(padded)
    real = torch.tensor(
        [[i >= longest - len(p["tokens"]) for i in range(longest)] for p in prompts]
    )
    media = [p["encoder_input"]["vision"] for p in prompts if "encoder_input" in p]
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": real.long()}
    if media:
        inputs["mm_token_type_ids"] = (input_ids == MEDIA_TOKENS["image_token_id"]).int()
        inputs["pixel_values"] = torch.cat([medium["patches"] for medium in media])
        inputs["image_grid_thw"] = torch.cat([medium["grid_thw"] for medium in media])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(**inputs, max_new_tokens=new_tokens, **settings, **options)
    return output[:, longest:].tolist()


def check_equal(sides: dict[str, Callable[[], object]]) -> None:
    """Refuse to compare what differs."""
    ours, theirs = (side() for side in sides.values())
    if ours != theirs:
        raise SystemExit("the answers differ")


def ratios(times: dict[str, list[float]], a: str, b: str) -> list[float]:
    """Times of one side by those of another, pair by pair."""
    return [x / y for x, y in zip(times[a], times[b], strict=True)]


if __name__ == "__main__":
    main()
