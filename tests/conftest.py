"""What all tests need."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

import torchtune_vl._torchao  # noqa: F401 (before torchtune, which needs it beside later torchao)
from quickstart.vocabulary import fetch_vocabulary
from torchtune_vl.validation import import_torchvision

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are as many as the cores

if "PYTEST_XDIST_WORKER" not in os.environ:
    # Of one run of the tests alone, and of all of its processes
    _cache = TemporaryDirectory(prefix="torchtune-vl-cache-")
    os.environ["TORCHTUNE_VL_CACHE"] = _cache.name

import_torchvision()  # before transformers, which looks for it at import


@pytest.fixture(scope="session")
def vocabulary() -> Path:
    """Directory with the published vocabulary in all of its forms."""
    return fetch_vocabulary(Path(__file__).parents[1] / ".assets" / "tokenizer")
