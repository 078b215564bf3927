"""What Qwen3-VL's mixtures of experts (arXiv 2511.21631) have that its dense sizes do not."""

from dataclasses import replace
from typing import Any

from torchtune_vl.chat._processor_files import text_config
from torchtune_vl.files._json import JsonObject
from torchtune_vl.models import _config_json as config_json
from torchtune_vl.models import qwen3_vl
from torchtune_vl.models.qwen3_vl import GEOMETRY
from torchtune_vl.models.qwen3_vl import Qwen3_VLTransform as qwen3_vl_moe_transform

# Of transformers' classes, as those of the dense sizes; the dimension of a head is that of the
# width then
_TEXT_DEFAULTS: dict[str, Any] = {
    **{key: value for key, value in qwen3_vl._TEXT_DEFAULTS.items() if key != "head_dim"},
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "num_experts": 60,
}
_VISION_DEFAULTS = qwen3_vl._VISION_DEFAULTS


def _dimensions(config: JsonObject) -> dict[str, Any]:
    given = text_config(config)
    text = given.over(_TEXT_DEFAULTS)
    # Releases of transformers before 5 state it, later ones leave it out
    config_json.support_only(text.over({"norm_topk_prob": True}), norm_topk_prob=True)
    hidden, heads = text.whole("hidden_size"), text.whole("num_attention_heads")
    defaults = {**_TEXT_DEFAULTS, "head_dim": hidden // heads}
    dimensions = qwen3_vl._dimensions(config, defaults)
    # transformers 5 writes this name
    count = "num_local_experts" if "num_local_experts" in given else "num_experts"
    num_experts = text.whole(count, most=config_json.WIDEST)
    width = text.whole("moe_intermediate_size", most=config_json.WIDEST)
    if hidden in (width, 2 * width):
        # https://github.com/huggingface/transformers/issues/47031
        told = "neither hidden_size nor half of it: the two layouts in which files have experts"
        raise text.error("moe_intermediate_size", f"{told} would look alike")
    layers, step = range(dimensions["num_layers"]), text.whole("decoder_sparse_step")
    dense = {layer for layer in layers if (layer + 1) % step}
    if "mlp_only_layers" in given:
        dense |= {*config_json.whole_numbers(given, "mlp_only_layers", 0, layers[-1])}
    return {
        **dimensions,
        # The decoder's own setting, which says true by default, does not count
        "tie_word_embeddings": config.over({"tie_word_embeddings": False}).flag(
            "tie_word_embeddings"
        ),
        "num_experts": num_experts,
        "num_active_experts": text.whole("num_experts_per_tok", most=num_experts),
        "expert_dim": width,
        "dense_layers": tuple(sorted(dense)),
    }


FAMILY = replace(
    qwen3_vl.FAMILY,
    name="Qwen3-VL MoE",
    package="qwen3_vl_moe",
    architecture={
        **qwen3_vl.FAMILY.architecture,
        "num_experts": 128,
        "num_active_experts": 8,
    },
    # As those of the dense sizes, and the width of an expert
    sizes={
        "30b_a3b": (
            *(48, 32, 4, 2048, 6144, 151936, False),
            *(4304, 1152, 27, (8, 16, 24), 768),
        ),
        "235b_a22b": (
            *(94, 64, 4, 4096, 12288, 151936, False),
            *(4304, 1152, 27, (8, 16, 24), 1536),
        ),
    },
    dimensions=_dimensions,
)
__all__ = ["GEOMETRY", "qwen3_vl_moe_transform", *FAMILY.functions]
__getattr__ = FAMILY.function
__dir__ = __all__.copy
