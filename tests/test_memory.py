"""The computed memory beside that of a real model, its optimizer and its forward."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config as torchtune_config

from quickstart.checkpoint import CONFIG
from tests.reference import Conversation
from torchtune_vl.cli import main
from torchtune_vl.data import padded_collate_vision
from torchtune_vl.modules.adapters import num_bytes
from torchtune_vl.recipes import config_path
from torchtune_vl.training._memory import estimate_memory

MODELS = "torchtune_vl.models.qwen2_5_vl"
GRID = (1, 40, 40)
PLACEHOLDERS = {"image_token_id": 592, "video_token_id": 593, "vocab_size": 600}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("memory")
    (directory / "config.json").write_text(json.dumps({**CONFIG, **PLACEHOLDERS}))
    return directory


def settings(checkpoint: Path, **changes: Any) -> DictConfig:
    model = {
        "_component_": f"{MODELS}.qwen2_5_vl_from_config",
        "checkpoint_dir": str(checkpoint),
    }
    return OmegaConf.create(
        {
            "model": model,
            "rows": {"max_tokens": 456, "max_patches": 1600},
            "optimizer": {"_component_": "torch.optim.AdamW", "fused": True},
            "dtype": "fp32",
            "compute_dtype": None,
            "activation_checkpointing": "none",
            "activation_offloading": False,
            "parallel": {"tensor": 1, "cpu_offload": False},
            **changes,
        }
    )


def lora(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    return {
        "_component_": f"{MODELS}.lora_qwen2_5_vl_from_config",
        "checkpoint_dir": str(checkpoint),
        "lora_attn_modules": ["q_proj", "v_proj"],
        **changes,
    }


def _address(tensor: torch.Tensor) -> int | None:
    is_quantized = hasattr(tensor, "__tensor_flatten__")
    return None if is_quantized else tensor.untyped_storage().data_ptr()


def kept_bytes(model: torch.nn.Module, batch: dict[str, Any]) -> int:
    """What autograd keeps of a real forward."""
    own = {_address(p.data) for p in model.parameters()}
    kept: dict[int | None, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _address(tensor) not in own:
            kept[_address(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(**batch)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_states_and_activations_are_those_of_a_real_model(checkpoint: Path, method: str) -> None:
    cfg = settings(checkpoint)
    if method != "full":
        cfg.model = lora(checkpoint, quantize_base=method == "qlora")
    memory = estimate_memory(cfg)

    model = torchtune_config.instantiate(cfg.model)
    assert memory["weights"] == sum(map(num_bytes, model.parameters()))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    sample = Conversation([GRID], text_tokens=27).sample(torch.Generator().manual_seed(0))
    assert len(sample["tokens"]) == 456
    batch = padded_collate_vision([sample])
    del batch["labels"]
    batch["output_positions"] = torch.arange(1)
    assert memory["activations"] == pytest.approx(kept_bytes(model, batch), rel=0.1)
    model(**batch).sum().backward()
    optimizer.step()
    assert memory["gradients"] == sum(p.grad.nbytes for p in trained)
    states = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    assert memory["optimizer"] == sum(x.nbytes for x in states)


def test_shards_and_offloading(checkpoint: Path) -> None:
    one, four = (estimate_memory(settings(checkpoint), n) for n in (1, 4))
    for name in ("weights", "gradients", "optimizer"):
        assert four[name] == pytest.approx(one[name] / 4, abs=1)
    assert four["activations"] == one["activations"]
    assert 0 < four["gathered layers"] < one["weights"]
    offloaded = estimate_memory(
        settings(
            checkpoint, parallel={"tensor": 1, "cpu_offload": True}, activation_offloading=True
        ),
        4,
    )
    assert offloaded["weights"] == offloaded["optimizer"] == offloaded["activations"] == 0
    assert offloaded["gathered layers"] == four["gathered layers"]


def test_quantized_weights_are_not_sharded(checkpoint: Path) -> None:
    cfg = settings(checkpoint, model=lora(checkpoint, quantize_base=True))
    model = torchtune_config.instantiate(cfg.model)
    quantized = sum(num_bytes(p) for p in model.parameters() if hasattr(p, "block_size"))
    assert quantized > 0
    one, four = (estimate_memory(cfg, n)["weights"] for n in (1, 4))
    assert four == pytest.approx(quantized + (one - quantized) / 4, abs=1)


def test_half_precision_computation_halves_activations(checkpoint: Path) -> None:
    whole = estimate_memory(settings(checkpoint))
    half = estimate_memory(settings(checkpoint, compute_dtype="bf16"))
    assert half["weights"] == whole["weights"]
    assert 0.5 < half["activations"] / whole["activations"] < 0.8


def test_checkpointing_keeps_inputs_of_layers(checkpoint: Path) -> None:
    none, selective, full = (
        estimate_memory(
            settings(checkpoint, model=lora(checkpoint), activation_checkpointing=mode)
        )["activations"]
        for mode in ("none", "selective", "full")
    )
    assert none > selective > full
    assert full == 4 * 456 * 128 * 4  # layers, tokens, width, bytes; the encoder is frozen


def test_8_bit_optimizer_takes_a_quarter_of_float32(checkpoint: Path) -> None:
    small = settings(checkpoint, optimizer={"_component_": "torchao.optim.AdamW8bit"})
    ratio = estimate_memory(small)["optimizer"] / estimate_memory(settings(checkpoint))["optimizer"]
    assert 0.25 < ratio < 0.27


def test_rows_of_padded_samples_are_as_long_as_can_be(checkpoint: Path) -> None:
    padded = settings(checkpoint, rows={"batch_size": 3}, tokenizer={"max_seq_len": 152})
    packed = settings(checkpoint, rows={"max_tokens": 456, "max_patches": None})
    assert estimate_memory(padded) == estimate_memory(packed)
    less = estimate_memory(settings(checkpoint, rows={"max_tokens": 456, "max_patches": 64}))
    assert less["activations"] < estimate_memory(packed)["activations"]


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = OmegaConf.load(config_path("qwen2_5_vl/full"))
    config.update(settings(checkpoint, rows=config.rows, checkpoint_dir=str(checkpoint)))
    path = tmp_path / "mine.yaml"
    OmegaConf.save(config, path)
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "--config", str(path), "--devices", "2", "dtype=bf16"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "GB on each of 2 devices, computed, not measured"
    assert [line.split("  ")[0] for line in lines[1:]][:3] == ["weights", "gradients", "optimizer"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.yaml", "nowhere.yaml"),
        ("other.yaml", "rows is missing"),
        ("qwen2_5_vl/full", "needs its config.json"),
    ],
)
def test_command_refuses(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("batch_size: 2")
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "--config", name])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
