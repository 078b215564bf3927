"""Runs of our recipe on a tiny checkpoint and a mixed dataset, as users start them."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from omegaconf import OmegaConf
from PIL import Image

from quickstart.checkpoint import CONFIG, QWEN3_VL_CONFIG, write_tiny_checkpoint
from tests.videos import Clip, write_clip
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config
from torchtune_vl.recipes import config_path

# The embedding of the real vocabulary makes most of the work: narrow, it is a few seconds less
NARROW = {
    **CONFIG,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {
        **CONFIG["vision_config"],
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    },
}
NARROW_QWEN2_VL = {
    **NARROW,
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "vision_config": {
        "depth": 2,
        "embed_dim": 32,
        "hidden_act": "quick_gelu",
        "hidden_size": 32,
        "in_chans": 3,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}
NARROW_QWEN3_VL = {
    **QWEN3_VL_CONFIG,
    "text_config": {
        **QWEN3_VL_CONFIG["text_config"],
        "head_dim": 32,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5]},
    },
    "vision_config": {
        **QWEN3_VL_CONFIG["vision_config"],
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_position_embeddings": 25,
        "out_hidden_size": 48,
    },
}
NARROW_QWEN3_VL_MOE = {
    **NARROW_QWEN3_VL,
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "text_config": {
        **NARROW_QWEN3_VL["text_config"],
        "hidden_size": 80,
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "vision_config": {**NARROW_QWEN3_VL["vision_config"], "out_hidden_size": 80},
}
ANSWERS = ("Noise.", "Ein Bild, 3 Farben.", "这是噪声。\nSecond line.", "Yes")
# What each sample shows, over and over
MEDIA = (("image",), (), ("image", "image", "image"), ("video",), (), ("image", "video"))


def write_inputs(
    root: Path,
    vocabulary: Path,
    count: int,
    media: Sequence[Sequence[str]] = MEDIA,
    config: Mapping[str, Any] = NARROW,
) -> None:
    """Write a tiny checkpoint, and conversations with text, images and videos.

    Args:
        root: where ``base`` and ``train.jsonl`` are written.
        vocabulary: directory with the tokenizer's files.
        count: how many conversations.
        media: what each shows, over and over.
        config: the checkpoint's dimensions, in the form of the published ``config.json``.
    """
    write_tiny_checkpoint(root / "base", vocabulary, config=config)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        content: list[dict[str, Any]] = []
        for place, kind in enumerate(media[number % len(media)]):
            height, width = (int(side) for side in rng.integers(30, 200, 2))
            name = f"{number}_{place}.{'png' if kind == 'image' else 'mp4'}"
            if kind == "image":
                pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
                Image.fromarray(pixels).save(root / name)
            else:
                frames = int(rng.integers(20, 80))
                write_clip(root / name, Clip(".mp4", frames=frames, size=(64, 96)))
            content.append({"type": kind, kind: name})
        content.append({"type": "text", "text": "What is this? " * int(rng.integers(1, 9))})
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": ANSWERS[number % len(ANSWERS)]},
        ]
        lines.append(json.dumps({"messages": turns}))
    (root / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_config(
    root: Path, output: Path, settings: Mapping[str, Any], name: str = "qwen2_5_vl/full"
) -> Path:
    """Write a config of ours with what is different for a tiny model on a CPU.

    Args:
        root: as :func:`write_inputs` left it.
        output: directory of the run; the config is written beside it.
        settings: further keys that differ.
        name: of the config.

    Returns:
        The config's path.
    """
    config = OmegaConf.load(config_path(name))
    for key, value in {
        "output_dir": str(output),
        "checkpoint_dir": str(root / "base"),
        "dataset.data_files": str(root / "train.jsonl"),
        "rows.max_tokens": 512,
        "rows.max_patches": None,
        "rows_per_step": 2,
        "num_workers": 0,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.01},
        "lr_scheduler.num_warmup_steps": 3,
        "clip_grad_norm": None,
        "device": "cpu",
        "dtype": "fp32",
        "compute_dtype": None,
        "compile": False,
        "activation_checkpointing": "none",
        **settings,
    }.items():
        OmegaConf.update(config, key, value, merge=not isinstance(value, dict))
    path = output.with_suffix(".yaml")
    OmegaConf.save(config, path)
    return path


def start(config: Path, processes: int = 1, *overrides: str) -> subprocess.Popen[str]:
    """Start ``tune-vl run finetune``.

    Args:
        config: of the run.
        processes: more than one by torchrun.
        *overrides: of the config's keys.

    Returns:
        The process, with its messages in ``stdout``.
    """
    command = [sys.executable, "-m", "torchtune_vl.cli", "run"]
    if processes > 1:
        command += ["--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*command, "finetune", "--config", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def run(config: Path, processes: int = 1, *overrides: str) -> dict[int, float]:
    """Run ``tune-vl run finetune`` to its end.

    Args:
        config: of the run.
        processes: more than one by torchrun.
        *overrides: of the config's keys.

    Returns:
        The loss of each step that this run logged.
    """
    process = start(config, processes, *overrides)
    messages, _ = process.communicate()
    assert process.returncode == 0, messages[-4000:]
    return read_losses(config.with_suffix(""))


def kill_after(
    step: int, config: Path, processes: int, *overrides: str, delay: float = 0.0
) -> None:
    """Start ``tune-vl run finetune``, and kill it as soon as it has logged a step.

    Args:
        step: number of the step.
        config: of the run.
        processes: more than one by torchrun.
        *overrides: of the config's keys.
        delay: seconds to wait after the step.
    """
    process = start(config, processes, *overrides)
    while process.poll() is None and last_step(config.with_suffix("")) < step:
        time.sleep(0.02)
    time.sleep(delay)
    if process.poll() is not None:
        raise AssertionError(f"ended before step {step}: {process.communicate()[0][-4000:]}")
    kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a run with its data workers and, which are no group of its own, torchrun's processes."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.suspend()
    for member in family:
        member.kill()
    process.communicate()


def command(*arguments: str, status: int = 0) -> str:
    """Run another command of ``tune-vl``, whose exit status is known, and return its messages."""
    line = [sys.executable, "-m", "torchtune_vl.cli", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    messages = done.stdout + done.stderr
    assert done.returncode == status, messages[-4000:]
    return messages


def last_step(output: Path) -> int:
    """The last step that a run has logged, 0 if none."""
    logs = [*(output / "logs").glob("log_*.txt")]
    return max(read_losses(output), default=0) if logs else 0


def read_losses(output: Path) -> dict[int, float]:
    """The losses in the newest log of a run, by step."""
    return read_metric(output, "loss")


def read_metric(output: Path, name: str) -> dict[int, float]:
    """What the newest log of a run tells of each step."""
    newest = max((output / "logs").glob("log_*.txt"), key=lambda path: path.stat().st_mtime_ns)
    lines = re.findall(rf"Step (\d+) \|.*?\b{name}:(\S+)", newest.read_text())
    return {int(step): float(value) for step, value in lines}


def read_samples(output: Path) -> dict[int, list[int]]:
    """The samples of each step, of all processes."""
    steps: dict[int, list[int]] = {}
    for path in (output / "samples").glob("process_*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            steps.setdefault(row["step"], []).extend(row["samples"])
    return steps


def constant_rate(optimizer: Any, num_training_steps: int) -> Any:
    """A schedule that changes nothing."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def model_that_breaks(checkpoint_dir: str, gradient_of: int = 0, validation: bool = False) -> Any:
    """Our model, with one gradient or the losses of a validation that are not finite.

    Args:
        checkpoint_dir: has its config.
        gradient_of: number of the forward whose gradients are NaN, from 1; 0 for none.
        validation: whether losses are NaN in evaluation.
    """
    model = qwen2_5_vl_from_config(checkpoint_dir)
    forwards = itertools.count(1)

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if module.training and next(forwards) == gradient_of:
            output.register_hook(lambda gradient: gradient * math.nan)
        return output if module.training or not validation else output * math.nan

    model.decoder.norm.register_forward_hook(hook)
    return model
