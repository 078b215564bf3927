"""Makes torchvision importable, which transformers' processors of images and videos are made of."""

import re
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

# Where `pip install --target` may put it, out of the sight of those who do not ask: beside a CPU
# build of torch the torchvision of PyPI does not import, and many of transformers' classes with it
_ASIDE = Path(sys.prefix) / "torchvision"


@cache
def import_torchvision() -> str:
    """Import torchvision, before transformers is imported, and return why not if it fails.

    A torchvision from PyPI registers fake kernels for operators of its CUDA library, which does
    not load beside a CPU build of torch, and its import fails. Declared, these operators satisfy
    the registration; nothing that handles pixels calls them. A torchvision that fails otherwise is
    hidden, because transformers, which looks for it at import, would fail with it.
    """
    if _ASIDE.is_dir():
        sys.path.append(str(_ASIDE))
    # pip alone would replace a CPU build of torch by one for CUDA
    release = int(torch.__version__.split(".")[1]) + 15
    advice = f"pip install --no-deps 'torchvision==0.{release}.*' is for this torch"
    spec = find_spec("torchvision")
    if spec is None:
        return f"torchvision is not installed: {advice}"
    try:
        try:
            import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            fakes = Path(spec.origin or "").with_name("_meta_registrations.py").read_text("utf-8")
            for name in re.findall(r'register_fake\("(torchvision::\w+)"\)', fakes):
                torch.library.define(name, "() -> Tensor")
            _forget()
            import_module("torchvision")
    except Exception as error:  # whatever a foreign binary's import may raise
        _forget()
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        return f"torchvision does not import ({error}): {advice}"
    return ""


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
