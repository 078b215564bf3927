"""Which family a checkpoint is of, the one place that knows, and what there is of each family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torchtune_vl.chat import ChatTransform
from torchtune_vl.files._json import JsonObject
from torchtune_vl.files._tensor_names import TensorNames
from torchtune_vl.media import Geometry
from torchtune_vl.models import lora_model_from_pretrained, model_from_pretrained
from torchtune_vl.models._config_json import read_config

# What differs between sizes, in the order of the tables of families, which may have fewer
_COLUMNS = (
    *("num_layers", "num_heads", "num_kv_heads", "embed_dim", "intermediate_dim", "vocab_size"),
    *("tie_word_embeddings", "vision_intermediate_dim", "vision_embed_dim", "vision_num_layers"),
    *("deepstack_layers", "expert_dim"),
)
# Modules of all vision encoders, published and ours
ENCODER = {
    "patch_embed.proj": "patch_embed.proj",
    "blocks.{}.norm1": "layers.{}.sa_norm",
    "blocks.{}.norm2": "layers.{}.mlp_norm",
    "blocks.{}.attn.qkv": "layers.{}.attn.qkv",
    "blocks.{}.attn.proj": "layers.{}.attn.output_proj",
}
_MERGER = {
    "merger.ln_q": "merger.norm",
    "merger.mlp.0": "merger.mlp.w1",
    "merger.mlp.2": "merger.mlp.w2",
}
# Of every published checkpoint; transformers' class default for max_pixels is smaller (1,003,520)
geometry = partial(
    Geometry,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    min_pixels=3136,
    max_pixels=12845056,
)
# The model_type of each family's config.json, by which its package here is called too
_MODEL_TYPES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True)
class Family:
    """What is a family's own, as checkpoints, reports and recipes ask for it."""

    name: str  # as people write it
    package: str  # its model_type and folder, with which the names of its functions begin
    names: TensorNames
    geometry: Geometry
    architecture: Mapping[str, Any]  # dimensions that its sizes share, beside the geometry
    sizes: Mapping[str, tuple[Any, ...]]  # others, by what names of published sizes end in
    dimensions: Callable[[JsonObject], dict[str, Any]]  # these of a config.json
    transform: type[ChatTransform]

    def all_dimensions(self, directory: str | Path) -> dict[str, Any]:
        """Return the dimensions of the model of a checkpoint of this family."""
        given = self.dimensions(read_config(directory))
        return {"geometry": self.geometry, **self.architecture, **given}

    def function(self, name: str) -> Any:
        """Return a function of the package, which asks for it by a ``__getattr__`` of its own."""
        if name not in self.functions:
            raise AttributeError(f"module '{__package__}.{self.package}' has no attribute {name!r}")
        return self.functions[name]()

    @cached_property
    def functions(self) -> dict[str, Callable[[], Any]]:
        """What the package gives to others by name, each made when it is asked for.

        Builders from dimensions, from a checkpoint's config and of published sizes, each plain,
        with adapters (``lora_``) and, of sizes, with those of NF4 weights (``qlora_``); renaming of
        tensors, from and to published checkpoints and peft's files; and the tensor-parallel plan.
        """
        # torchtune, on which models stand, takes seconds to import
        builders, plans = "torchtune_vl.models._builders", "torchtune_vl.modules.parallelism"

        def builder(name: str, **settings: Any) -> Callable[[], Any]:
            settings = {"geometry": self.geometry, **self.architecture, **settings}
            return lambda: partial(getattr(import_module(builders), name), **settings)

        plain, lora = partial(builder, "vision_language_model"), partial(builder, "with_adapters")
        qlora = partial(lora, quantize_base=True)
        p = self.package
        sizes = [(size, dict(zip(_COLUMNS, own, strict=False))) for size, own in self.sizes.items()]
        return {
            p: plain(),
            f"lora_{p}": lora(),
            f"{p}_from_config": lambda: partial(model_from_pretrained, weights=False),
            f"lora_{p}_from_config": lambda: partial(lora_model_from_pretrained, weights=False),
            f"{p}_hf_to_tune": lambda: self.names.from_published,
            f"{p}_tune_to_hf": lambda: self.names.to_published,
            f"{p}_peft_to_tune": lambda: self.names.from_peft,
            f"{p}_tune_to_peft": lambda: self.names.to_peft,
            f"{p}_tp_plan": lambda: import_module(plans).decoder_tp_plan,
            **{f"{p}_{size}": plain(**own) for size, own in sizes},
            **{f"lora_{p}_{size}": lora(**own) for size, own in sizes},
            **{f"qlora_{p}_{size}": qlora(**own) for size, own in sizes},
        }


def tensor_names(family: str, *, norm_bias: bool, **mlp: str) -> TensorNames:
    """Name a family's tensors, by its published names of the layers of its encoder's ``mlp``."""
    layers = {f"blocks.{{}}.mlp.{name}": f"layers.{{}}.mlp.{ours}" for name, ours in mlp.items()}
    norms = () if norm_bias else ("blocks.{}.norm1", "blocks.{}.norm2", "merger.ln_q")
    return TensorNames(
        family, {**ENCODER, **_MERGER, **layers}, frozenset({"patch_embed.proj", *norms})
    )


def family_of(directory: str | Path) -> Family:
    """Return the family of a checkpoint, or raise ``ValueError`` if that is not known here."""
    config = read_config(directory)
    model_type = config.content.get("model_type")
    found = [family for family in families() if family.package == model_type]
    if not found:
        expected = " or ".join(map(repr, _MODEL_TYPES)) + ": this is a checkpoint of another model"
        raise config.over({"model_type": None}).error("model_type", expected)
    return found[0]


def families() -> list[Family]:
    """Return all families, in the order in which they came to be."""
    return [import_module(f"{__package__}.{model_type}").FAMILY for model_type in _MODEL_TYPES]
