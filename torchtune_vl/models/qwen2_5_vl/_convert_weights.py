"""Names of tensors: the hub's and ours. Shapes and values are the same in both."""

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")

# {} stands for the index of a layer
_LINEAR = ("weight", "bias")
_OURS_FROM_HUB = {
    "model.embed_tokens.weight": "decoder.tok_embeddings.weight",
    "model.norm.weight": "decoder.norm.weight",
    "lm_head.weight": "decoder.output.weight",
    "model.layers.{}.input_layernorm.weight": "decoder.layers.{}.sa_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "decoder.layers.{}.mlp_norm.weight",
    **{
        f"model.layers.{{}}.self_attn.{projection}.{kind}": (
            f"decoder.layers.{{}}.attn.{projection}.{kind}"
        )
        for projection in ("q_proj", "k_proj", "v_proj")
        for kind in _LINEAR
    },
    "model.layers.{}.self_attn.o_proj.weight": "decoder.layers.{}.attn.output_proj.weight",
    "model.layers.{}.mlp.gate_proj.weight": "decoder.layers.{}.mlp.w1.weight",
    "model.layers.{}.mlp.down_proj.weight": "decoder.layers.{}.mlp.w2.weight",
    "model.layers.{}.mlp.up_proj.weight": "decoder.layers.{}.mlp.w3.weight",
    "visual.patch_embed.proj.weight": "encoders.vision.patch_embed.proj.weight",
    "visual.blocks.{}.norm1.weight": "encoders.vision.layers.{}.sa_norm.weight",
    "visual.blocks.{}.norm2.weight": "encoders.vision.layers.{}.mlp_norm.weight",
    "visual.merger.ln_q.weight": "encoders.vision.merger.norm.weight",
    **{
        f"visual.{hub}.{kind}": f"encoders.vision.{ours}.{kind}"
        for hub, ours in {
            "blocks.{}.attn.qkv": "layers.{}.attn.qkv",
            "blocks.{}.attn.proj": "layers.{}.attn.output_proj",
            "blocks.{}.mlp.gate_proj": "layers.{}.mlp.w1",
            "blocks.{}.mlp.down_proj": "layers.{}.mlp.w2",
            "blocks.{}.mlp.up_proj": "layers.{}.mlp.w3",
            "merger.mlp.0": "merger.mlp.w1",
            "merger.mlp.2": "merger.mlp.w2",
        }.items()
        for kind in _LINEAR
    },
}
_HUB_FROM_OURS = {ours: hub for hub, ours in _OURS_FROM_HUB.items()}


def qwen2_5_vl_hf_to_tune(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename the tensors of a published checkpoint to the names of our model.

    Takes the published names (``visual.*``, ``model.*``, ``lm_head.*``) and those that
    transformers >= 4.52 has in memory (``model.visual.*``, ``model.language_model.*``).

    Args:
        state_dict: from the hub's names to values of any kind.

    Returns:
        The same values by our names.

    Raises:
        ValueError: if a name is of no tensor of Qwen2.5-VL; it lists all of these.
    """
    return rename(state_dict, lambda name: tune_from_hub(published_name(name)))


def qwen2_5_vl_tune_to_hf(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename the tensors of our model to those of a published checkpoint.

    Args:
        state_dict: from our names to values of any kind.

    Returns:
        The same values by the published names, which transformers, vLLM and SGLang load.

    Raises:
        ValueError: if a name is of no tensor of our model; it lists all of these.
    """
    return rename(state_dict, hub_from_tune)


def published_name(name: str) -> str:
    """Return the published form of a hub name, whichever of the two it is."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def tune_from_hub(name: str) -> str | None:
    """Return our name of a published tensor, or None if there is no such tensor."""
    return _translate(name, _OURS_FROM_HUB)


def hub_from_tune(name: str) -> str | None:
    """Return the published name of our tensor, or None if there is no such tensor."""
    return _translate(name, _HUB_FROM_OURS)


def _translate(name: str, templates: Mapping[str, str]) -> str | None:
    template = re.sub(r"\.(layers|blocks)\.\d+\.", r".\1.{}.", name)
    if template not in templates:
        return None
    return templates[template].format(*re.findall(r"\.(?:layers|blocks)\.(\d+)\.", name))


def rename(state_dict: Mapping[str, T], translate: Callable[[str], str | None]) -> dict[str, T]:
    """Rename all keys, or raise ``ValueError`` with those that ``translate`` does not know.

    Two names of one tensor, such as transformers' old one and its new one, are an error too.
    """
    names = {name: translate(name) for name in state_dict}
    unknown = sorted(name for name, new in names.items() if new is None)
    if unknown:
        raise ValueError(
            f"{len(unknown)} names are not of Qwen2.5-VL's tensors: {', '.join(unknown)}"
        )
    first: dict[str, str] = {}
    for name, new in names.items():
        other = first.setdefault(str(new), name)
        if other != name:
            raise ValueError(f"{other} and {name} are two names of one tensor: remove one of both")
    return {new: state_dict[name] for name, new in names.items() if new is not None}
