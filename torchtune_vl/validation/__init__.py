"""The parity report: ours beside transformers, and beside a server, on the user's own files."""

from importlib import import_module
from typing import Any

from torchtune_vl.validation._torchvision import import_torchvision

import_torchvision()  # before transformers, which looks for it at import

# These take long to import
_NAMES = {
    "_compare_server": "ServerComparison",
    "_inputs": "Conversation Inputs find_images find_videos read_conversations",
    "_report": "Case Picture Report Row TokenPair print_report to_html to_markdown",
    "_validate": "validate",
}
__all__ = ["import_torchvision", *" ".join(_NAMES.values()).split()]
__dir__ = __all__.copy


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    for file, names in _NAMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
