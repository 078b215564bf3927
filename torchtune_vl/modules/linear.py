"""Linear layers, plain ones, in computations without gradients by the faster library."""

import torch
import torch.nn.functional as F
from torch import nn

# Where oneDNN multiplies float32 faster than MKL: for fewer rows MKL is as fast as weights are
# read, for more they are equal, and for few outputs the call costs more: benchmarks/generation.py
_ROWS = range(4, 129)
_MIN_OUTPUTS = 512
_HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply [..., in] by a weight [out, in] and add a bias [out].

    ``F.linear``, but on a CPU and without gradients by the faster of torch's two libraries.
    """
    if _by_onednn(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return (
        not torch.is_grad_enabled()
        and _HAS_BOTH
        # Inductor has no such operator, and sizes that it does not know yet have no rows to count
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.shape[-1] == weight.shape[1] > 0
        and x.numel() // x.shape[-1] in _ROWS
        and len(weight) >= _MIN_OUTPUTS
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        # Not those that are spread over devices
        and type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, nn.Parameter)
        # Its strides are not looked at
        and (bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()))
        and (bias is None or bias.shape == weight.shape[:1])
    )


class Linear(nn.Linear):
    """torch's layer, which multiplies by :func:`linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, from [..., in_features] to [..., out_features]."""
        return linear(x, self.weight, self.bias)
