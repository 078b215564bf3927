"""torchtune's own recipe on our components, beside a plain loop over transformers' model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchtune.data import Message
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from quickstart.checkpoint import write_tiny_checkpoint
from tests.parity.figures import record
from tests.stock_recipes import run_recipe
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform

STEPS = 20
BATCH_SIZE = 2
LEARNING_RATE = 1e-3
QUESTIONS = ("What is this?", "Как это выглядит?", "Describe the picture in one sentence.")
ANSWERS = ("Noise.", "Ein Bild, 3 Farben.", "这是噪声。\nSecond line.")


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a dataset of noisy images of many sizes."""
    root = tmp_path_factory.mktemp("stock_recipe")
    write_tiny_checkpoint(root / "base", vocabulary)
    generator = np.random.default_rng(0)
    samples = []
    for number in range(STEPS * BATCH_SIZE):
        height, width = generator.integers(30, 260, 2)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        conversation = [
            {"from": "human", "value": f"<image>{QUESTIONS[number % 3]}"},
            {"from": "gpt", "value": ANSWERS[number % 3]},
        ]
        if number % 4 == 1:
            conversation += [
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ]
        samples.append({"image": f"{number}.png", "conversations": conversation})
    (root / "train.json").write_text(json.dumps(samples))
    return root


def recipe_losses(root: Path, output: Path, settings: dict[str, Any]) -> list[float]:
    """Losses of the stock recipe."""
    fixed = {
        "lr_scheduler": "tests.stock_recipes.constant_rate",
        "lr_scheduler.num_warmup_steps": None,
        "clip_grad_norm": None,
        "checkpoint_dir": str(root / "base"),
        "dataset.data_files": str(root / "train.json"),
        "shuffle": False,
        "batch_size": BATCH_SIZE,
        "epochs": 1,
        "optimizer.lr": LEARNING_RATE,
    }
    return run_recipe("full_finetune_single_device", output, {**fixed, **settings})


@pytest.fixture(scope="module")
def reference_losses(root: Path) -> list[float]:
    """Losses of transformers' model on the inputs of its own processor."""
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(root / "base").train()
    processor = AutoProcessor.from_pretrained(root / "base", padding_side="right")
    transform = Qwen2_5_VLTransform.from_pretrained(root / "base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    samples = json.loads((root / "train.json").read_text())
    losses = []
    for start in range(0, len(samples), BATCH_SIZE):
        batch = samples[start : start + BATCH_SIZE]
        chats = [_chat(root, sample) for sample in batch]
        inputs = processor(
            text=[processor.apply_chat_template(chat) for chat in chats],
            images=[chat[0]["content"][0]["image"] for chat in chats],
            padding=True,
            return_tensors="pt",
        )
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, chat in zip(labels, chats, strict=True):
            _, mask = transform.tokenize_messages([_message(turn) for turn in chat])
            row[: len(mask)] = torch.where(torch.tensor(mask), -100, 0)
        labels = torch.where(labels == 0, inputs["input_ids"], labels)
        model.model.rope_deltas = None
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    return losses


def _chat(root: Path, sample: dict[str, Any]) -> list[dict[str, Any]]:
    chat = []
    for turn in sample["conversations"]:
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        text = {"type": "text", "text": turn["value"].removeprefix("<image>")}
        chat.append({"role": role, "content": [text]})
    chat[0]["content"].insert(0, {"type": "image", "image": Image.open(root / sample["image"])})
    return chat


def _message(turn: dict[str, Any]) -> Message:
    content = [{"type": i["type"], "content": i[i["type"]]} for i in turn["content"]]
    return Message(role=turn["role"], content=content)


STOCK_LOSS = {
    "collate_fn": "torchtune_vl.data.padded_collate_vision",
    "loss._component_": "torchtune.modules.loss.CEWithChunkedOutputLoss",
}
CHECKPOINTING = {"enable_activation_checkpointing": True}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="supervised_loss", marks=pytest.mark.slow),
        pytest.param(STOCK_LOSS, id="stock_loss", marks=pytest.mark.slow),
        pytest.param(
            {"tokenizer.patch_dtype": "uint8"}, id="uint8_patches", marks=pytest.mark.slow
        ),
        pytest.param(CHECKPOINTING, id="activation_checkpointing", marks=pytest.mark.slow),
        pytest.param({"compile": True}, id="compile", marks=pytest.mark.slow),
    ],
)
def test_every_step_has_the_loss_of_a_transformers_loop(
    root: Path, reference_losses: list[float], settings: dict[str, Any], tmp_path: Path
) -> None:
    losses = recipe_losses(root, tmp_path / "output", settings)
    np.testing.assert_allclose(losses, reference_losses, rtol=1e-4)
    difference = np.abs(np.array(losses) / np.array(reference_losses) - 1).max()
    record("training steps: loss, stock recipe, relative", STEPS, float(difference))


@pytest.mark.slow
def test_resuming_continues_the_run(root: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "max_steps_per_epoch": 10}
    whole = recipe_losses(root, tmp_path / "output", settings)
    # What a run leaves that is stopped after its first epoch
    shutil.rmtree(tmp_path / "output" / "epoch_1")
    settings["resume_from_checkpoint"] = True
    resumed = recipe_losses(root, tmp_path / "output", settings)
    np.testing.assert_allclose(resumed, whole[10:], rtol=1e-6)
