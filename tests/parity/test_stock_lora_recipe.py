"""torchtune's own recipe for adapters on our components, and its files in transformers and peft."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft.tuners.lora.torchao
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from quickstart.checkpoint import write_tiny_checkpoint
from tests.stock_recipes import run_recipe
from torchtune_vl.checkpoint._adapters import load_adapter, merge_adapter
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_hf_to_tune

# peft refuses the torchao that torchtune needs, though no weight here is torchao's
peft.tuners.lora.torchao.is_torchao_available = lambda: False

STEPS = 6


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stock_lora_recipe")
    write_tiny_checkpoint(root / "base", vocabulary)
    generator = np.random.default_rng(0)
    samples = []
    for number in range(2 * STEPS):
        pixels = generator.integers(0, 256, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        conversation = [
            {"from": "human", "value": "<image>What is this?"},
            {"from": "gpt", "value": "Noise."},
        ]
        samples.append({"image": f"{number}.png", "conversations": conversation})
    (root / "train.json").write_text(json.dumps(samples))
    return root


def run(root: Path, output: Path, **settings: Any) -> list[float]:
    fixed = {
        "clip_grad_norm": None,
        "checkpoint_dir": str(root / "base"),
        "dataset.data_files": str(root / "train.json"),
        "shuffle": False,
        "batch_size": 2,
        "epochs": 1,
        "optimizer.lr": 1e-2,
        "lr_scheduler.num_warmup_steps": 1,
        "model.lora_attn_modules": "[q_proj,v_proj,qkv,output_proj]",
        "model.lora_rank": 4,
        "model.lora_alpha": 8,
        "model.encoder_trainable": "lora",
    }
    return run_recipe("lora_finetune_single_device", output, {**fixed, **settings})


def load(directory: Path) -> torch.nn.Module:
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    AutoProcessor.from_pretrained(directory)
    return model.eval()


CASES = {
    "LoRA": {},
    "DoRA, the merger in full": {"model.use_dora": True, "model.fusion_trainable": "full"},
}


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=() if name == "LoRA" else pytest.mark.slow)
        for name, settings in CASES.items()
    ],
)
def test_files_of_a_run(root: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    before = (root / "base" / "model.safetensors").read_bytes()
    losses = run(root, tmp_path / "output", **settings)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert (root / "base" / "model.safetensors").read_bytes() == before

    epoch = tmp_path / "output" / "epoch_0"
    merged = load(epoch)
    adapted = PeftModel.from_pretrained(load(root / "base"), epoch / "adapter").eval()
    processor = AutoProcessor.from_pretrained(root / "base")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    inputs = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True)],
        images=[Image.open(root / "0.png")],
        return_tensors="pt",
    )
    logits = merged(**inputs).logits
    torch.testing.assert_close(adapted(**inputs).logits, logits, rtol=0, atol=2e-5)
    assert (load(root / "base")(**inputs).logits - logits).abs().max() > 0.1

    base = qwen2_5_vl_hf_to_tune(load_file(root / "base" / "model.safetensors"))
    expected = merge_adapter(base, load_adapter(epoch / "adapter"))
    saved = qwen2_5_vl_hf_to_tune(load_file(epoch / "model.safetensors"))
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_resuming_goes_on_with_the_adapter(root: Path, tmp_path: Path) -> None:
    settings = {
        "model.use_dora": True,
        "model.fusion_trainable": "full",
        "epochs": 2,
        "max_steps_per_epoch": 3,
    }
    whole = run(root, tmp_path / "output", **settings)
    shutil.rmtree(tmp_path / "output" / "epoch_1")
    resumed = run(root, tmp_path / "output", resume_from_checkpoint=True, **settings)
    np.testing.assert_allclose(resumed, whole[3:], rtol=1e-6)


@pytest.mark.slow
def test_a_quantized_run_exports_bfloat16(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "output", **{"model.quantize_base": True}, dtype="bf16")
    epoch = tmp_path / "output" / "epoch_0"
    assert {tensor.dtype for tensor in load_file(epoch / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert load(epoch).dtype == torch.bfloat16


@pytest.mark.slow
def test_an_adapter_alone(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "output", save_adapter_weights_only=True)
    epoch = tmp_path / "output" / "epoch_0"
    assert {path.name for path in epoch.iterdir()} == {"adapter", "checksums.json"}
    goes_on = run(
        root,
        tmp_path / "further",
        **{"checkpointer.adapter_dir": str(epoch / "adapter")},
    )
    fresh = run(root, tmp_path / "fresh")
    assert goes_on[0] < fresh[0] / 2
