"""Dtypes by the names that configs have for them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def dtype_on(device: torch.device, name: str) -> torch.dtype:
    """Return a dtype by its name, or raise ``ValueError`` if a GPU cannot compute with it."""
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16, which dtype or compute_dtype "
            "asks for (bf16): set both to fp32"
        )
    return DTYPES[name]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let new tensors have a dtype, for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
