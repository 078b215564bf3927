"""Small random models of transformers, and batches for them, to compare with."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from torchtune_vl.modules.layout import mrope_positions, vision_index

VOCAB_SIZE = 600
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = 590, 591, 592, 593

# The real head dimension and sections; grouped heads with an output layer of its own; as many key
# as query heads, and an encoder that attends over frames first.
SHAPES: dict[str, dict[str, Any]] = {
    "head_dim_128": {
        "text": {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
        "sections": [16, 24, 24],
        "vision": {"hidden_size": 160, "num_heads": 2, "fullatt_block_indexes": [1, 3]},
        "tied": True,
    },
    "grouped_untied": {
        "text": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
        "sections": [8, 12, 12],
        "vision": {"hidden_size": 64, "num_heads": 4, "fullatt_block_indexes": [2]},
        "tied": False,
    },
    "ungrouped": {
        "text": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3},
        "sections": [4, 6, 6],
        "vision": {
            "hidden_size": 96,
            "num_heads": 3,
            "fullatt_block_indexes": [0],
        },
        "tied": False,
    },
}
# The first family, and one more: no windows, a norm with biases, quick GELU
QWEN2_VL = "qwen2_vl"
SHAPES[QWEN2_VL] = {
    "text": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "sections": [8, 12, 12],
    "vision": {"embed_dim": 64, "num_heads": 4, "hidden_size": 256, "mlp_ratio": 3},
    "tied": False,
}
# Heads that do not divide the width, learned positions that frames have more and fewer of, features
# into several layers
QWEN3_VL, QWEN3_VL_TIED = "qwen3_vl", "qwen3_vl_tied"
_DEEPSTACK = {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
SHAPES[QWEN3_VL] = {
    "text": {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "sections": [12, 10, 10],
    "vision": {"hidden_size": 64, "num_heads": 4, **_DEEPSTACK},
    "tied": False,
}
SHAPES[QWEN3_VL_TIED] = {
    "text": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    "sections": [4, 2, 2],
    "vision": {"hidden_size": 48, "num_heads": 3, **_DEEPSTACK, "deepstack_visual_indexes": [3]},
    "tied": True,
}
# Experts that do not divide into the tokens' choices, and a layer without
QWEN3_VL_MOE = "qwen3_vl_moe"
SHAPES[QWEN3_VL_MOE] = {
    "text": {
        **SHAPES[QWEN3_VL]["text"],
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "sections": [12, 10, 10],
    "vision": {"hidden_size": 64, "num_heads": 4, **_DEEPSTACK},
    "tied": False,
}


def family_of_shape(shape: str) -> str:
    """The family of a shape, as ``config.json`` calls it."""
    others = {shape: shape for shape in (QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE)}
    others[QWEN3_VL_TIED] = QWEN3_VL
    return others.get(shape, "qwen2_5_vl")


def family_prefix(shape: str) -> str:
    """How rows of the report begin that are of another family than the first."""
    prefixes = {
        "qwen2_vl": "Qwen2-VL, ",
        "qwen3_vl": "Qwen3-VL, ",
        "qwen3_vl_moe": "Qwen3-VL MoE, ",
    }
    return prefixes.get(family_of_shape(shape), "")


def has_steps_apart(shape: str) -> bool:
    """Whether each step of a video stands behind its time, in the family of a shape."""
    return family_of_shape(shape) in (QWEN3_VL, QWEN3_VL_MOE)


def reference_config(
    shape: str = "grouped_untied", *, vocab_size: int = VOCAB_SIZE, **tokens: int
) -> PreTrainedConfig:
    dimensions = SHAPES[shape]
    tokens = tokens or {
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    vision = {"intermediate_size": 200, "out_hidden_size": dimensions["text"]["hidden_size"]}
    family = family_of_shape(shape)
    if family == "qwen2_5_vl":
        vision["tokens_per_second"] = 2
    return CONFIG_MAPPING[family](
        text_config={
            "vocab_size": vocab_size,
            "intermediate_size": 320,
            "num_hidden_layers": 3,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": dimensions["sections"],
            },
            "bos_token_id": None,
            "eos_token_id": None,
            **dimensions["text"],
        },
        vision_config={
            "depth": 4,
            **(vision if family != "qwen2_vl" else {}),
            **dimensions["vision"],
        },
        tie_word_embeddings=dimensions["tied"],
        **tokens,
    )


def reference_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with weights large enough for attention to differ between tokens."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                parameter.normal_(1.0, 0.2)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0.0, 0.1)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.2)
            else:  # those of experts are [experts, outputs, inputs]
                inputs = parameter[0, 0] if parameter.ndim == 3 else parameter[0]
                parameter.normal_(0.0, 1.0 / inputs.numel() ** 0.5)
    return model


@dataclass
class Conversation:
    """Random text with media of the given grids between."""

    grids: list[tuple[int, int, int]]
    text_tokens: int = 9
    seconds_per_step: list[float] = field(default_factory=list)

    @property
    def intervals(self) -> list[float]:
        """Temporal positions between steps of each medium, two of them a second of video."""
        seconds = iter(self.seconds_per_step)
        return [1.0 if t == 1 else 2 * next(seconds) for t, _, _ in self.grids]

    def sample(self, generator: torch.Generator, shape: str = "") -> dict[str, Any]:
        """The sample as our transform would give it."""
        family = family_of_shape(shape)
        intervals = self.intervals if family == "qwen2_5_vl" else [1.0] * len(self.grids)
        geometry = import_module(f"torchtune_vl.models.{family}").GEOMETRY
        tokens: list[int] = []
        places: list[tuple[int, int, int]] = []  # of placeholders side by side
        for t, h, w in self.grids:
            pad = IMAGE_PAD if t == 1 else VIDEO_PAD
            tokens += torch.randint(0, 580, (self.text_tokens,), generator=generator).tolist()
            steps = [(1, h, w)] * t if has_steps_apart(shape) else [(t, h, w)]
            for number, (own_t, _, _) in enumerate(steps):
                if number:
                    tokens += torch.randint(0, 580, (5,), generator=generator).tolist()
                tokens += [VISION_START, *[pad] * (own_t * h * w // 4), VISION_END]
            places += steps
        tokens += torch.randint(0, 580, (self.text_tokens,), generator=generator).tolist()
        grid_thw = torch.tensor(self.grids, dtype=torch.int64).reshape(-1, 3)
        if has_steps_apart(shape):
            intervals = [1.0] * len(places)
        sample: dict[str, Any] = {
            "tokens": tokens,
            "labels": tokens,
            "input_pos": mrope_positions(
                tokens,
                torch.tensor(places, dtype=torch.int64).reshape(-1, 3),
                intervals,
                placeholder_ids=(IMAGE_PAD, VIDEO_PAD),
                merge_size=2,
            ),
        }
        if self.grids:
            count, values = int(grid_thw.prod(1).sum()), geometry.values_per_patch
            patches = torch.randn(count, values, generator=generator)
            vision = {"patches": patches, "grid_thw": grid_thw}
            sample["encoder_input"] = {"vision": {**vision, **vision_index(grid_thw, geometry)}}
        return sample


def reference_inputs(samples: list[dict[str, Any]], pad: str = "right") -> dict[str, Any]:
    """The same samples as arguments of transformers' forward."""
    length = max(len(sample["tokens"]) for sample in samples)
    input_ids = torch.zeros(len(samples), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        n = len(sample["tokens"])
        columns = slice(0, n) if pad == "right" else slice(length - n, length)
        input_ids[row, columns] = torch.tensor(sample["tokens"])
        attention_mask[row, columns] = 1
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == IMAGE_PAD).int() + 2 * (input_ids == VIDEO_PAD).int(),
    }
    vision = [s["encoder_input"]["vision"] for s in samples if "encoder_input" in s]
    for is_video, pixels, grids in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        media = [
            (patches, grid)
            for v in vision
            for patches, grid in zip(
                v["patches"].split(v["grid_thw"].prod(1).tolist()), v["grid_thw"], strict=True
            )
            if (grid[0] > 1) == is_video
        ]
        if media:
            inputs[pixels] = torch.cat([patches for patches, _ in media])
            inputs[grids] = torch.stack([grid for _, grid in media])
    return inputs
