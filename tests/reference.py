"""Small random models of transformers, and batches for them, to compare with."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
)

from torchtune_vl.models.qwen2_5_vl import GEOMETRY
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


def family_prefix(shape: str) -> str:
    """How rows of the report begin that are of another family than the first."""
    return "Qwen2-VL, " if shape == QWEN2_VL else ""


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
    vision["tokens_per_second"] = 2
    is_first = shape != QWEN2_VL
    config_class = Qwen2_5_VLConfig if is_first else Qwen2VLConfig
    return config_class(
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
        vision_config={"depth": 4, **(vision if is_first else {}), **dimensions["vision"]},
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
            else:
                parameter.normal_(0.0, 1.0 / parameter[0].numel() ** 0.5)
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
        is_first = shape != QWEN2_VL
        intervals = self.intervals if is_first else [1.0] * len(self.grids)
        geometry = GEOMETRY if is_first else replace(GEOMETRY, window_size=None)
        tokens: list[int] = []
        for t, h, w in self.grids:
            pad = IMAGE_PAD if t == 1 else VIDEO_PAD
            tokens += torch.randint(0, 580, (self.text_tokens,), generator=generator).tolist()
            tokens += [VISION_START, *[pad] * (t * h * w // 4), VISION_END]
        tokens += torch.randint(0, 580, (self.text_tokens,), generator=generator).tolist()
        grid_thw = torch.tensor(self.grids, dtype=torch.int64).reshape(-1, 3)
        sample: dict[str, Any] = {
            "tokens": tokens,
            "labels": tokens,
            "input_pos": mrope_positions(
                tokens,
                grid_thw,
                intervals,
                placeholder_ids=(IMAGE_PAD, VIDEO_PAD),
                merge_size=2,
            ),
        }
        if self.grids:
            patches = torch.randn(int(grid_thw.prod(1).sum()), 1176, generator=generator)
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
