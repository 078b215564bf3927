"""Names of tensors: the published ones, ours and peft's. Shapes and values are the same in all."""

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")

_PREFIX_OF_PEFT = "base_model.model."
# What follows the name of an adapted layer
_PEFT_FROM_OURS = {
    "lora_a.weight": "lora_A.weight",
    "lora_b.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
_OURS_FROM_PEFT = {peft: ours for ours, peft in _PEFT_FROM_OURS.items()}
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
    "model.layers.{}.mlp.gate_proj": "decoder.layers.{}.mlp.w1",
    "model.layers.{}.mlp.down_proj": "decoder.layers.{}.mlp.w2",
    "model.layers.{}.mlp.up_proj": "decoder.layers.{}.mlp.w3",
}
_WITH_BIAS = tuple(f"self_attn.{name}_proj" for name in "qkv")


class TensorNames:
    """The names of a family's tensors.

    Methods take dicts from names to values of any kind, and return the same values by other names.
    They raise ``ValueError`` with all names that are of no tensor, and for two names of one tensor.

    Args:
        family: name of the family, for errors.
        encoder: from published names of the vision encoder's modules, behind ``visual.``, to ours,
            behind ``encoders.vision.``; ``{}`` stands for the index of a layer.
        without_bias: those of them that have a weight only.
    """

    def __init__(
        self, family: str, encoder: Mapping[str, str], without_bias: frozenset[str] = frozenset()
    ) -> None:
        self.family = family
        self._ours: dict[str, str] = {}
        for theirs, ours in _DECODER.items():
            self._add(theirs, ours, theirs.endswith(_WITH_BIAS))
        for theirs, ours in encoder.items():
            self._add(f"visual.{theirs}", f"encoders.vision.{ours}", theirs not in without_bias)
        self._published = {ours: theirs for theirs, ours in self._ours.items()}

    def _add(self, theirs: str, ours: str, has_bias: bool) -> None:
        for kind in ("weight", "bias") if has_bias else ("weight",):
            self._ours[f"{theirs}.{kind}"] = f"{ours}.{kind}"

    def from_published(self, state_dict: Mapping[str, T]) -> dict[str, T]:
        """Rename the tensors of a published checkpoint to the names of our model.

        Takes the published names (``visual.*``, ``model.*``, ``lm_head.*``) and those that
        transformers >= 4.52 has in memory (``model.visual.*``, ``model.language_model.*``).
        """
        return self._rename(state_dict, lambda name: _translate(published_name(name), self._ours))

    def to_published(self, state_dict: Mapping[str, T]) -> dict[str, T]:
        """Rename our tensors as a checkpoint has them that transformers and servers load."""
        return self._rename(state_dict, lambda name: _translate(name, self._published))

    def to_peft(self, state_dict: Mapping[str, T]) -> dict[str, T]:
        """Rename adapters, and parameters trained in full beside them, as peft saves them."""
        return self._rename(state_dict, self._peft_name)

    def from_peft(self, state_dict: Mapping[str, T]) -> dict[str, T]:
        """Rename the tensors of peft's ``adapter_model.safetensors`` to the names of our model.

        Takes the names of modules in transformers >= 4.52, and those before.
        """
        return self._rename(state_dict, self._name_from_peft)

    def _peft_name(self, name: str) -> str | None:
        layer, suffix = _split(name, _PEFT_FROM_OURS)
        published = _translate(layer, self._published)
        if published is None:
            return None
        in_memory = re.sub(r"^model(?=\.)", "model.language_model", published)
        in_memory = re.sub(r"^(?=visual\.)", "model.", in_memory)
        return _PREFIX_OF_PEFT + _joined(in_memory, _PEFT_FROM_OURS.get(suffix))

    def _name_from_peft(self, name: str) -> str | None:
        # peft writes the weight of an adapted output layer too, by the name that it has in memory
        in_base = name.removeprefix(_PREFIX_OF_PEFT).replace(".base_layer.", ".")
        layer, suffix = _split(published_name(in_base), _OURS_FROM_PEFT)
        ours = _translate(layer, self._ours)
        return None if ours is None else _joined(ours, _OURS_FROM_PEFT.get(suffix))

    def _rename(
        self, state_dict: Mapping[str, T], translate: Callable[[str], str | None]
    ) -> dict[str, T]:
        names = {name: translate(name) for name in state_dict}
        unknown = sorted(name for name, new in names.items() if new is None)
        if unknown:
            raise ValueError(
                f"{len(unknown)} names are not of {self.family}'s tensors: {', '.join(unknown)}"
            )
        first: dict[str, str] = {}
        for name, new in names.items():
            other = first.setdefault(str(new), name)
            if other != name:
                raise ValueError(
                    f"{other} and {name} are two names of one tensor: remove one of both"
                )
        return {new: state_dict[name] for new, name in first.items()}


def published_name(name: str) -> str:
    """Return the published form of a name of transformers, whichever of the two it is."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def peft_module(name: str) -> str:
    """Return transformers' name of the module whose tensor has this name in peft's file."""
    tensor, _ = _split(name.removeprefix(_PREFIX_OF_PEFT), _OURS_FROM_PEFT)
    return tensor.rpartition(".")[0]


def _translate(name: str, templates: Mapping[str, str]) -> str | None:
    template = re.sub(r"\.(layers|blocks)\.\d+\.", r".\1.{}.", name)
    if template not in templates:
        return None
    return templates[template].format(*re.findall(r"\.(?:layers|blocks)\.(\d+)\.", name))


def _split(name: str, suffixes: Mapping[str, str]) -> tuple[str, str]:
    """The weight that a tensor adapts and what marks it, or a tensor's own name and nothing."""
    for suffix in suffixes:
        if name.endswith(f".{suffix}"):
            return f"{name.removesuffix(suffix)}weight", suffix
    return name, ""


def _joined(weight: str, suffix: str | None) -> str:
    return f"{weight.removesuffix('weight')}{suffix}" if suffix else weight
