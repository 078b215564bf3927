"""A model that knows the digits 0 to 4 learns 5 to 9 by adapters, with torchtune's recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from quickstart import run
from quickstart.checkpoint import write_tiny_checkpoint
from quickstart.digits import WORDS, write_digits
from tests.stock_recipes import run_recipe

OLD = WORDS[:5]


@pytest.mark.slow
def test_new_digits(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(run, "OUTPUT", tmp_path)
    write_tiny_checkpoint(tmp_path / "base", vocabulary)
    train, held_out = (json.loads(file.read_text()) for file in write_digits(tmp_path / "digits"))
    for name, is_old in (("old", True), ("new", False)):
        part = [sample for sample in train if (truth(sample) in OLD) == is_old]
        (tmp_path / "digits" / f"{name}.json").write_text(json.dumps(part))
    unseen = [sample for sample in held_out if truth(sample) not in OLD]

    def train_on(digits: str, recipe: str, start: Path, **settings: Any) -> Path:
        paths = {
            "checkpoint_dir": str(start),
            "dataset.data_files": str(tmp_path / "digits" / f"{digits}.json"),
        }
        rates = {"epochs": 8, "batch_size": 32, "optimizer.lr": 1e-3}
        run_recipe(recipe, tmp_path / digits, {**paths, **rates, **settings})
        return max((tmp_path / digits).glob("epoch_*"))

    def accuracy(checkpoint: Path) -> float:
        return run.accuracy(unseen, run.answer(checkpoint, unseen))

    old = train_on("old", "full_finetune_single_device", tmp_path / "base")
    files = {path.name: path.read_bytes() for path in old.iterdir()}
    new = train_on(
        "new",
        "lora_finetune_single_device",
        old,
        epochs=10,
        batch_size=8,
        **{
            "optimizer.lr": 5e-4,
            "model.lora_attn_modules": "[q_proj,k_proj,v_proj,qkv,output_proj]",
            "model.lora_alpha": 16,
            "model.encoder_trainable": "lora",
        },
    )
    before, after = accuracy(old), accuracy(new)
    with capsys.disabled():
        print(f"\nheld-out images of 5 to 9: {before:.1%} right before, {after:.1%} after")
    assert before == 0
    assert after >= 0.85
    assert {path.name: path.read_bytes() for path in old.iterdir()} == files


def truth(sample: dict[str, Any]) -> str:
    return sample["conversations"][1]["value"]
