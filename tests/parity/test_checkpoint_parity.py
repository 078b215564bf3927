"""Checkpoints from transformers through ours and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests.parity.figures import record
from tests.reference import (
    QWEN2_VL,
    QWEN3_VL,
    QWEN3_VL_MOE,
    QWEN3_VL_TIED,
    family_prefix,
    reference_config,
    reference_model,
)
from torchtune_vl.files._tensor_names import flat_name
from torchtune_vl.models.qwen2_5_vl import qwen2_5_vl_from_config
from torchtune_vl.training import Qwen2_5_VLCheckpointer

INDEX = "model.safetensors.index.json"


def other_names(directory: Path) -> None:
    """Rename tensors to what transformers >= 4.52 calls them in memory, or back."""
    path = directory / "model.safetensors"
    weights = {}
    saved = load_file(path)
    is_nested = any(name.startswith("model.language_model.") for name in saved)
    for name, tensor in saved.items():
        if is_nested:
            name = flat_name(name)
        elif name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        weights[name] = tensor
    assert any(name.startswith("model.language_model.") for name in weights) != is_nested
    save_file(weights, path, metadata={"format": "pt"})


def shards(directory: Path) -> None:
    """Split the file of a directory into three with an index."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    weight_map = {
        name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(weights)
    }
    for filename in set(weight_map.values()):
        part = {name: weights[name] for name, f in weight_map.items() if f == filename}
        save_file(part, directory / filename, metadata={"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    path.unlink()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", ["head_dim_128", "grouped_untied", QWEN2_VL, QWEN3_VL, QWEN3_VL_TIED, QWEN3_VL_MOE]
)
@pytest.mark.parametrize("alter", [None, other_names, shards])
def test_round_trip(shape: str, alter, dtype: torch.dtype, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    reference = reference_model(reference_config(shape)).to(dtype)
    reference.save_pretrained(source)
    if alter:
        alter(source)

    checkpointer = Qwen2_5_VLCheckpointer(source, output)
    model = qwen2_5_vl_from_config(source).to(dtype)
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    checkpointer.save_checkpoint({"model": model.state_dict()}, epoch=0)

    loaded, info = AutoModelForImageTextToText.from_pretrained(
        output / "epoch_0", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    expected = reference.state_dict()
    actual = loaded.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == dtype
        assert torch.equal(actual[name], tensor), name
    record(f"{family_prefix(shape)}checkpoints: tensors after a round trip", len(expected), 0)


def test_flat_names_are_written(tmp_path: Path) -> None:
    reference_model(reference_config("head_dim_128")).save_pretrained(tmp_path / "source")
    checkpointer = Qwen2_5_VLCheckpointer(tmp_path / "source", tmp_path / "output")
    checkpointer.save_checkpoint(checkpointer.load_checkpoint(), epoch=3)
    written = load_file(tmp_path / "output" / "epoch_3" / "model.safetensors")
    assert all(name.startswith(("visual.", "model.")) for name in written)
    assert not any(name.startswith(("model.visual.", "model.language_model.")) for name in written)
    assert "lm_head.weight" not in written  # tied


def test_the_dtype_of_the_weights_is_stated(tmp_path: Path) -> None:
    """transformers loads in the dtype of the config: a stale one would round what was trained."""
    reference_model(reference_config()).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    checkpointer = Qwen2_5_VLCheckpointer(tmp_path / "source", tmp_path / "output")
    weights = {n: t.float() * 1.001 for n, t in checkpointer.load_checkpoint()["model"].items()}
    checkpointer.save_checkpoint({"model": weights}, epoch=0)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "output" / "epoch_0")
    norm = loaded.model.language_model.norm.weight
    assert norm.dtype == torch.float32
    assert torch.equal(norm, weights["decoder.norm.weight"])


def test_experts_are_read_in_both_layouts_and_written_as_published(tmp_path: Path) -> None:
    """transformers 5 writes experts the other way round, and reads both by their shapes."""
    reference_model(reference_config(QWEN3_VL_MOE)).save_pretrained(tmp_path / "source")
    first = Qwen2_5_VLCheckpointer(tmp_path / "source", tmp_path / "output")
    first.save_checkpoint(first.load_checkpoint(), epoch=0)
    experts = {
        "gate_up_proj": ([7, 80, 96], [7, 96, 80]),
        "down_proj": ([7, 96, 40], [7, 40, 96]),
    }
    for name, (theirs, published) in experts.items():
        key = f"model.language_model.layers.0.mlp.experts.{name}"
        for directory, shape in (("source", theirs), ("output/epoch_0", published)):
            stored = load_file(tmp_path / directory / "model.safetensors")
            assert [*stored[key].shape] == shape
    second = Qwen2_5_VLCheckpointer(tmp_path / "output" / "epoch_0", tmp_path / "again")
    second.save_checkpoint(second.load_checkpoint(), epoch=0)
    files = (tmp_path / d / "epoch_0" / "model.safetensors" for d in ("output", "again"))
    assert len({path.read_bytes() for path in files}) == 1
