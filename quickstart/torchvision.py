"""Makes torchvision importable, which transformers' processor of Qwen2.5-VL needs.

torchtune_vl does without it; it serves the comparisons of the quickstart and of the tests.
"""

import importlib
import re
import sys
from pathlib import Path

import torch

# The Makefile puts it there, out of site-packages: the torchvision of PyPI does not import beside
# a CPU build of torch, and transformers' Qwen2.5-VL classes then fail to import for everybody.
FOLDER = Path(sys.prefix) / "torchvision"

# The declarations last as long as this object
_library: torch.library.Library | None = None


def import_torchvision() -> None:
    """Import torchvision, beside a CPU build of torch too.

    It registers fake kernels for operators of its CUDA library, which does not load there.
    Declared, these operators satisfy the registration; nothing here calls them.
    """
    global _library
    if FOLDER.exists():
        sys.path.append(str(FOLDER))
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _library = torch.library.Library("torchvision", "DEF")
        registrations = (FOLDER / "torchvision" / "_meta_registrations.py").read_text()
        for name in re.findall(r'register_fake\("torchvision::(\w+)"\)', registrations):
            _library.define(f"{name}() -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
