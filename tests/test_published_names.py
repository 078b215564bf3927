"""Names of exported tensors beside those that the published checkpoints have."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quickstart.checkpoint import CONFIG, write_tiny_checkpoint
from torchtune_vl.checkpoint._adapters import Adapter, save_adapter
from torchtune_vl.files._safetensors import INDEX
from torchtune_vl.models._registry import family_of
from torchtune_vl.models.qwen2_5_vl import (
    lora_qwen2_5_vl_from_config,
    qwen2_5_vl_3b,
    qwen2_5_vl_7b,
    qwen2_5_vl_32b,
    qwen2_5_vl_72b,
    qwen2_5_vl_tune_to_hf,
)
from torchtune_vl.modules.adapters import is_adapter
from torchtune_vl.training import export, merge

BOTH = ("weight", "bias")
# What vLLM and SGLang look for: the names of the published files, number of layers left open
DECODER_LAYER = {
    "input_layernorm": ("weight",),
    "post_attention_layernorm": ("weight",),
    "self_attn.q_proj": BOTH,
    "self_attn.k_proj": BOTH,
    "self_attn.v_proj": BOTH,
    "self_attn.o_proj": ("weight",),
    "mlp.gate_proj": ("weight",),
    "mlp.up_proj": ("weight",),
    "mlp.down_proj": ("weight",),
}
ENCODER_LAYER = {
    "norm1": ("weight",),
    "norm2": ("weight",),
    "attn.qkv": BOTH,
    "attn.proj": BOTH,
    "mlp.gate_proj": BOTH,
    "mlp.up_proj": BOTH,
    "mlp.down_proj": BOTH,
}
ELSEWHERE = {
    "visual.patch_embed.proj": ("weight",),
    "visual.merger.ln_q": ("weight",),
    "visual.merger.mlp.0": BOTH,
    "visual.merger.mlp.2": BOTH,
    "model.embed_tokens": ("weight",),
    "model.norm": ("weight",),
}
# Adapters are for the modules as transformers has them in memory, where peft puts them
DECODER_LINEARS = [name for name in DECODER_LAYER if "_proj" in name]
ENCODER_LINEARS = [name for name in ENCODER_LAYER if not name.startswith("norm")]


def flat_names(decoder_layers: int, encoder_layers: int, tied: bool) -> set[str]:
    modules = {
        **ELSEWHERE,
        **({} if tied else {"lm_head": ("weight",)}),
        **{
            f"model.layers.{i}.{name}": tensors
            for i in range(decoder_layers)
            for name, tensors in DECODER_LAYER.items()
        },
        **{
            f"visual.blocks.{i}.{name}": tensors
            for i in range(encoder_layers)
            for name, tensors in ENCODER_LAYER.items()
        },
    }
    return {f"{module}.{tensor}" for module, tensors in modules.items() for tensor in tensors}


def adapter_names(decoder_layers: int, encoder_layers: int) -> set[str]:
    modules = {
        *(
            f"language_model.layers.{i}.{name}"
            for i in range(decoder_layers)
            for name in DECODER_LINEARS
        ),
        *(f"visual.blocks.{i}.{name}" for i in range(encoder_layers) for name in ENCODER_LINEARS),
        "visual.merger.mlp.0",
        "visual.merger.mlp.2",
    }
    return {f"base_model.model.model.{m}.lora_{x}.weight" for m in modules for x in "AB"}


@pytest.mark.parametrize(
    ("builder", "layers", "tied"),
    [
        (qwen2_5_vl_3b, 36, True),
        (qwen2_5_vl_7b, 28, False),
        (qwen2_5_vl_32b, 64, False),
        (qwen2_5_vl_72b, 80, False),
    ],
)
def test_names_of_the_sizes(builder, layers: int, tied: bool) -> None:
    with torch.device("meta"):
        weights = builder().state_dict()
    assert qwen2_5_vl_tune_to_hf(weights).keys() == flat_names(layers, 32, tied)


def names_in(directory: Path) -> dict[str, set[str]]:
    """Names of the tensors of each file of weights."""
    names = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names[path.name] = {*file.keys()}
    return names


@pytest.fixture(scope="module")
def base(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    write_tiny_checkpoint(directory, vocabulary)
    return directory


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    model = lora_qwen2_5_vl_from_config(
        base,
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "qkv", "output_proj"],
        apply_lora_to_mlp=True,
        encoder_trainable="lora",
        fusion_trainable="lora",
    )
    tensors = {name: t for name, t in model.state_dict().items() if is_adapter(name)}
    save_adapter(Adapter(tensors, 8, 16, str(base), family_of(base).names), directory)
    return directory


def check_shards(directory: Path) -> None:
    files = names_in(directory)
    expected = flat_names(CONFIG["num_hidden_layers"], CONFIG["vision_config"]["depth"], True)
    count = len(files)
    assert count > 1
    assert {*files} == {f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)}
    assert set().union(*files.values()) == expected
    assert sum(map(len, files.values())) == len(expected)
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    assert weight_map == {name: file for file, names in files.items() for name in names}


def test_shards(base: Path, tmp_path: Path) -> None:
    export(base, tmp_path / "exported", torch.bfloat16, "1MB")
    check_shards(tmp_path / "exported")


def test_merged_shards(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "merged", None, "1MB")
    check_shards(tmp_path / "merged")


def test_adapters(adapter: Path, tmp_path: Path) -> None:
    export(adapter, tmp_path / "exported", torch.bfloat16)
    expected = adapter_names(CONFIG["num_hidden_layers"], CONFIG["vision_config"]["depth"])
    for directory in (adapter, tmp_path / "exported"):
        assert names_in(directory) == {"adapter_model.safetensors": expected}


def test_others_may_read_what_is_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    export(base, tmp_path / "exported")
    usual = (tmp_path / "usual").stat().st_mode
    written = [*(tmp_path / "exported").iterdir(), *adapter.iterdir()]
    assert {path.stat().st_mode for path in written} == {usual}
