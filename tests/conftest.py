"""What all tests need."""

import os
import re
import socket
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

import torchtune_vl._torchao  # noqa: F401 (before torchtune, which needs it beside later torchao)
from quickstart.vocabulary import fetch_vocabulary
from torchtune_vl.chat import _vocabulary as vocabulary_files
from torchtune_vl.datasets._record_cache import state_of
from torchtune_vl.validation import import_torchvision

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are as many as the cores

if "PYTEST_XDIST_WORKER" not in os.environ:
    # Of one run of the tests alone, and of all of its processes
    _cache = TemporaryDirectory(prefix="torchtune-vl-cache-")
    os.environ["TORCHTUNE_VL_CACHE"] = _cache.name

# Libraries ask hosts elsewhere unasked, and say nothing of it where that fails; numbers ask nobody
_asked: list[str] = []
_look_up = socket.getaddrinfo
_OWN_NAME, *_ = socket.gethostname().split(".")
_HERE = re.compile(
    rf"(localhost|{re.escape(_OWN_NAME)})(\..+)?|(0x)?[0-9a-f.:]*|.+\.(invalid|test)",
    re.IGNORECASE,
)


def _look_up_here(host: Any, *args: Any, **settings: Any) -> Any:
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    if _HERE.fullmatch(name):
        return _look_up(host, *args, **settings)
    _asked.append(f"{name}, asked for at\n{''.join(traceback.format_stack(limit=12))}")
    raise socket.gaierror(socket.EAI_AGAIN, "tests have no network")


socket.getaddrinfo = _look_up_here

# A tokenizer takes a second to read, and hundreds of tests make one of the same file
_read_vocabulary = vocabulary_files.read_vocabulary


@cache
def _read_once(path: Path, merges: Any, special_tokens: Any, more: Any, state: bytes) -> Any:
    return _read_vocabulary(path, merges, special_tokens and dict(special_tokens), more)


def _read(path: Path, merges: Any, special_tokens: Any, more: Any = ()) -> Any:
    state = state_of(file for file in (path, merges) if file)
    if state is None:
        return _read_vocabulary(path, merges, special_tokens, more)
    items = special_tokens and tuple(special_tokens.items())
    tokens, added, plain = _read_once(path, merges, items, tuple(more), state)
    return tokens, dict(added), plain


vocabulary_files.read_vocabulary = _read

import_torchvision()  # before transformers, which looks for it at import


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """Fail a test in which something asked for a host that is not here."""
    yield
    asked = "\n".join(_asked)
    _asked.clear()
    assert not asked, asked


@pytest.fixture(scope="session")
def vocabulary() -> Path:
    """Directory with the published vocabulary in all of its forms."""
    return fetch_vocabulary(Path(__file__).parents[1] / ".assets" / "tokenizer")
