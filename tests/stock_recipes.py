"""torchtune's own recipes on our components, run as users run them."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

CONFIGS = {
    "full_finetune_single_device": "qwen2_5_vl/stock_full",
    "lora_finetune_single_device": "qwen2_5_vl/stock_lora",
}
# What the tiny checkpoint takes on a CPU
SETTINGS: dict[str, Any] = {
    "tokenizer.max_seq_len": 512,
    "tokenizer.patch_dtype": "float32",
    "device": "cpu",
    "dtype": "fp32",
    "enable_activation_checkpointing": False,
    "log_peak_memory_stats": False,
    "gradient_accumulation_steps": 1,
}


def constant_rate(optimizer: Optimizer, num_training_steps: int, last_epoch: int) -> LambdaLR:
    """A schedule that changes nothing: torchtune takes out no component on the command line."""
    return LambdaLR(optimizer, lambda step: 1.0)


def run_recipe(name: str, output: Path, settings: Mapping[str, Any]) -> list[float]:
    """Run a recipe on its ready config.

    Args:
        name: the recipe.
        output: its output directory.
        settings: keys of the config that differ from it and from `SETTINGS`; None takes one out.

    Returns:
        The loss of each step.
    """
    overrides = [
        f"~{key}" if value is None else f"{key}={value}"
        for key, value in {**SETTINGS, "output_dir": output, **settings}.items()
    ]
    command = [sys.executable, "-m", "torchtune_vl.cli", "run", name, "--config", CONFIGS[name]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # there are as many tests as cores
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cpp extensions" not in done.stderr
    newest = max((output / "logs").glob("log_*.txt"), key=lambda path: path.stat().st_mtime_ns)
    return [float(loss) for loss in re.findall(r"loss:(\S+)", newest.read_text())]
