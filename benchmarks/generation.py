"""Speed of decoding on a CPU, ours beside transformers' ``generate``.

Run as ``python -m benchmarks.generation`` (some minutes on two cores). It prints Markdown. Both
sides answer the same prompts by the same random model, greedily, with the same number of tokens.
The time of the first token, which reads the prompts, is taken off that of all. The floor is the
matrix products of these steps alone.
"""

import argparse
from functools import partial
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.data_path import paired_times, spread
from quickstart.checkpoint import CONFIG
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.generation import generate
from torchtune_vl.models import model_from_pretrained

NEW_TOKENS = 33
# Prompts, and tokens of the shortest; each next one is nine tokens longer
CASES = ((1, 40), (1, 600), (8, 40), (8, 600))
# Heads of the published size, four of queries for each of keys and values
MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32_000,
    "bos_token_id": 30_998,
    "eos_token_id": 30_999,
    "vision_start_token_id": 31_000,
    "vision_end_token_id": 31_001,
    "image_token_id": 31_002,
    "video_token_id": 31_003,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Decoding beside transformers' generate")
    parser.add_argument("--runs", type=int, default=7, help="paired runs of each case")
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vision = {**CONFIG["vision_config"], "out_hidden_size": MODEL["hidden_size"]}
    config = Qwen2_5_VLConfig(**{**CONFIG, **MODEL, "vision_config": vision})
    reference = Qwen2_5_VLForConditionalGeneration(config).eval()
    with TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        ours = model_from_pretrained(directory).eval()
    print("| prompts | tokens of each | transformers / ours | ours / matrix products |")
    print("|---|---|---|---|")
    for count, shortest in CASES:
        lengths = [shortest + 9 * i for i in range(count)]
        faster, floor = ratios(ours, reference, lengths, runs)
        tokens = f"{lengths[0]} to {lengths[-1]}" if count > 1 else f"{lengths[0]}"
        print(f"| {count} | {tokens} | {spread(faster)} | {spread(floor)} |", flush=True)


def ratios(
    ours: nn.Module, reference: Qwen2_5_VLForConditionalGeneration, lengths: list[int], runs: int
) -> tuple[list[float], list[float]]:
    """Decode the same prompts by turns."""
    samples = [
        {
            "tokens": torch.randint(0, 1000, (length,)).tolist(),
            "labels": [-100] * length,
            "input_pos": torch.arange(length)[:, None].expand(-1, 3),
        }
        for length in lengths
    ]
    batch = padded_collate_vision(samples, 0, pad_direction="left")
    real = torch.tensor([[i >= max(lengths) - n for i in range(max(lengths))] for n in lengths])
    products = [weight for weight in ours.decoder.parameters() if weight.ndim == 2]
    inputs = [torch.randn(len(lengths), weight.shape[1]) for weight in products]

    def answer_ours(new_tokens: int) -> object:
        return generate(ours, batch, max_new_tokens=new_tokens, stop_tokens=[])

    def answer_theirs(new_tokens: int) -> object:
        return reference.generate(
            input_ids=batch["tokens"],
            attention_mask=real.long(),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, max(lengths) :].tolist()

    @torch.no_grad()
    def multiply(new_tokens: int) -> None:
        for _ in range(new_tokens):
            for x, weight in zip(inputs, products, strict=True):
                F.linear(x, weight)

    if answer_ours(NEW_TOKENS) != answer_theirs(NEW_TOKENS):
        raise SystemExit("the answers differ")
    sides = (answer_ours, answer_theirs, multiply)
    times = paired_times(
        {f"{side.__name__} {n}": partial(side, n) for side in sides for n in (1, NEW_TOKENS)}, runs
    )
    mine, theirs, least = (
        [
            whole - first
            for whole, first in zip(
                times[f"{side.__name__} {NEW_TOKENS}"], times[f"{side.__name__} 1"], strict=True
            )
        ]
        for side in sides
    )
    faster = [their / my for their, my in zip(theirs, mine, strict=True)]
    return faster, [my / floor for my, floor in zip(mine, least, strict=True)]


if __name__ == "__main__":
    main()
