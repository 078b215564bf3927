"""What all tests need."""

import os
import re
import sys
from pathlib import Path

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are as many as the cores

TORCHVISION = Path(__file__).parent.parent / ".venv" / "torchvision"

if TORCHVISION.exists():
    # torchvision registers fake kernels for operators of its CUDA library, which does not load
    # beside a CPU build of torch: declared, they satisfy the registration, and nothing calls them.
    sys.path.append(str(TORCHVISION))
    registrations = (TORCHVISION / "torchvision" / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")
    for name in re.findall(r'register_fake\("torchvision::(\w+)"\)', registrations):
        library.define(f"{name}() -> Tensor")
