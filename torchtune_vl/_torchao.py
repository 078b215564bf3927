"""torchao, from 0.13 on: NF4, and what torchtune 0.6.1 asks of it on import and later ones lack.

torchao 0.16 removed two functions and 0.18 moved two modules. torchtune's recipes that we stand
beside call none of them, but ``import torchtune`` fails without.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import torchao.dtypes
import torchao.quantization


def _import_nf4() -> ModuleType:
    try:
        return import_module("torchao.dtypes.nf4tensor")
    except ImportError:
        return import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")


def _missing(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("this release of torchao has it no longer: install torchao==0.15.0")


_nf4 = _import_nf4()
sys.modules.setdefault("torchao.dtypes.nf4tensor", _nf4)
for _name in ("int4_weight_only", "int8_dynamic_activation_int4_weight"):
    if not hasattr(torchao.quantization, _name):
        setattr(torchao.quantization, _name, _missing)
if not hasattr(torchao.dtypes, "TensorCoreTiledLayout"):
    torchao.dtypes.TensorCoreTiledLayout = _missing

NF4Tensor, to_nf4, linear_nf4 = _nf4.NF4Tensor, _nf4.to_nf4, _nf4.linear_nf4
