"""Random models of the benchmarks: published architectures with dimensions of their own."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedModel

from quickstart.checkpoint import CONFIGS, QWEN3_VL_CONFIG

# What the published config of the 30B has that those of the dense sizes do not
_EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "text_config": {
        "model_type": "qwen3_vl_moe_text",
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
    },
    "tie_word_embeddings": False,
}


def with_dimensions(config: Mapping[str, Any], dimensions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` with other dimensions, of its parts too."""
    merged: Any = OmegaConf.to_container(OmegaConf.merge(config, dimensions))
    return merged


# Of quickstart, by family
SMALL = {**CONFIGS, "qwen3_vl_moe": with_dimensions(QWEN3_VL_CONFIG, _EXPERTS)}
# transformers' implementations on a CPU; batched_mm, its third, copies the weights of all experts
# for each token that takes them, which is 150 MB for a token of the 30B's layers
_IMPLEMENTATIONS = ("eager", "grouped_mm")


def take_fastest_experts(model: PreTrainedModel, call: Callable[[], object]) -> None:
    """Let a model of transformers, if it has experts, compute them as is fastest for a call."""
    if not hasattr(model.config.get_text_config(), "num_experts"):
        return
    seconds = {}
    for implementation in _IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        call()  # allocates
        start = time.perf_counter()
        call()
        seconds[implementation] = time.perf_counter() - start
    model.set_experts_implementation(min(seconds, key=seconds.__getitem__))
