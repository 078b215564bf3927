"""NF4 weights: quantized as torchao does, and kept as bytes."""

import pytest
import torch

from torchtune_vl._torchao import to_nf4
from torchtune_vl.modules.nf4 import NF4Layout, dequantize, quantize

SMALL, MANY = (256, 64), (512, 384)
WEIGHTS = {
    "normal": torch.randn(MANY),
    "tiny": torch.randn(MANY) * 1e-6,
    "ties": torch.randint(-16, 17, MANY) / 16,
    "outliers": torch.randn(MANY) ** 9,
    "a block of zeros": torch.cat([torch.zeros(SMALL), torch.randn(SMALL)]),
    "a single block of scales": torch.randn(SMALL),
}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_quantized_as_torchao_does(weight: torch.Tensor, dtype: torch.dtype) -> None:
    weight = weight.to(dtype)
    expected = to_nf4(weight, 64, 256)
    layout = NF4Layout.of(expected)
    found = layout.quantize(weight)
    for name in (
        "quantized_data",
        "quantized_scalers",
        "quantization_factor",
        "scaler_mean",
        "nf4",
    ):
        same(getattr(found, name), getattr(expected, name))
    same(found.get_original_weight(), expected.get_original_weight())
    same(dequantize(found), expected.get_original_weight())
    several = weight.view(2, -1, weight.shape[1])  # matrices of one shape, in one tensor
    assert quantize(several, 64, 256).shape == several.shape
    same(dequantize(quantize(several, 64, 256)), expected.get_original_weight().view_as(several))
    # A part has the codes that it has in the whole
    assert torch.equal(layout.codes(weight, 3, 11), layout.codes(weight)[3:11])
    ours = (layout.codes(weight), layout.scales(weight))
    assert [x.shape for x in ours] == [x.shape for x in layout.empty()]


@pytest.mark.parametrize("shape", [(8, 64), (96, 160)])
def test_of_the_meta_device_without_its_computations(shape: tuple[int, int]) -> None:
    weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    blocks = weight.numel() // 64
    found, expected = quantize(weight, 64, blocks), to_nf4(weight, 64, blocks)
    assert NF4Layout.of(found) == NF4Layout.of(expected)
    names, _ = expected.__tensor_flatten__()
    for name in names:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
