"""Linear layers with low-rank adapters, and what of a model is trained.

LoRA: arXiv 2106.09685. DoRA: arXiv 2402.09353. QLoRA: arXiv 2305.14314. The layers are torchtune's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from torchtune_vl._torchao import linear_nf4
from torchtune_vl._torchtune import DoRALinear, FrozenNF4Linear, LoRALinear

Trainable = Literal["frozen", "lora", "full"]

# A linear layer of a part of a model, from its name in the part, its dimensions and its bias
LinearBuilder = Callable[[str, int, int, bool], nn.Module]

NF4_BLOCK = 64  # weights that share a scale
NF4_SCALER_BLOCK = 256  # most scales that share one of their own

# What follows the name of a layer in the names of its adapter's parameters
ADAPTER_SUFFIXES = (".lora_a.weight", ".lora_b.weight", ".magnitude")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is of an adapter."""
    return name.endswith(ADAPTER_SUFFIXES)


def plain_linear(name: str, in_dim: int, out_dim: int, bias: bool) -> nn.Linear:
    """Build a layer without an adapter; its name makes no difference."""
    return nn.Linear(in_dim, out_dim, bias=bias)


@dataclass(frozen=True)
class AdapterLinears:
    """Builds the linear layers of one part of a model.

    Args:
        trainable: "lora" for adapters on the layers that ``names`` has; "frozen" and "full" for
            none.
        names: names of the layers that are adapted.
        rank: rank of the adapters.
        alpha: their products are scaled by alpha / rank.
        dropout: dropout before them.
        use_dora: whether to decompose weights into magnitude and direction.
        quantize_base: whether weights are stored as NF4, unless they are trained.
        never_quantized: names of layers that keep their dtype.
    """

    trainable: Trainable
    names: frozenset[str]
    rank: int
    alpha: float
    dropout: float = 0.0
    use_dora: bool = False
    quantize_base: bool = False
    never_quantized: frozenset[str] = frozenset()

    def __call__(self, name: str, in_dim: int, out_dim: int, bias: bool) -> nn.Module:
        """Build a layer.

        Args:
            name: its name in the part, such as ``q_proj``.
            in_dim: width of its input.
            out_dim: width of its output.
            bias: whether it has a bias.

        Returns:
            The layer.

        Raises:
            ValueError: if its weight is to be quantized and does not divide into blocks.
        """
        is_quantized = (
            self.quantize_base and self.trainable != "full" and name not in self.never_quantized
        )
        blocks = _nf4_blocks(name, in_dim, out_dim) if is_quantized else {}
        if self.trainable == "lora" and name in self.names:
            layer = DoRA if self.use_dora else LoRALinear
            return layer(
                in_dim,
                out_dim,
                self.rank,
                self.alpha,
                self.dropout,
                use_bias=bias,
                quantize_base=is_quantized,
                **blocks,
            )
        if is_quantized:
            return FrozenNF4Linear(in_dim, out_dim, bias=bias, **blocks)
        return nn.Linear(in_dim, out_dim, bias=bias)


class DoRA(DoRALinear):
    """torchtune's layer, but it does not scale the bias, and it keeps a magnitude that was loaded.

    The paper and peft scale weights only, and so does torchtune where it merges. Recipes initialize
    magnitudes after loading weights, also where these include trained ones.
    """

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, alpha: float, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(in_dim, out_dim, rank, alpha, *args, **kwargs)
        self.rank = rank
        self.alpha = alpha
        self._is_loaded = False
        self.register_load_state_dict_pre_hook(_note_magnitude)

    def initialize_dora_magnitude(self) -> None:
        """Make the layer's output that of its weight and its LoRA, unless it was loaded."""
        if not self._is_loaded:
            super().initialize_dora_magnitude()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: input [..., in_dim].

        Returns:
            Tensor [..., out_dim].
        """
        if self._quantize_base:
            out = linear_nf4(input=x, weight=self.weight)
        else:
            out = F.linear(x, self.weight)
        if not self.disabled:
            out = self._scale() * (out + self.scaling * self.lora_b(self.lora_a(self.dropout(x))))
        return out if self.bias is None else out + self.bias

    def _scale(self) -> torch.Tensor:
        """Magnitudes by norms, which count as constants in gradients, as in the paper."""
        with torch.no_grad():
            product = self.lora_b.weight @ self.lora_a.weight
            norm = self._get_weight_norm(self.weight.to(product.dtype), product)
        return self.magnitude / norm


def _note_magnitude(
    layer: DoRA, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any
) -> None:
    layer._is_loaded |= f"{prefix}magnitude" in state_dict


def _nf4_blocks(name: str, in_dim: int, out_dim: int) -> dict[str, int]:
    """Block sizes of NF4 that divide a weight."""
    blocks, rest = divmod(in_dim * out_dim, NF4_BLOCK)
    if rest:
        raise ValueError(
            f"the weight of {name}, {out_dim} x {in_dim}, does not divide into blocks of "
            f"{NF4_BLOCK}: it cannot be quantized"
        )
    scales = next(size for size in range(NF4_SCALER_BLOCK, 0, -1) if blocks % size == 0)
    return {"block_size": NF4_BLOCK, "scaler_block_size": scales}


def train_with_adapters(module: nn.Module, names: Iterable[str]) -> None:
    """Let recipes for adapters train parameters of a module in full.

    They train what a module's ``adapter_params`` lists, see
    torchtune's ``AdapterModule``.

    Args:
        module: the module.
        names: names of its parameters.
    """
    module.adapter_params = partial(list, tuple(names))  # type: ignore[assignment]
