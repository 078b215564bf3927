"""Makes torchvision importable, which transformers' processors of Qwen2.5-VL are written on."""

import importlib
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

import torch

# The declarations last as long as this object
_library: torch.library.Library | None = None


@cache
def import_torchvision() -> str:
    """Import torchvision, before transformers looks for it: call it before importing transformers.

    A torchvision from PyPI registers fake kernels for operators of its CUDA library, which does
    not load beside a CPU build of torch, and its import fails. Declared, these operators satisfy
    the registration; nothing that handles pixels calls them. A torchvision that fails otherwise is
    hidden, because transformers would fail with it.

    Returns:
        Why torchvision cannot be used; empty if it can.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return f"torchvision is not installed: {_advice()}"
    try:
        _import(Path((spec.submodule_search_locations or [""])[0]))
    except Exception as error:  # whatever a foreign binary's import may raise
        _forget()
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        return f"torchvision does not import ({error}): {_advice()}"
    return ""


def _advice() -> str:
    """How to install it; pip alone would replace a CPU build of torch by one for CUDA."""
    minor = int(torch.__version__.split(".")[1])
    return f"pip install --no-deps 'torchvision==0.{minor + 15}.*' is for this torch"


def _import(folder: Path) -> None:
    global _library
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _library = torch.library.Library("torchvision", "DEF")
        registrations = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
        for name in re.findall(r'register_fake\("torchvision::(\w+)"\)', registrations):
            _library.define(f"{name}() -> Tensor")
        _forget()
        importlib.import_module("torchvision")


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
