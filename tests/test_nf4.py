"""NF4 weights: quantized as torchao does, and kept as bytes."""

import pytest
import torch

from torchtune_vl._torchao import to_nf4
from torchtune_vl.modules.nf4 import NF4Layout

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
    # A part has the codes that it has in the whole
    assert torch.equal(layout.codes(weight, 3, 11), layout.codes(weight)[3:11])
    assert [x.shape for x in (layout.codes(weight), layout.scales(weight))] == [*layout.sizes()]
