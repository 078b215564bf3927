"""Qwen2.5-VL (arXiv 2502.13923)."""

from torchtune_vl.models.qwen2_5_vl._component_builders import lora_qwen2_5_vl, qwen2_5_vl
from torchtune_vl.models.qwen2_5_vl._convert_adapters import (
    qwen2_5_vl_peft_to_tune,
    qwen2_5_vl_tune_to_peft,
)
from torchtune_vl.models.qwen2_5_vl._convert_weights import (
    qwen2_5_vl_hf_to_tune,
    qwen2_5_vl_tune_to_hf,
)
from torchtune_vl.models.qwen2_5_vl._grounding import boxes_in_original
from torchtune_vl.models.qwen2_5_vl._image_transform import Qwen2_5_VLImageTransform
from torchtune_vl.models.qwen2_5_vl._model_builders import (
    lora_qwen2_5_vl_3b,
    lora_qwen2_5_vl_7b,
    lora_qwen2_5_vl_32b,
    lora_qwen2_5_vl_72b,
    lora_qwen2_5_vl_from_config,
    qlora_qwen2_5_vl_3b,
    qlora_qwen2_5_vl_7b,
    qlora_qwen2_5_vl_32b,
    qlora_qwen2_5_vl_72b,
    qwen2_5_vl_3b,
    qwen2_5_vl_7b,
    qwen2_5_vl_32b,
    qwen2_5_vl_72b,
    qwen2_5_vl_from_config,
)
from torchtune_vl.models.qwen2_5_vl._parallelism import qwen2_5_vl_tp_plan
from torchtune_vl.models.qwen2_5_vl._tokenizer import Qwen2_5_VLTokenizer
from torchtune_vl.models.qwen2_5_vl._transform import Qwen2_5_VLTransform, qwen2_5_vl_transform
from torchtune_vl.models.qwen2_5_vl._video_transform import Qwen2_5_VLVideoTransform

__all__ = [
    "Qwen2_5_VLImageTransform",
    "Qwen2_5_VLTokenizer",
    "Qwen2_5_VLTransform",
    "Qwen2_5_VLVideoTransform",
    "boxes_in_original",
    "lora_qwen2_5_vl",
    "lora_qwen2_5_vl_3b",
    "lora_qwen2_5_vl_7b",
    "lora_qwen2_5_vl_32b",
    "lora_qwen2_5_vl_72b",
    "lora_qwen2_5_vl_from_config",
    "qlora_qwen2_5_vl_3b",
    "qlora_qwen2_5_vl_7b",
    "qlora_qwen2_5_vl_32b",
    "qlora_qwen2_5_vl_72b",
    "qwen2_5_vl",
    "qwen2_5_vl_3b",
    "qwen2_5_vl_7b",
    "qwen2_5_vl_32b",
    "qwen2_5_vl_72b",
    "qwen2_5_vl_from_config",
    "qwen2_5_vl_hf_to_tune",
    "qwen2_5_vl_peft_to_tune",
    "qwen2_5_vl_tp_plan",
    "qwen2_5_vl_transform",
    "qwen2_5_vl_tune_to_hf",
    "qwen2_5_vl_tune_to_peft",
]
