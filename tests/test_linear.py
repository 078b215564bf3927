"""Linear layers: multiplied by the faster library, and quantized ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchtune_vl.modules.linear import Linear, linear
from torchtune_vl.modules.quantized import (
    Int4Linear,
    Int8Linear,
    Quantized,
    QuantizedExperts,
    quantize_layers,
)


@pytest.mark.parametrize("shape", [(3, 96), (4, 96), (2, 64, 96), (129, 96), (0, 96)])
@pytest.mark.parametrize("outputs", [511, 512])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_torch(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(96, outputs, bias=bias)
    x = torch.randn(shape)
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad():
        # 96 products of float32 in another order
        torch.testing.assert_close(layer(x).double(), exact, atol=96 * 6e-8, rtol=0)


def test_of_strided_tensors_and_parts_of_weights() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(96, 8).T, torch.randn(1300, 96)[100::2]
    with torch.no_grad():
        product = linear(x, weight)
    torch.testing.assert_close(product.double(), x.double() @ weight.double().T, atol=1e-4, rtol=0)
    for bias in (torch.randn(1200)[::2], torch.randn(600, 3)[:, 1], torch.ones(1).expand(600)):
        with torch.no_grad():
            torch.testing.assert_close(linear(x, weight, bias), product + bias, atol=1e-4, rtol=0)


def test_compiled_layers_of_many_lengths() -> None:
    torch.manual_seed(0)
    layer = Linear(64, 512)
    compiled = torch.compile(layer.forward, backend="aot_eager")
    with torch.no_grad():
        for length in (7, 9, 300, 60):
            x = torch.randn(1, length, 64)
            torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=0)


def test_which_library_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    multiply = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *a: called.append(a) or multiply(*a)
    )
    layer, x = Linear(64, 512), torch.randn(8, 64)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer(x[:3])
        layer.bfloat16()(x.bfloat16())
    assert not called
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16
    assert not called
    with torch.no_grad():
        layer(x)
    assert len(called) == (torch.backends.mkl.is_available())


# Rounding to nearest moves a uniform weight by a quarter of a step on average, 1/508 and 1/60 of
# the largest one; normal ones reach about three times as far as their deviation
@pytest.mark.parametrize(("how", "error"), [("int8", 0.008), ("int4", 0.09)])
@pytest.mark.parametrize("rows", [0, 1, 7, 32, 33, 200])
def test_quantized_products(how: Quantized, error: float, rows: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(256, 320)).bfloat16()
    x = torch.randn(2, rows, 256).bfloat16()
    exact = F.linear(x.float(), plain[0].weight.float(), plain[0].bias.float())
    quantize_layers(plain, how)
    with torch.no_grad():
        product = plain(x)
    assert product.dtype == torch.bfloat16
    assert product.shape == exact.shape
    assert rows == 0 or error / 20 < (product.float() - exact).norm() / exact.norm() < error


def test_eight_bits_hold_what_they_can() -> None:
    # Multiples of a power of two, up to 127: none is rounded
    weight = torch.randint(-127, 128, (48, 64)).bfloat16() / 64
    weight[:, 0] = 127 / 64
    quantized = Int8Linear(weight)
    assert torch.equal(quantized.weight.float() * quantized.scales.float()[:, None], weight.float())
    nothing = Int8Linear(torch.zeros_like(weight))
    assert not nothing(torch.ones(2, 64).bfloat16()).any()
    assert not nothing(torch.ones(64, 64).bfloat16()).any()


def test_four_bits_hold_what_they_can() -> None:
    torch.manual_seed(0)
    numbers = torch.randint(0, 16, (32, 128))
    numbers[:, ::64], numbers[:, 1::64] = 0, 15
    weight = (numbers - 8).bfloat16() / 4
    assert torch.equal(Int4Linear(weight)(torch.eye(128).bfloat16()).T, weight)
    nothing = Int4Linear(torch.zeros(32, 128).bfloat16())
    assert not nothing(torch.ones(2, 128).bfloat16()).any()


def test_a_gpu_gets_what_its_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    monkeypatch.setattr(
        "torchtune_vl.modules.quantized._packed", lambda n: packed.append(n) or n.flatten()
    )
    QuantizedExperts(torch.randn(2, 128, 48).bfloat16(), "int4")
    assert [numbers.is_contiguous() for numbers in packed] == [True, True]
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match="they are to be multiples of 128 and 16; take int8"),
    ):
        Int4Linear(torch.empty(64, 192, device="cuda"))


def test_what_cannot_be_quantized_is_told() -> None:
    with pytest.raises(ValueError, match="int8 weights are computed with in bfloat16, not float32"):
        quantize_layers(nn.Sequential(nn.Linear(64, 64)), "int8")
    with pytest.raises(ValueError, match="a layer of 96 inputs and 64 outputs has no int4: they"):
        quantize_layers(nn.Sequential(nn.Linear(96, 64).bfloat16()), "int4")
