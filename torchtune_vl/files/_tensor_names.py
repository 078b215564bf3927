"""Names of tensors: the published ones, ours and peft's. Shapes and values are the same in all."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

T = TypeVar("T")
Names = Mapping[str, str]

PREFIX_OF_PEFT = "base_model.model."
# What follows the name of an adapted layer: ours, and peft's
_ADAPTERS = {
    "lora_a.weight": "lora_A.weight",
    "lora_b.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
# {} stands for the index of a layer
_DECODER = {
    "model.embed_tokens": "decoder.tok_embeddings",
    "model.norm": "decoder.norm",
    "lm_head": "decoder.output",
    "model.layers.{}.input_layernorm": "decoder.layers.{}.sa_norm",
    "model.layers.{}.post_attention_layernorm": "decoder.layers.{}.mlp_norm",
    "model.layers.{}.self_attn.q_proj": "decoder.layers.{}.attn.q_proj",
    "model.layers.{}.self_attn.k_proj": "decoder.layers.{}.attn.k_proj",
    "model.layers.{}.self_attn.v_proj": "decoder.layers.{}.attn.v_proj",
    "model.layers.{}.self_attn.o_proj": "decoder.layers.{}.attn.output_proj",
    "model.layers.{}.self_attn.q_norm": "decoder.layers.{}.attn.q_norm",
    "model.layers.{}.self_attn.k_norm": "decoder.layers.{}.attn.k_norm",
    "model.layers.{}.mlp.gate_proj": "decoder.layers.{}.mlp.w1",
    "model.layers.{}.mlp.down_proj": "decoder.layers.{}.mlp.w2",
    "model.layers.{}.mlp.up_proj": "decoder.layers.{}.mlp.w3",
    "model.layers.{}.mlp.gate": "decoder.layers.{}.mlp.router",
}
# Weights that are called as modules are
_EXPERTS = {
    "model.layers.{}.mlp.experts.gate_up_proj": "decoder.layers.{}.mlp.experts.gate_up_proj.weight",
    "model.layers.{}.mlp.experts.down_proj": "decoder.layers.{}.mlp.experts.down_proj.weight",
}
# Modules whose names are followed by an index
_INDEXED = re.compile(r"\.(layers|blocks|deepstack_merger_list|deepstack_mergers)\.(\d+)\.")
_WITH_BIAS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class TensorNames:
    """The names of a family's tensors: its methods give values, by names, other names.

    They raise ``ValueError`` with all names that are of no tensor, and for two names of one tensor.

    Args:
        family: name of the family, for errors.
        encoder: from published names of the vision encoder's modules, behind ``visual.``, to ours,
            behind ``encoders.vision.``; ``{}`` stands for the index of a layer.
        without_bias: those of them that have a weight only.
        is_nested: whether the published names are those that transformers >= 4.52 has in memory.
    """

    def __init__(
        self,
        family: str,
        encoder: Names,
        without_bias: Collection[str] = (),
        *,
        is_nested: bool = False,
    ) -> None:
        self.family = family
        self.is_nested = is_nested
        modules = [(theirs, ours, theirs.endswith(_WITH_BIAS)) for theirs, ours in _DECODER.items()]
        modules += [
            (f"visual.{theirs}", f"encoders.vision.{ours}", theirs not in without_bias)
            for theirs, ours in encoder.items()
        ]
        self._flat = {ours: theirs for theirs, ours in _EXPERTS.items()}  # by our names
        self._in_peft: dict[str, str] = {}
        for theirs, ours, has_bias in modules:
            for kind in ("weight", "bias") if has_bias else ("weight",):
                self._flat[f"{ours}.{kind}"] = f"{theirs}.{kind}"
            for kind, kind_in_peft in _ADAPTERS.items():
                self._in_peft[f"{ours}.{kind}"] = f"{theirs}.{kind_in_peft}"
        for theirs, ours in _EXPERTS.items():
            for kind in ("lora_a.weight", "lora_b.weight"):
                adapter = f"{ours.removesuffix('weight')}{kind}"
                self._in_peft[adapter] = f"{theirs}.{_ADAPTERS[kind]}"
        self._in_peft |= self._flat
        self._from_flat = {theirs: ours for ours, theirs in self._flat.items()}
        self._from_peft = {theirs: ours for ours, theirs in self._in_peft.items()}

    def from_published(self, state_dict: Mapping[str, T]) -> dict[str, T]:
        """Rename tensors from published names, or those transformers >= 4.52 has in memory."""
        return self._rename(state_dict, self._from_flat, flat_name)

    def to_published(self, state_dict: Mapping[str, T]) -> dict[str, T]:
        """Rename our tensors as a checkpoint has them that transformers and servers load."""
        renamed = self._rename(state_dict, self._flat)
        return {_nested(n): v for n, v in renamed.items()} if self.is_nested else renamed

    def from_peft(self, state_dict: Mapping[str, T]) -> dict[str, T]:
        """Rename the tensors of peft's ``adapter_model.safetensors``, of any transformers."""
        return self._rename(state_dict, self._from_peft, _name_in_base)

    def to_peft(self, state_dict: Mapping[str, T]) -> dict[str, T]:
        """Rename adapters, and parameters trained in full beside them, as peft saves them."""
        renamed = self._rename(state_dict, self._in_peft)
        return {PREFIX_OF_PEFT + _nested(name): value for name, value in renamed.items()}

    def _rename(
        self, state_dict: Mapping[str, T], templates: Names, simplify: Callable[[str], str] = str
    ) -> dict[str, T]:
        names: dict[str, str] = {}  # from new ones to old ones
        unknown = []
        for name in state_dict:
            simple = simplify(name)
            template = templates.get(_INDEXED.sub(r".\1.{}.", simple))
            if template is None:
                unknown.append(name)
                continue
            indices = (index for _, index in _INDEXED.findall(simple))
            other = names.setdefault(template.format(*indices), name)
            if other != name:
                raise ValueError(f"{other} and {name} are two names of one tensor: remove one")
        if unknown:
            told = ", ".join(sorted(unknown))
            raise ValueError(f"{len(unknown)} names are not of {self.family}'s tensors: {told}")
        return {new: state_dict[name] for new, name in names.items()}


def flat_name(name: str) -> str:
    """Return the short form of a name of transformers, by which first families are published."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def peft_module(name: str) -> str:
    """Return transformers' name of the module whose tensor has this name in peft's file."""
    return re.sub(r"(\.lora_[AB])?\.[^.]*$", "", name.removeprefix(PREFIX_OF_PEFT))


def _name_in_base(name: str) -> str:
    # peft writes the weight of an adapted output layer too, by the name that it has in memory
    return flat_name(name.removeprefix(PREFIX_OF_PEFT).replace(".base_layer.", "."))


def _nested(name: str) -> str:
    """The name that a tensor of a short name has in transformers >= 4.52."""
    if name.startswith("visual."):
        return f"model.{name}"
    return re.sub(r"^model\.", "model.language_model.", name)
