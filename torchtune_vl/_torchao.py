"""torchao, from 0.13 on: NF4, and what later ones lack that ``import torchtune`` asks for.

0.16 removed two functions and 0.18 moved two modules; torchtune's recipes beside ours call none.
"""

import sys
from importlib import import_module
from typing import Any

import torchao.dtypes
import torchao.quantization
from torchao.float8 import Float8LinearConfig as Float8LinearConfig
from torchao.float8 import convert_to_float8_training as convert_to_float8_training


def _missing(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("this release of torchao has it no longer: install torchao==0.15.0")


try:
    _nf4 = import_module("torchao.dtypes.nf4tensor")
except ImportError:
    _nf4 = import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
sys.modules.setdefault("torchao.dtypes.nf4tensor", _nf4)
for _name in ("int4_weight_only", "int8_dynamic_activation_int4_weight"):
    if not hasattr(torchao.quantization, _name):
        setattr(torchao.quantization, _name, _missing)
if not hasattr(torchao.dtypes, "TensorCoreTiledLayout"):
    torchao.dtypes.TensorCoreTiledLayout = _missing

NF4Tensor, to_nf4, linear_nf4 = _nf4.NF4Tensor, _nf4.to_nf4, _nf4.linear_nf4
SubclassTensorArgs = _nf4.SubclassTensorArgs
