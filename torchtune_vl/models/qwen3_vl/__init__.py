"""What Qwen3-VL (arXiv 2511.21631) is: its tensors, dimensions and transforms."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from torchtune_vl.chat._processor_files import text_config
from torchtune_vl.files._json import JsonObject
from torchtune_vl.files._tensor_names import TensorNames
from torchtune_vl.models import _config_json as config_json
from torchtune_vl.models._registry import ENCODER, Family
from torchtune_vl.models.qwen3_vl._transform import (
    GEOMETRY,
    Qwen3_VLImageTransform,
    Qwen3_VLTransform,
    Qwen3_VLVideoTransform,
)

# Of transformers' classes, which leave out of a config.json what equals them
_TEXT_DEFAULTS: dict[str, Any] = {
    **config_json.TEXT_DEFAULTS,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "rope_theta": 5e5,
    "mrope_section": (24, 20, 20),
    "mrope_interleaved": True,
}
_VISION_DEFAULTS: dict[str, Any] = {
    **config_json.VISION_DEFAULTS,
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "patch_size": 16,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": (8, 16, 24),
}
_MERGERS = {
    "merger.norm": "merger.norm",
    "merger.linear_fc1": "merger.mlp.w1",
    "merger.linear_fc2": "merger.mlp.w2",
    "deepstack_merger_list.{}.norm": "deepstack_mergers.{}.norm",
    "deepstack_merger_list.{}.linear_fc1": "deepstack_mergers.{}.mlp.w1",
    "deepstack_merger_list.{}.linear_fc2": "deepstack_mergers.{}.mlp.w2",
}


def _dimensions(
    config: JsonObject, text_defaults: Mapping[str, Any] = _TEXT_DEFAULTS
) -> dict[str, Any]:
    config_json.support_only(text_config(config).over(text_defaults), attention_bias=False)
    vision = config.part("vision_config").over(_VISION_DEFAULTS)
    keys: dict[str, Any] = {"width": "hidden_size", "out": "out_hidden_size"}
    dimensions = config_json.common_dimensions(config, vision, text_defaults, **keys)
    supported = {"hidden_act": "gelu_pytorch_tanh", "spatial_merge_size": GEOMETRY.merge_size}
    config_json.support_only(vision, **supported)
    rope = vision.part("rope_parameters").over({"rope_theta": 10000.0})
    config_json.support_only(rope, rope_theta=10000.0)
    if "num_attention_heads" in vision:  # transformers takes it for the other
        raise vision.error("num_attention_heads", "nothing: say num_heads")
    places = vision.whole("num_position_embeddings", most=config_json.WIDEST)
    if math.isqrt(places) ** 2 != places:
        raise vision.error("num_position_embeddings", "a square number")
    last = dimensions["vision_num_layers"] - 1
    layers = config_json.whole_numbers(vision, "deepstack_visual_indexes", 0, last)
    if sorted({*layers}) != [*layers]:
        raise vision.error("deepstack_visual_indexes", "increasing numbers")
    return {
        **dimensions,
        "vision_intermediate_dim": vision.whole("intermediate_size", most=config_json.WIDEST),
        "position_grid": math.isqrt(places),
        "deepstack_layers": layers,
    }


FAMILY = Family(
    name="Qwen3-VL",
    package="qwen3_vl",
    names=TensorNames(
        "Qwen3-VL",
        {
            **ENCODER,
            "pos_embed": "pos_embed",
            "blocks.{}.mlp.linear_fc1": "layers.{}.mlp.w1",
            "blocks.{}.mlp.linear_fc2": "layers.{}.mlp.w2",
            **_MERGERS,
        },
        frozenset({"pos_embed"}),
        is_nested=True,
    ),
    geometry=GEOMETRY,
    # After transformers' Qwen3VLVisionModel and Qwen3VLTextModel
    architecture={
        "max_seq_len": 262144,
        "rope_base": 5e6,
        "mrope_sections": (24, 20, 20),
        "mrope_interleaved": True,
        "head_dim": 128,
        "attn_bias": False,
        "qk_norm": True,
        "patch_size": 16,
        "patch_bias": True,
        "position_grid": 48,
        "vision_norm": partial(nn.LayerNorm, eps=1e-6),
        "vision_activation": partial(F.gelu, approximate="tanh"),
        "vision_gated": False,
    },
    # Layers, heads, of keys, width, feed-forward, vocabulary, tied, encoder's feed-forward, its
    # width, its layers, those of deepstack
    sizes={
        "2b": (28, 16, 8, 2048, 6144, 151936, True, 4096, 1024, 24, (5, 11, 17)),
        "4b": (36, 32, 8, 2560, 9728, 151936, True, 4096, 1024, 24, (5, 11, 17)),
        "8b": (36, 32, 8, 4096, 12288, 151936, False, 4304, 1152, 27, (8, 16, 24)),
        "32b": (64, 64, 8, 5120, 25600, 151936, False, 4304, 1152, 27, (8, 16, 24)),
    },
    dimensions=_dimensions,
    transform=Qwen3_VLTransform,
)
qwen3_vl_transform = Qwen3_VLTransform
__all__ = [
    "GEOMETRY",
    "Qwen3_VLImageTransform",
    "Qwen3_VLTransform",
    "Qwen3_VLVideoTransform",
    "qwen3_vl_transform",
    *FAMILY.functions,
]
__getattr__ = FAMILY.function
__dir__ = __all__.copy
