"""A tiny model of a family with random weights, in a directory as the hub has them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quickstart.vocabulary import RANKS, write_vocabulary
from torchtune_vl.chat import CHAT_TEMPLATE
from torchtune_vl.chat._chat_template import without_marks
from torchtune_vl.models import model_from_pretrained
from torchtune_vl.models._registry import family_of

HIDDEN_SIZE = 128

# The published 3B config with smaller dimensions: vocabulary, patches, windows, M-RoPE over three
# axes and tied embeddings are those of the real model
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": HIDDEN_SIZE,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 4096,
    "max_window_layers": 4,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 4,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "in_chans": 3,
        "out_hidden_size": HIDDEN_SIZE,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "vocab_size": 151936,
}

# Likewise the published 2B config of Qwen3-VL
QWEN3_VL_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "float32",
        "eos_token_id": 151645,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "max_position_embeddings": 4096,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [12, 10, 10],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [0, 2],
        "depth": 4,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 128,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "model_type": "qwen3_vl",
        "num_heads": 4,
        "num_position_embeddings": 2304,
        "out_hidden_size": HIDDEN_SIZE,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
CONFIGS = {config["model_type"]: config for config in (CONFIG, QWEN3_VL_CONFIG)}

PREPROCESSOR_CONFIG = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}

# As published, but for the least area of an image: 64 x 64 pixels instead of 256 x 256
QWEN3_VL_PROCESSOR = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
_QWEN3_VL_PROCESSORS = {
    "preprocessor_config.json": {
        "size": {"longest_edge": 16777216, "shortest_edge": 4096},
        **QWEN3_VL_PROCESSOR,
        "image_processor_type": "Qwen2VLImageProcessorFast",
    },
    "video_preprocessor_config.json": {
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        **QWEN3_VL_PROCESSOR,
        "video_processor_type": "Qwen3VLVideoProcessor",
    },
}

GENERATION_CONFIG = {
    "bos_token_id": 151643,
    "do_sample": False,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
}


def write_tiny_checkpoint(
    directory: Path, vocabulary: Path, seed: int = 0, config: Mapping[str, Any] = CONFIG
) -> None:
    """Write a complete checkpoint with random weights.

    Args:
        directory: the checkpoint's directory, made if missing.
        vocabulary: directory with the tokenizer's files, which are copied.
        seed: seed of the weights.
        config: dimensions, in the form of the published ``config.json``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in vocabulary.glob("*.*"):
        if path.suffix in (".json", ".txt"):
            shutil.copyfile(path, directory / path.name)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    family = family_of(directory)
    processor_class = family.transform.processors.processor
    processors: dict[str, Any] = {
        "preprocessor_config.json": {**PREPROCESSOR_CONFIG, "processor_class": processor_class}
    }
    if family.transform.more_tokens:
        processors = _QWEN3_VL_PROCESSORS
        write_vocabulary(family.transform(vocabulary / RANKS), directory)
    template = family.transform.template_to_run(None) or CHAT_TEMPLATE
    for name, content in {
        **processors,
        "generation_config.json": GENERATION_CONFIG,
        "chat_template.json": {"chat_template": without_marks(template)},
    }.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    hidden_size = config.get("text_config", config)["hidden_size"]
    weights = family.names.to_published(_random_model(directory, seed, hidden_size).state_dict())
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _random_model(directory: Path, seed: int, hidden_size: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = model_from_pretrained(directory, weights=False)
    # torch's own start values suit all layers but the embedding, which is the output layer too
    torch.nn.init.normal_(model.decoder.tok_embeddings.weight, std=hidden_size**-0.5)
    return model
