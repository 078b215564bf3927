"""Facts of the published Qwen2.5-VL checkpoints, which any directory can be held against.

They are written down here once more, not taken from the code that they serve to check.
"""

# sha256 of Qwen's qwen.tiktoken: a line "base64(token) id" for each token, in the order of ids
VOCABULARY_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
VOCABULARY_SIZE = 151_643

# sha256 of the lines of merges.txt without its "#version", joined by line breaks
MERGES_SHA256 = "bbeef245f0b03a9613753068e5799c2496290005594c68f09eed68feedbe6d1f"
NUM_MERGES = 151_387

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_PLAIN = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
# id and whether `skip_special_tokens` leaves it out
ADDED_TOKENS = {
    name: (VOCABULARY_SIZE + number, name in _SPECIAL)
    for number, name in enumerate((*_SPECIAL, *_PLAIN))
}
END_TOKEN = "<|im_end|>"
PADDING_TOKEN = "<|endoftext|>"

# preprocessor_config.json. How large images may be is a choice of whoever trains ...
PIXEL_LIMITS = {"min_pixels": 3136, "max_pixels": 12_845_056}
# ... and what the encoder was trained with is not
IMAGE_SETTINGS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "rescale_factor": 1 / 255,
    "resample": 3,
}
