"""The published sizes on the meta device: parameter counts, names and shapes."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from torchtune_vl.files._tensor_names import flat_name
from torchtune_vl.models import model_from_pretrained, qwen2_5_vl, qwen2_vl, qwen3_vl, qwen3_vl_moe
from torchtune_vl.models._config_json import TEXT_DEFAULTS
from torchtune_vl.models.qwen2_5_vl import (
    qwen2_5_vl_3b,
    qwen2_5_vl_7b,
    qwen2_5_vl_32b,
    qwen2_5_vl_72b,
)
from torchtune_vl.models.qwen2_vl import (
    qwen2_vl_2b,
    qwen2_vl_7b,
    qwen2_vl_72b,
)
from torchtune_vl.modules.decoder import FeedForward


def hub_config(
    hidden: int, layers: int, heads: int, kv_heads: int, ff: int, vocab: int, vision_ff: int
) -> dict[str, Any]:
    """A config.json in the flat layout of the published checkpoints."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ff,
        "max_position_embeddings": 128000,
        "max_window_layers": layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": vocab == 151936,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": vision_ff,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab,
    }


def qwen2_vl_config(
    hidden: int, layers: int, heads: int, kv_heads: int, ff: int, vocab: int
) -> dict[str, Any]:
    """Likewise of Qwen2-VL's."""
    return {
        **hub_config(hidden, layers, heads, kv_heads, ff, vocab, 0),
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "max_position_embeddings": 32768,
        "model_type": "qwen2_vl",
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "hidden_act": "quick_gelu",
            "hidden_size": hidden,
            "in_chans": 3,
            "mlp_ratio": 4,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


# builder, config, parameters, of these vision
SIZES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int, int]] = {
    "3B": (
        qwen2_5_vl_3b,
        hub_config(2048, 36, 16, 2, 11008, 151936, 3420),
        3_754_622_976,
        668_684_288,
    ),
    "7B": (
        qwen2_5_vl_7b,
        hub_config(3584, 28, 28, 4, 18944, 152064, 3420),
        8_292_166_656,
        676_550_144,
    ),
    "32B": (
        qwen2_5_vl_32b,
        hub_config(5120, 64, 40, 8, 27648, 152064, 3456),
        33_452_718_336,
        688_841_984,
    ),
    "72B": (
        qwen2_5_vl_72b,
        hub_config(8192, 80, 64, 8, 29568, 152064, 3456),
        73_410_777_344,
        704_573_696,
    ),
}


def qwen3_vl_config(
    *,
    hidden: int,
    layers: int,
    heads: int,
    ff: int,
    tied: bool,
    vision: tuple[int, int, int, list[int]],
) -> dict[str, Any]:
    """Likewise of Qwen3-VL's, whose decoder is a part of its own."""
    vision_hidden, vision_ff, depth, deepstack = vision
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": ff,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
            # The larger ones say it outside alone
            **({"tie_word_embeddings": True} if tied else {}),
            "vocab_size": 151936,
        },
        "tie_word_embeddings": tied,
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": deepstack,
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision_hidden,
            "in_channels": 3,
            "intermediate_size": vision_ff,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


_SMALL_ENCODER = (1024, 4096, 24, [5, 11, 17])
_LARGE_ENCODER = (1152, 4304, 27, [8, 16, 24])
QWEN3_VL_SIZES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int, int]] = {
    "2B": (
        qwen3_vl.qwen3_vl_2b,
        qwen3_vl_config(
            hidden=2048, layers=28, heads=16, ff=6144, tied=True, vision=_SMALL_ENCODER
        ),
        2_127_532_032,
        406_957_056,
    ),
    "4B": (
        qwen3_vl.qwen3_vl_4b,
        qwen3_vl_config(
            hidden=2560, layers=36, heads=32, ff=9728, tied=True, vision=_SMALL_ENCODER
        ),
        4_437_815_808,
        415_347_712,
    ),
    "8B": (
        qwen3_vl.qwen3_vl_8b,
        qwen3_vl_config(
            hidden=4096, layers=36, heads=32, ff=12288, tied=False, vision=_LARGE_ENCODER
        ),
        8_767_123_696,
        576_388_336,
    ),
    "32B": (
        qwen3_vl.qwen3_vl_32b,
        qwen3_vl_config(
            hidden=5120, layers=64, heads=64, ff=25600, tied=False, vision=_LARGE_ENCODER
        ),
        33_357_390_064,
        595_266_800,
    ),
}


def qwen3_vl_moe_config(*, hidden: int, layers: int, heads: int, width: int) -> dict[str, Any]:
    """Likewise of its experts, whose decoder does not say that it is untied."""
    config = qwen3_vl_config(
        hidden=hidden, layers=layers, heads=heads, ff=3 * hidden, tied=False, vision=_LARGE_ENCODER
    )
    config |= {"architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    config["text_config"] |= {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
    }
    config["vision_config"] |= {"model_type": "qwen3_vl_moe"}
    return config | {"model_type": "qwen3_vl_moe"}


QWEN3_VL_MOE_SIZES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int, int]] = {
    "30B-A3B": (
        qwen3_vl_moe.qwen3_vl_moe_30b_a3b,
        qwen3_vl_moe_config(hidden=2048, layers=48, heads=32, width=768),
        31_070_754_032,
        538_631_408,
    ),
    "235B-A22B": (
        qwen3_vl_moe.qwen3_vl_moe_235b_a22b,
        qwen3_vl_moe_config(hidden=4096, layers=94, heads=64, width=1536),
        235_670_022_896,
        576_388_336,
    ),
}

# Qwen2-VL's, likewise
QWEN2_VL_SIZES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int, int]] = {
    "2B": (
        qwen2_vl_2b,
        qwen2_vl_config(1536, 28, 12, 2, 8960, 151936),
        2_208_985_600,
        665_271_296,
    ),
    "7B": (
        qwen2_vl_7b,
        qwen2_vl_config(3584, 28, 28, 4, 18944, 152064),
        8_291_375_616,
        675_759_104,
    ),
    "72B": (
        qwen2_vl_72b,
        qwen2_vl_config(8192, 80, 64, 8, 29568, 152064),
        73_405_560_320,
        699_356_672,
    ),
}


ALL = {
    **SIZES,
    **{f"Qwen2-VL {size}": facts for size, facts in QWEN2_VL_SIZES.items()},
    **{f"Qwen3-VL {size}": facts for size, facts in QWEN3_VL_SIZES.items()},
    **{f"Qwen3-VL {size}": facts for size, facts in QWEN3_VL_MOE_SIZES.items()},
}


def reference_config(config: dict[str, Any]) -> PreTrainedConfig:
    return CONFIG_MAPPING[config["model_type"]](**config)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def attributes(model: nn.Module) -> list[str]:
    """What a builder sets beside the shapes: text of all modules."""
    decoder, encoder = model.decoder, model.encoders["vision"]
    return [
        repr(model),
        f"{decoder.head_dim} {decoder.rope_base} {decoder.mrope_sections} {decoder.max_seq_len}",
        f"{decoder.mrope_interleaved} {encoder.deepstack_layers}",
        f"{sorted(encoder.full_attention_layers)} {encoder.head_dim} {model.placeholder_ids}",
        f"{[layer.mlp.num_active for layer in decoder.layers if hasattr(layer.mlp, 'router')]}",
        f"{type(decoder.output).__name__} {[mlp.activation for mlp in feed_forwards(model)]}",
    ]


def feed_forwards(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FeedForward)]


@pytest.mark.parametrize("size", ALL)
def test_builder_has_the_published_tensors(size: str) -> None:
    builder, config, parameters, vision_parameters = ALL[size]
    with torch.device("meta"):
        ours = builder()
        reference = AutoModelForImageTextToText.from_config(reference_config(config))
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert sum(p.numel() for p in ours.encoders.parameters()) == vision_parameters
    expected = {flat_name(name): p.shape for name, p in reference.named_parameters()}
    package = import_module(f"torchtune_vl.models.{config['model_type']}")
    written = package.FAMILY.names.to_published(shapes(ours))
    # transformers has experts' matrices the other way round in memory
    in_memory = {
        flat_name(name): (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape
        for name, shape in written.items()
    }
    assert in_memory == expected
    is_nested = config["model_type"].startswith("qwen3_vl")
    assert "model.visual.patch_embed.proj.weight" in written if is_nested else True
    assert all(name.startswith("model.") or name == "lm_head.weight" for name in written) or (
        not is_nested
    )


@pytest.mark.parametrize("size", ALL)
def test_model_from_either_config_is_the_builders(size: str, tmp_path: Path) -> None:
    builder, config, _, _ = ALL[size]
    flat, nested = tmp_path / "flat", tmp_path / "nested"
    flat.mkdir()
    (flat / "config.json").write_text(json.dumps(config))
    reference_config(config).save_pretrained(nested)
    with torch.device("meta"):
        expected = builder()
        for directory in (flat, nested):
            model = model_from_pretrained(directory, weights=False)
            assert shapes(model) == shapes(expected)
            assert attributes(model) == attributes(expected)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (Qwen2_5_VLConfig(), qwen2_5_vl),
        (Qwen2VLConfig(), qwen2_vl),
        (Qwen3VLConfig(), qwen3_vl),
        (Qwen3VLMoeConfig(), qwen3_vl_moe),
    ],
)
def test_defaults_of_missing_keys_are_the_references(config: Any, family: Any) -> None:
    rope = ("rope_theta", "mrope_section", "mrope_interleaved", "use_sliding_window")
    text = getattr(family, "_TEXT_DEFAULTS", TEXT_DEFAULTS)
    for part, defaults in (
        (config.text_config, text),
        (config.vision_config, family._VISION_DEFAULTS),
    ):
        plain = {key: value for key, value in defaults.items() if key not in rope}
        assert {key: getattr(part, key) for key in plain} == plain
    assert config.text_config.rope_parameters["rope_theta"] == text["rope_theta"]


def moe_dimensions(tmp_path: Path, **text: Any) -> dict[str, Any]:
    config = qwen3_vl_moe_config(hidden=2048, layers=6, heads=32, width=768)
    config["text_config"] |= text
    config["text_config"] = {k: v for k, v in config["text_config"].items() if v != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return qwen3_vl_moe.FAMILY.all_dimensions(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 3, "mlp_only_layers": [2]},
        {"mlp_only_layers": [0, 5]},
        {"mlp_only_layers": None, "decoder_sparse_step": "absent"},
        {"num_experts": "absent", "num_experts_per_tok": "absent", "moe_intermediate_size": 32},
        {
            "head_dim": "absent",
            "rope_scaling": {"mrope_section": [12, 10, 10], "mrope_interleaved": True},
        },
        {"tie_word_embeddings": True},
    ],
)
def test_experts_are_where_the_reference_has_them(text: dict[str, Any], tmp_path: Path) -> None:
    moe_dimensions(tmp_path, **text)
    with torch.device("meta"):
        ours = model_from_pretrained(tmp_path, weights=False)
        config = json.loads((tmp_path / "config.json").read_text())
        reference = AutoModelForImageTextToText.from_config(reference_config(config))
    names = qwen3_vl_moe.FAMILY.names.to_published(shapes(ours))
    assert names.keys() == reference.state_dict().keys()
    sparse = [layer.mlp for layer in ours.decoder.layers if hasattr(layer.mlp, "router")]
    expected = [
        layer.mlp.gate
        for layer in reference.model.language_model.layers
        if hasattr(layer.mlp, "gate")
    ]
    assert [(len(mlp.experts.gate_up_proj.weight), mlp.num_active) for mlp in sparse] == [
        (gate.num_experts, gate.top_k) for gate in expected
    ]
    head_dim = reference.config.text_config.head_dim
    assert ours.decoder.head_dim == head_dim


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is False, expected True: nothing else is"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129, expected a whole number from"),
        ({"mlp_only_layers": [6]}, "mlp_only_layers.0 is 6, expected a whole number from 0 to 5"),
        ({"moe_intermediate_size": 1024}, "moe_intermediate_size is 1024, expected neither"),
        ({"moe_intermediate_size": 2048}, "moe_intermediate_size is 2048, expected neither"),
    ],
)
def test_other_experts_are_refused(text: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        moe_dimensions(tmp_path, **text)
    assert "\n" not in str(error.value)
