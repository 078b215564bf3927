"""NF4 weights (QLoRA, arXiv 2305.14314): quantized on the host, and bytes that can be sharded."""

# Shape suffixes: B blocks of weights that share a scale, C codes of a block, two in a byte

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from torchtune_vl._torchao import NF4Tensor, SubclassTensorArgs, to_nf4

_ALL_16_BITS = 2**16
_CODES = 16


class NF4Layout(NamedTuple):
    """What there is to know of an NF4 weight beside its numbers.

    Args:
        shape: of the weight.
        dtype: in which it was, and is computed with.
        block_size: weights that share a scale.
        scaler_block_size: scales that share one of their own.
    """

    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    scaler_block_size: int

    @classmethod
    def of(cls, nf4: Any) -> "NF4Layout":
        """Return that of a weight."""
        return cls(nf4.shape, nf4.dtype, nf4.block_size, nf4.scaler_block_size)

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.shape.numel() // self.block_size

    @property
    def numbers(self) -> int:
        """How many numbers of its dtype: scales of scales, their mean, and values of the codes."""
        return self.blocks // self.scaler_block_size + 1 + _CODES

    def quantize(self, weight: torch.Tensor) -> NF4Tensor:
        """Quantize a weight on the CPU as torchao's ``to_nf4`` does, to the bit."""
        return self.unpack(self.codes(weight), self.scales(weight))

    def codes(self, weight: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return the codes of blocks of a weight, by default of all, uint8 [B, C / 2].

        Of 16 bits there are so few numbers that their codes are a table, which is eight times
        faster than to compare each weight with all values, as torchao does.
        """
        blocks_BC = weight.to(self.dtype).reshape(-1, self.block_size)[first:last]
        if self.dtype.itemsize != 2:
            data = NF4Tensor.convert_to_norm_float_weight(
                blocks_BC, len(blocks_BC), self.block_size, _values(self.dtype)
            )
            return data.view(-1, self.block_size // 2)
        scaled_BC = blocks_BC / blocks_BC.abs().amax(1, keepdim=True)
        places = scaled_BC.view(torch.int16).flatten().int() & (_ALL_16_BITS - 1)
        codes_BC = _codes_of_all(self.dtype).index_select(0, places).view_as(scaled_BC)
        return codes_BC[:, ::2] << 4 | codes_BC[:, 1::2]

    def scales(self, weight: torch.Tensor) -> torch.Tensor:
        """Return all that dequantizes codes, as uint8 bytes.

        They are the scales of scales, the mean of scales, the values of codes, and the scales.
        """
        scalers, factors, mean = NF4Tensor.double_quantize_scalers(
            weight.to(self.dtype).flatten(), self.block_size, self.scaler_block_size
        )
        numbers = torch.cat([factors, mean.view(1), _values(self.dtype)])
        return torch.cat([numbers.view(torch.uint8), scalers.view(torch.uint8)])

    def empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and scales on the meta device, uint8."""
        options: dict[str, Any] = {"dtype": torch.uint8, "device": "meta"}
        codes = torch.empty(self.blocks, self.block_size // 2, **options)
        return codes, torch.empty(self.numbers * self.dtype.itemsize + self.blocks, **options)

    def unpack(self, codes: torch.Tensor, scales: torch.Tensor) -> NF4Tensor:
        """Return the weight of its codes and scales, whose memory it shares."""
        numbers, scalers = scales.tensor_split([self.numbers * self.dtype.itemsize])
        factors, mean, values = numbers.view(self.dtype).split(
            [self.numbers - 1 - _CODES, 1, _CODES]
        )
        stride = torch.empty(self.shape, device="meta").stride()
        return NF4Tensor(
            SubclassTensorArgs(self.shape, stride, 0, self.dtype, codes.device, False),
            *(self.block_size, self.blocks, self.scaler_block_size),
            *(scalers.view(torch.int8), factors, mean[0], codes.flatten()),
            nf4=values,
        )


@lru_cache
def _values(dtype: torch.dtype) -> torch.Tensor:
    """The values of codes, on the CPU."""
    return to_nf4(torch.ones(1, 64, dtype=dtype), 64, 1).nf4


@lru_cache
def _codes_of_all(dtype: torch.dtype) -> torch.Tensor:
    """The code of each number of 16 bits, by its bits."""
    numbers = torch.arange(_ALL_16_BITS, dtype=torch.int32).to(torch.int16).view(dtype)
    parts = numbers.split(2**12)
    codes = [NF4Tensor.quantize_tensor_nearest(part, _values(dtype)) for part in parts]
    return torch.cat(codes).to(torch.uint8)


def quantize(weight: torch.Tensor, block_size: int, scaler_block_size: int) -> NF4Tensor:
    """Quantize a weight; on the meta device at no cost, where torchao takes seconds.

    Matrices are quantized where they are, several in one tensor on the CPU.
    """
    if weight.ndim == 2 and not weight.is_meta:
        return to_nf4(weight, block_size, scaler_block_size)
    layout = NF4Layout(weight.shape, weight.dtype, block_size, scaler_block_size)
    return layout.unpack(*layout.empty()) if weight.is_meta else layout.quantize(weight)


def dequantize(nf4: Any) -> torch.Tensor:
    """Return what torchao's ``get_original_weight`` does, in twice the weight's bytes, not 7 times.

    Two codes at a time, by a table of all pairs.
    """
    scales_B = nf4.dequantize_scalers(
        nf4.quantized_scalers, nf4.quantization_factor, nf4.scaler_block_size
    )
    pairs = torch.cartesian_prod(nf4.nf4, nf4.nf4)
    values_BC = F.embedding(nf4.quantized_data.int(), pairs).view(len(scales_B), -1)
    return values_BC.mul_(scales_B[:, None]).view(nf4.shape)


class PackedNF4:
    """A layer whose NF4 weight is kept as two parameters of bytes, which FSDP shards as any other.

    torchao's own sharding of NF4 divides scales of scales, and few numbers of devices divide those.
    """

    layout: NF4Layout
    nf4_codes: torch.Tensor
    nf4_scales: torch.Tensor

    @property
    def weight(self) -> NF4Tensor:
        """The weight, of bytes that have been gathered."""
        return self.layout.unpack(self.nf4_codes, self.nf4_scales)


def pack_nf4(layer: Any) -> None:
    """Make a layer on the meta device a :class:`PackedNF4` of its own class."""
    layer.layout = NF4Layout.of(layer._parameters.pop("weight").data)
    for name, empty in zip(("nf4_codes", "nf4_scales"), layer.layout.empty(), strict=True):
        layer.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    layer.__class__ = _packed(type(layer))  # type: ignore[arg-type]


@lru_cache  # one class for all layers of a kind: torch.compile would compile anew for another
def _packed(kind: Any) -> Any:
    return type(f"Packed{kind.__name__}", (PackedNF4, kind), {})


def nf4_layout(layer: Any) -> NF4Layout | None:
    """Return the layout of a layer's weight, None if it is not quantized."""
    if isinstance(layer, PackedNF4):
        return layer.layout
    weight = layer.weight.data
    return NF4Layout.of(weight) if isinstance(weight, NF4Tensor) else None
