"""Steps of text alone between steps with images, beside a plain loop over transformers' model."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.finetune_runs import read_losses, read_samples, run, write_config, write_inputs
from tests.parity.figures import record
from tests.plain_loop import plain_run
from torchtune_vl.datasets import vision_chat_dataset
from torchtune_vl.models.qwen2_5_vl import Qwen2_5_VLTransform, qwen2_5_vl_hf_to_tune

# Momentum and weight decay that would move what has no gradient
OPTIMIZER = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.3, "fused": True}
ROWS = {
    "padded": {"_component_": "torchtune_vl.data.PaddedRows", "batch_size": 1},
    "packed": {"_component_": "torchtune_vl.data.PackedRows", "max_tokens": 100, "lookahead": 1},
}


@pytest.fixture(scope="module")
def root(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text_steps")
    write_inputs(root, vocabulary, 8, (("image",), (), ()))
    return root


@pytest.mark.parametrize(
    ("rows", "processes"),
    [
        ("padded", 1),
        ("packed", 1),
        ("padded", 2),
    ],
)
@pytest.mark.slow
def test_encoder_and_merger_rest(root: Path, tmp_path: Path, rows: str, processes: int) -> None:
    settings: dict[str, Any] = {
        "rows": ROWS[rows],
        "rows_per_step": processes,
        "optimizer": OPTIMIZER,
        "lr_scheduler": None,
        "shuffle": False,
    }
    config = write_config(root, tmp_path / "run", {**settings, "max_steps": 8 // processes})
    run(config, processes)
    samples = read_samples(tmp_path / "run")
    dataset = vision_chat_dataset(
        Qwen2_5_VLTransform.from_pretrained(root / "base"),
        source="json",
        data_files=str(root / "train.jsonl"),
    )
    has_media = [any("encoder_input" in dataset[i] for i in samples[step]) for step in samples]
    assert {True, False} == {*has_media}
    plain = plain_run(config, dataset, samples)
    losses = read_losses(tmp_path / "run")
    difference = max(abs(losses[step] / loss - 1) for step, loss in plain.losses.items())
    assert difference <= 1e-5

    (epoch,) = (tmp_path / "run").glob("epoch_*")
    ours = qwen2_5_vl_hf_to_tune(load_file(epoch / "model.safetensors"))
    worst = 0.0
    for name, end in plain.end.items():
        if not name.endswith("k_proj.bias"):  # see test_finetune_parity.py
            moved = (end - plain.start[name]).norm()
            worst = max(worst, float((ours[name] - end).norm() / moved))
    assert worst <= 0.02
    record("steps of text alone: updates, our recipe, relative", len(plain.end), worst)
