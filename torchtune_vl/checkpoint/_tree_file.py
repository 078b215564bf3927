"""Nested state of a recipe in a safetensors file: tensors as such, the rest as JSON."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_KEY = "tree"
_LOW_BIT = "torchao.optim."


def save_tree(tree: Any, path: Path) -> None:
    """Write nested dicts, lists and tuples of tensors and of plain values that JSON can hold.

    Keys are str or int. Tensors of torchao's low-bit optimizers are taken to pieces. Raises
    ``TypeError`` if a value is of another kind.
    """
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.dumps(_encode(tree, tensors))
    save_file(tensors, path, metadata={_KEY: skeleton})


def load_tree(path: Path) -> Any:
    """Read what :func:`save_tree` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _decode(json.loads(file.metadata()[_KEY]), tensors)


def _encode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor) and type(node).__module__.startswith(_LOW_BIT):
        names, context = node.__tensor_flatten__()  # type: ignore[attr-defined]
        origin = [type(node).__module__, type(node).__name__]
        pieces = {name: getattr(node, name) for name in names}
        return {"low_bit": [_encode(part, tensors) for part in (origin, pieces, context)]}
    if isinstance(node, torch.dtype):
        return {"dtype": str(node).removeprefix("torch.")}
    if isinstance(node, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(node, dict):
        return {"dict": [[key, _encode(value, tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        kind = "list" if isinstance(node, list) else "tuple"
        return {kind: [_encode(value, tensors) for value in node]}
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise TypeError(f"cannot save a value of type {type(node).__name__}: {node!r}")


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(value, tensors) for key, value in content}
    if kind in ("list", "tuple"):
        values = [_decode(value, tensors) for value in content]
        return values if kind == "list" else tuple(values)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "low_bit":
        (module, name), pieces, context = (_decode(part, tensors) for part in content)
        if not module.startswith(_LOW_BIT):  # imports nothing that a file names but these
            raise ValueError(f"{module}.{name} is no tensor of a low-bit optimizer")
        return getattr(import_module(module), name).__tensor_unflatten__(pieces, context)
    return content
