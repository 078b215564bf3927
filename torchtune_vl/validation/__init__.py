"""The parity report: ours beside transformers, on the user's own files."""

from importlib import import_module
from typing import Any

from torchtune_vl.validation._torchvision import import_torchvision

# What takes long to import, and transformers with it, comes after import_torchvision
_FILES = {
    "Case": "_report",
    "Conversation": "_inputs",
    "Inputs": "_inputs",
    "Picture": "_report",
    "Report": "_report",
    "Row": "_report",
    "TokenPair": "_report",
    "find_images": "_inputs",
    "find_videos": "_inputs",
    "print_report": "_render",
    "read_conversations": "_inputs",
    "to_html": "_render",
    "to_markdown": "_render",
    "validate": "_validate",
}
__all__ = ["import_torchvision", *_FILES]


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
