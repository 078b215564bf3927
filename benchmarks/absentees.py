"""Lets torchtune_vl be imported without packages for what `benchmarks.gpu` does not do.

They are for videos, tables, and pictures of losses, 150 MB that a machine without a network would
have to be sent. Whatever is asked of them is a class that does nothing, once this is imported.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import transformers as transformers  # which asks what there is, and has to find them absent

NAMES = ("av", "datasets", "matplotlib", "pyarrow")


class Anything(type):
    """A class with any attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentError


class AbsentError(Exception, metaclass=Anything):
    """Stands for any class, function or module in it, and for errors to be caught."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class AbsentModule(ModuleType):
    """A module in which everything is there."""

    __path__: Sequence[str] = ()
    __version__ = "0"
    HF_DATASETS_CACHE = "build/gpu/cache"  # of `datasets`: where sizes of samples are kept

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentError


class Finder(MetaPathFinder, Loader):
    """Finds modules of these packages that nobody else did."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Find a module by its name."""
        is_absent = name.partition(".")[0] in NAMES
        return ModuleSpec(name, self, is_package=True) if is_absent else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make a module."""
        return AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it is."""


sys.meta_path.append(Finder())
