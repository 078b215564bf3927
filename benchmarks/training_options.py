"""Time and memory of training steps by the recipe's options, beside the plain setting.

Run as ``python -m benchmarks.training_options`` (Linux; about three quarters of an hour on two
cores). It prints Markdown. Model and samples are those of `benchmarks.training`: 100 M parameters,
of which 58 M are embeddings, on a CPU. Plain is full training in float32 with packed rows, AdamW,
and nothing recomputed. Steps are taken in turns, the same samples on both sides; memory is all that
a process of its own holds at the peak of a step beyond its libraries.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.data_path import spread
from benchmarks.encoder import peak_memory, return_what_is_freed, status
from benchmarks.training import (
    BATCH_SIZE,
    CPU_MIX,
    CPU_MODELS,
    CPU_SETTINGS,
    MAX_TOKENS,
    STEP_SIZE,
    Mix,
    Ours,
    apart,
    write_data,
    write_model,
)

WARM_UP = 4  # steps: makes the optimizer's states, and compiles
PIXELS = 100 * 28 * 28  # half of the mean
LORA = {
    "_component_": "torchtune_vl.models.qwen2_5_vl.lora_qwen2_5_vl_from_config",
    "checkpoint_dir": "${checkpoint_dir}",
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 16,
    "lora_alpha": 32,
    "encoder_trainable": "frozen",
    "fusion_trainable": "frozen",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "encoder and merger frozen": {
        "model.encoder_trainable": False,
        "model.fusion_trainable": False,
    },
    "LoRA, rank 16, on the decoder": {"model": LORA},
    "DoRA, likewise": {"model": {**LORA, "use_dora": True}},
    "QLoRA, likewise": {"model": {**LORA, "quantize_base": True}},
    f"`rows`: `PaddedRows`, `batch_size: {BATCH_SIZE}`": {
        "rows": {"_component_": "torchtune_vl.data.PaddedRows", "batch_size": BATCH_SIZE}
    },
    "`rows.max_tokens` halved, twice the rows": {"rows.max_tokens": MAX_TOKENS // 2},
    "`max_pixels`: half the image tokens": {"tokenizer.max_pixels": PIXELS},
    "`optimizer`: `torch.optim.SGD`": {
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-5, "fused": True}
    },
    "`optimizer`: `torchao.optim.AdamW8bit`": {
        "optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-5}
    },
    "`dtype: bf16`": {"dtype": "bf16"},
    "`compute_dtype: bf16`": {"compute_dtype": "bf16"},
    "`compile: True`": {"compile": True},
    "`activation_checkpointing: selective`": {"activation_checkpointing": "selective"},
    "`activation_checkpointing: full`": {"activation_checkpointing": "full"},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=6, help="paired steps, each of other samples")
    arguments = parser.parse_args()
    if arguments.runs < 2:
        parser.error("--runs must be at least 2: quartiles are printed")

    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_model(root, next(iter(CPU_MODELS)))
        write_data(root, Mix((arguments.runs + WARM_UP) * STEP_SIZE, *CPU_MIX))
        plain_memory = apart(step_memory, root, {})
        print("| option | time of a step / plain | memory / plain |\n|---|---|---|")
        for name, settings in OPTIONS.items():
            with trainer(root, settings) as option, trainer(root, {}) as plain:
                ratios = spread(paired_times(option, plain, arguments.runs))
            memory = apart(step_memory, root, settings) / plain_memory
            print(f"| {name} | {ratios} | {memory:.2f} |", flush=True)


def step_memory(root: Path, settings: dict[str, Any]) -> int:
    """Return the bytes of model, optimizer, batches and a step at its peak."""
    return_what_is_freed()
    before = status("VmRSS")
    ours = Ours(root, {**CPU_SETTINGS, **settings})
    rows = ours.rows(ours.recipe.rows.planner, range(STEP_SIZE))
    for _ in range(WARM_UP):
        ours.step(rows)
    of_step = peak_memory(lambda: ours.step(rows))
    return status("VmRSS") - before + of_step


def trainer(root: Path, settings: dict[str, Any]) -> ProcessPoolExecutor:
    """Start a process that trains with these settings."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, start_training, (root, settings))


_recipes: list[Ours] = []  # of the process of a trainer: its only one


def start_training(root: Path, settings: dict[str, Any]) -> None:
    """Build the recipe, in a process of its own."""
    _recipes.append(Ours(root, {**CPU_SETTINGS, **settings}))


def step_time(samples: range) -> float:
    """Return the seconds of a step on these samples, their batches made beforehand."""
    (ours,) = _recipes
    rows = ours.rows(ours.recipe.rows.planner, samples)
    start = time.perf_counter()
    ours.step(rows)
    return time.perf_counter() - start


def paired_times(option: ProcessPoolExecutor, plain: ProcessPoolExecutor, runs: int) -> list[float]:
    """Return the time of each step with an option / of the same step without it."""
    ratios = []
    for number in range(WARM_UP + runs):
        samples = range(number * STEP_SIZE, (number + 1) * STEP_SIZE)
        seconds = {}
        for side in [option, plain][:: 1 if number % 2 else -1]:
            seconds[side] = side.submit(step_time, samples).result()
        ratios.append(seconds[option] / seconds[plain])
    return ratios[WARM_UP:]


if __name__ == "__main__":
    main()
