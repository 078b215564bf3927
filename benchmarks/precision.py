"""What dtypes of weights, computation and optimizer do to what is learned, beside float32.

    python -m benchmarks.precision

A small Qwen2.5-VL, its matrices drawn from N(0, 0.02), learns handwritten digits on the same
batches in each setting. Printed are the mean loss of the last 20 steps; of the change of all
weights its cosine with float32's and its length beside that; and how many entries the first step
changed.
"""

import argparse
import copy
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchao.optim
from torch import nn
from torch.distributed.tensor import DTensor

from quickstart.checkpoint import CONFIG, write_tiny_checkpoint
from quickstart.digits import write_digits
from quickstart.vocabulary import fetch_vocabulary
from torchtune_vl.data import packed_collate_vision
from torchtune_vl.datasets import vision_chat_dataset
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform, qwen2_5_vl_from_config
from torchtune_vl.training._mesh import Mesh
from torchtune_vl.training._sharding import shard

STEPS = 300
BATCH = 4
LAST = 20
RATES = (1e-5, 3e-4)
SMALL: dict[str, Any] = {
    **CONFIG,
    "num_hidden_layers": 2,
    "vision_config": {**CONFIG["vision_config"], "depth": 2, "fullatt_block_indexes": [1]},
}


class Setting(NamedTuple):
    """How a model is kept, computed and updated."""

    weights: torch.dtype
    compute: torch.dtype
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any]


FP32, BF16 = torch.float32, torch.bfloat16
SETTINGS = {
    "float32": Setting(FP32, FP32, torch.optim.AdamW, {}),
    "float32, computed in bfloat16": Setting(FP32, BF16, torch.optim.AdamW, {}),
    "float32, computed in bfloat16, `AdamW8bit`": Setting(FP32, BF16, torchao.optim.AdamW8bit, {}),
    "bfloat16": Setting(BF16, BF16, torch.optim.AdamW, {}),
    "bfloat16, `AdamW8bit`, `bf16_stochastic_round`": Setting(
        BF16, BF16, torchao.optim.AdamW8bit, {"bf16_stochastic_round": True}
    ),
}


class Run(NamedTuple):
    """What a setting came to."""

    loss: float
    change: torch.Tensor
    changed_at_first: float


def main() -> None:
    """Train in each setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        batches, model = make_batches_and_model(Path(directory))
    print("| weights | rate | loss | cosine | length | changed by the first step |")
    print("|---|---|---|---|---|---|")
    for rate in RATES:
        reference: Run | None = None
        for name, setting in SETTINGS.items():
            run = train(model, setting, rate, batches, steps)
            reference = reference or run
            cosine = nn.functional.cosine_similarity(run.change, reference.change, dim=0)
            length = run.change.norm() / reference.change.norm()
            print(
                f"| {name} | {rate:g} | {run.loss:.3f} | {cosine:.3f} | {length:.2f} | "
                f"{run.changed_at_first:.1%} |",
                flush=True,
            )
    print(f"\n{steps} steps each, {time.perf_counter() - began:.0f} s")
    torch.distributed.destroy_process_group()


def make_batches_and_model(directory: Path) -> tuple[list[dict[str, Any]], nn.Module]:
    """Pack the digits, a few to a batch, and draw a model whose vocabulary is what they use."""
    base = directory / "base"
    write_tiny_checkpoint(base, fetch_vocabulary(Path(".assets/tokenizer")), config=SMALL)
    train_file, _ = write_digits(directory / "digits")
    dataset = vision_chat_dataset(
        Qwen2_5_VLTransform.from_pretrained(base), source="json", data_files=str(train_file)
    )
    samples = [dataset[i] for i in range(len(dataset))]
    # Most rows of the whole embedding would never be seen, and be most of all weights
    used = sorted({SMALL["video_token_id"], *(t for sample in samples for t in sample["tokens"])})
    number = {token: i for i, token in enumerate(used)} | {-100: -100}
    for sample in samples:
        for key in ("tokens", "labels"):
            sample[key] = [number[token] for token in sample[key]]
    groups = [samples[i : i + BATCH] for i in range(0, len(samples) - BATCH + 1, BATCH)]

    path = base / "config.json"
    ids = {key: number[SMALL[key]] for key in ("image_token_id", "video_token_id")}
    path.write_text(json.dumps({**SMALL, **ids, "vocab_size": len(used)}))
    torch.manual_seed(0)
    model = qwen2_5_vl_from_config(base)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return [packed_collate_vision(group) for group in groups], model


def train(
    start: nn.Module, setting: Setting, rate: float, batches: Sequence[dict[str, Any]], steps: int
) -> Run:
    """Train a copy of a model."""
    torch.manual_seed(0)
    model = copy.deepcopy(start).to(setting.weights)
    if setting.compute != setting.weights:  # as the recipe does
        shard(model, Mesh(1, 1, 1, 1).devices("cpu"), setting.compute, cpu_offload=False)
    before = weights_of(model)
    optimizer = setting.optimizer(model.parameters(), lr=rate, **setting.options)
    losses = []
    changed = 0.0
    for step, batch in enumerate(itertools.islice(itertools.cycle(batches), steps)):
        loss = model(**batch).float().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step == 0:
            changed = (weights_of(model) != before).double().mean().item()
    last = losses[-LAST:]
    return Run(sum(last) / len(last), weights_of(model) - before, changed)


def weights_of(model: nn.Module) -> torch.Tensor:
    """All weights, float32, as one vector."""
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return torch.cat([p.detach().float().flatten() for p in whole])


if __name__ == "__main__":
    main()
