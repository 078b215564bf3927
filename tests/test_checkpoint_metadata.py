"""Metadata of checkpoints with wrong and impossible values: a sentence with file and key, or none.

Every value of every file is replaced by each of a list of others.
"""

import json
import math
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quickstart.checkpoint import GENERATION_CONFIG, PREPROCESSOR_CONFIG
from quickstart.vocabulary import write_vocabulary
from tests.finetune_runs import NARROW
from torchtune_vl.files._directory import write_manifest
from torchtune_vl.files._safetensors import write_shards
from torchtune_vl.models._config_json import read_config
from torchtune_vl.models._registry import family_of
from torchtune_vl.models.qwen2_5_vl import (
    Qwen2_5_VLTokenizer,
    Qwen2_5_VLTransform,
    qwen2_5_vl_from_config,
    qwen2_5_vl_tune_to_hf,
)
from torchtune_vl.training import Qwen2_5_VLCheckpointer

WRONG: tuple[Any, ...] = (
    *(None, True, "", "x", -1, 0, 1.5, 10**9, 10**30, math.nan, math.inf),
    *([], {}, [1], [None], {"a": 1}, [[[]]], ["x"]),
)
TOKENS = [bytes([i]) for i in range(256)] + [b"ab", b"cd"]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL += ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
IDS = {name: len(TOKENS) + i for i, name in enumerate(SPECIAL)}
FLAT = {
    **NARROW,
    "vocab_size": 300,
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
}
# As transformers 5 writes it
NESTED = {
    "model_type": "qwen2_5_vl",
    "image_token_id": FLAT["image_token_id"],
    "video_token_id": FLAT["video_token_id"],
    "tie_word_embeddings": True,
    "vision_config": FLAT["vision_config"],
    "text_config": {
        **{
            key: FLAT[key]
            for key in (
                *("attention_dropout", "hidden_act", "hidden_size", "intermediate_size"),
                *("max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
                *("num_key_value_heads", "rms_norm_eps", "use_sliding_window", "vocab_size"),
            )
        },
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": NARROW["rope_scaling"]["mrope_section"],
        },
    },
}
# What is another setting, and no wrong one
RIGHT = [
    ("max_position_embeddings", 10**9),
    ("max_position_embeddings", 10**30),
    ("rope_theta", 1.5),
    ("rope_theta", 10**9),
    ("max_pixels", 10**9),
    ("longest_edge", 10**9),
    ("chat_template", ""),
    ("chat_template", "x"),
    ("fullatt_block_indexes", []),
    ("fullatt_block_indexes", 0),
    ("text_config", {}),
    ("text_config", {"a": 1}),
    ("content", "x"),
    ("image_mean", 0),
    ("size", 0),
    ("size", 10**9),
    ("size", 10**30),
    ("xxh3_128", ""),
    ("xxh3_128", "x"),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A complete checkpoint of two files of weights, with a tiny vocabulary."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    ranks = tmp_path / "tiny.tiktoken"
    ranks.write_text("\n".join(f"{b64encode(t).decode()} {i}" for i, t in enumerate(TOKENS)))
    write_vocabulary(Qwen2_5_VLTokenizer(ranks, special_tokens=IDS), directory)
    for name, content in {
        "config.json": FLAT,
        "preprocessor_config.json": {**PREPROCESSOR_CONFIG, "size": {"longest_edge": 12845056}},
        "generation_config.json": GENERATION_CONFIG,
        "chat_template.json": {"chat_template": "{{ messages }}"},
    }.items():
        (directory / name).write_text(json.dumps(content))
    torch.manual_seed(0)
    weights = qwen2_5_vl_tune_to_hf(qwen2_5_vl_from_config(directory).state_dict())
    write_shards(weights, directory, max_shard_size="150KB")
    write_manifest(directory)
    return directory


def config(directory: Path) -> Any:
    dimensions = family_of(directory).dimensions(read_config(directory))
    return dimensions, transform(directory)


def weights(directory: Path) -> Any:
    state = Qwen2_5_VLCheckpointer(directory, directory.parent / "out").load_checkpoint()["model"]
    return {name: tensor.tolist() for name, tensor in state.items() if "norm" in name}


def transform(directory: Path) -> Any:
    made = Qwen2_5_VLTransform.from_pretrained(directory)
    images = made.image_transform
    return (
        made.encode("abcd <|im_end|>"),
        made.special_tokens,
        made.decode([*IDS.values(), 256]),
        made.decode([*IDS.values(), 256], skip_special_tokens=True),
        made.tokens_per_second,
        made.prompts.chat_template if hasattr(made.prompts, "chat_template") else None,
        (images.min_pixels, images.max_pixels, images.image_mean, images.image_std),
    )


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where all values are, and of lists and objects of many equal ones, some."""
    yield path
    keys: list[Any] = []
    if isinstance(node, dict | list):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    for key in [*keys[:4], *keys[-1:]] if len(keys) > 40 else keys:
        yield from places(node[key], (*path, key))


def altered(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = altered(content[path[0]], path[1:], value)
    return copy


CASES: list[tuple[str, Callable[[Path], Any], Any]] = [
    ("config.json", config, FLAT),
    ("config.json", config, NESTED),
    ("preprocessor_config.json", transform, None),
    ("tokenizer.json", transform, None),
    ("chat_template.json", transform, None),
    ("generation_config.json", transform, None),
    ("model.safetensors.index.json", weights, None),
    ("checksums.json", weights, None),
]


@pytest.mark.parametrize(("name", "read", "content"), CASES)
def test_wrong_values(
    directory: Path, name: str, read: Callable[[Path], Any], content: Any
) -> None:
    path = directory / name
    content = content or json.loads(path.read_text())
    if name != "checksums.json":
        (directory / "checksums.json").unlink()
    path.write_text(json.dumps(content))
    expected = read(directory)
    checked = 0
    for place in places(content):
        for value in WRONG:
            key = next((str(key) for key in reversed(place) if isinstance(key, str)), "")
            names_no_file = key.endswith((".weight", ".bias")) and value == "x"
            if (key, value) in RIGHT or names_no_file or (not place and isinstance(value, dict)):
                continue
            path.write_text(json.dumps(altered(content, place, value)))
            try:
                result = read(directory)
            except ValueError as error:
                message = str(error)
                assert str(path) in message, (place, value)
                assert key[:5] in message, (place, value)
                assert "\n" not in message, (place, value)
                assert len(message) < 800, (place, value)
            else:
                assert result == expected, (place, value)
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("text", ["", "{", "[" * 10**6, '{"a":' * 10**6, "\ufeff{}", "\udce4"])
@pytest.mark.parametrize(
    "name", sorted({name for name, _, _ in CASES} - {"generation_config.json"})
)
def test_damaged_files(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    if name != "checksums.json":
        (directory / "checksums.json").unlink()
    with pytest.raises(ValueError, match="not a JSON file") as error:
        (transform if "token" in name or "p" in name.split(".")[0] else weights)(directory)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 400
