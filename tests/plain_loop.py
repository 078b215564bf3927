"""A plain training loop over transformers' model, which knows nothing of rows, ranks or parts.

It is what a run of our recipe has to agree with: a sample at a time, in float32, adapters written
out as their papers have them (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune import config as components
from transformers import AutoModelForImageTextToText

from tests.reference import reference_inputs
from torchtune_vl.files._tensor_names import flat_name
from torchtune_vl.models._registry import family_of
from torchtune_vl.models._weights import initial_adapters
from torchtune_vl.modules.adapters import is_adapter

T = TypeVar("T")


class Adapted(nn.Module):
    """A linear layer of transformers' model and its adapter."""

    def __init__(self, base: nn.Linear, scale: float, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.a = nn.Parameter(tensors["lora_A.weight"].clone())
        self.b = nn.Parameter(tensors["lora_B.weight"].clone())
        magnitude = tensors.get("lora_magnitude_vector")
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.base.weight + self.scale * self.b @ self.a
        if self.magnitude is not None:
            # The norm is a constant in backward, as section 4.3 of the paper has it
            weight = (self.magnitude / weight.norm(dim=1).detach())[:, None] * weight
        return nn.functional.linear(x, weight, self.base.bias)


class AdaptedExperts(nn.Module):
    """What an adapter adds to a matrix of each expert, in the layout of transformers 5."""

    def __init__(self, scale: float, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(tensors["lora_A.weight"].clone())
        self.b = nn.Parameter(tensors["lora_B.weight"].clone())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.a @ self.b).mT


class PlainRun(NamedTuple):
    """What the loop gives.

    Args:
        losses: of each step.
        start: by our names, the parameters that were trained, before the first step.
        end: likewise after the last.
    """

    losses: dict[int, float]
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]


def plain_run(
    config: Path, dataset: Sequence[Mapping[str, Any]], samples: Mapping[int, Sequence[int]]
) -> PlainRun:
    """Train as a config says, on these samples.

    Args:
        config: of a run of our recipe on a checkpoint of float32 weights.
        dataset: transformed samples with labels and float patches.
        samples: of each step, the indices of its samples.

    Returns:
        Losses and trained parameters.
    """
    cfg = OmegaConf.load(config)
    ours, weights = start_of(cfg)
    names = family_of(cfg.checkpoint_dir).names
    model = AutoModelForImageTextToText.from_pretrained(cfg.checkpoint_dir).train()
    model.load_state_dict(_in_memory(names.to_published(_other_layout(weights))), strict=False)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    parameters = _trained_parameters(model, cfg, trained, initial_adapters(ours, weights, cfg.seed))
    start = _other_layout({name: p.detach().clone() for name, p in parameters.items()})
    optimizer = _optimizer(cfg, parameters)
    scheduler = None
    if cfg.lr_scheduler is not None:
        scheduler = components.instantiate(
            cfg.lr_scheduler, optimizer, num_training_steps=cfg.max_steps
        )
    losses = {}
    for step in sorted(samples):
        losses[step] = _step(model, [dataset[index] for index in samples[step]])
        if cfg.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters.values(), cfg.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return PlainRun(losses, start, _other_layout({n: p.detach() for n, p in parameters.items()}))


def _other_layout(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn experts' matrices, by our names, from ours to those of transformers 5, or back."""
    is_turned = re.compile(r".*\.experts\.\w+\.weight").fullmatch
    return {name: weight.mT if is_turned(name) else weight for name, weight in weights.items()}


def start_of(cfg: DictConfig) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Our model on the meta device, and the weights that it begins with, dequantised."""
    with torch.device("meta"):
        ours = components.instantiate(cfg.model)
    names = family_of(cfg.checkpoint_dir).names
    weights = names.from_published(load_file(Path(cfg.checkpoint_dir) / "model.safetensors"))
    for name, parameter in ours.named_parameters():
        if isinstance(parameter.data, NF4Tensor):
            blocks = parameter.data.block_size, parameter.data.scaler_block_size
            matrix = weights[name].flatten(0, -2)  # torchao knows no others
            weights[name] = to_nf4(matrix, *blocks).get_original_weight().view(parameter.shape)
    return ours, weights


def _in_memory(published: Mapping[str, T]) -> dict[str, T]:
    """The same values by the names of transformers' module."""
    flat = {flat_name(name): tensor for name, tensor in published.items()}
    return {
        name.replace("visual.", "model.visual.", 1)
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.")
        else name: tensor
        for name, tensor in flat.items()
    }


def _trained_parameters(
    model: nn.Module,
    cfg: DictConfig,
    trained: set[str],
    adapters: Mapping[str, torch.Tensor],
) -> dict[str, nn.Parameter]:
    """Put adapters into transformers' model and find what is trained, by our names."""
    model.requires_grad_(False)
    names = family_of(cfg.checkpoint_dir).names
    layers: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    for theirs, name in names.to_peft({name: name for name in trained}).items():
        if is_adapter(name):
            suffix = next(s for s in _SUFFIXES if theirs.endswith(s))
            layer = theirs.removeprefix("base_model.model.").removesuffix(f".{suffix}")
            layers.setdefault(layer, {})[suffix] = name, adapters[name]
    parameters: dict[str, nn.Parameter] = {}
    for path, tensors in layers.items():
        prefix, _, child = path.rpartition(".")
        parent = model.get_submodule(prefix)
        scale = cfg.model.lora_alpha / cfg.model.lora_rank
        values = {suffix: tensor for suffix, (_, tensor) in tensors.items()}
        layer = getattr(parent, child)
        adapted: nn.Module
        if isinstance(layer, nn.Parameter):
            adapted = AdaptedExperts(scale, values)
            register_parametrization(parent, child, adapted)
        else:
            adapted = Adapted(layer, scale, values)
            setattr(parent, child, adapted)
        for suffix, (name, _) in tensors.items():
            parameters[name] = getattr(adapted, _SUFFIXES[suffix])
    in_full = names.to_published({name: name for name in trained if not is_adapter(name)})
    for path, name in _in_memory(in_full).items():
        parameters[name] = model.get_parameter(path)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


_SUFFIXES = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}


def _optimizer(cfg: DictConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    def part_of(name: str) -> str:
        if not name.startswith("encoders."):
            return "decoder"
        return "merger" if "merger" in name else "encoder"

    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(part_of(name), []).append(parameter)
    settings = {k: v for k, v in cfg.optimizer.items() if k in ("lr", "weight_decay", "momentum")}
    kind = torch.optim.SGD if "SGD" in cfg.optimizer._component_ else torch.optim.AdamW
    return kind(
        [
            {
                "params": parameters,
                "lr": settings["lr"]
                if cfg.learning_rates[part] is None
                else cfg.learning_rates[part],
            }
            for part, parameters in groups.items()
        ],
        **settings,
    )


def _step(model: nn.Module, samples: Sequence[Mapping[str, Any]]) -> float:
    targets = sum(label != -100 for sample in samples for label in sample["labels"][1:])
    total = 0.0
    for sample in samples:
        logits = model(
            **reference_inputs([dict(sample)]), position_ids=sample["input_pos"].T[:, None]
        ).logits
        loss = nn.functional.cross_entropy(
            logits[0, :-1], torch.tensor(sample["labels"][1:]), ignore_index=-100, reduction="sum"
        )
        if loss.requires_grad:  # text alone does not, where the decoder is frozen
            (loss / targets).backward()
        total += loss.item() / targets
    return total
