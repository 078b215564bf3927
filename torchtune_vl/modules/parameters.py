"""The bytes of parameters, and a table of which are trained."""

from collections import defaultdict
from collections.abc import Callable
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table
from torch import nn


def trained_parts(model: nn.Module, part_of: Callable[[str], str]) -> str:
    """Tabulate parameters, dtypes and memory of training by part, which ``part_of`` a name says.

    Memory, in GB of 1e9 bytes, is computed: weights as they are stored, gradients of what is
    trained, and the state of AdamW, two numbers in their dtype. Activations are not in it.
    """
    parts: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        parts[part_of(name)].append(parameter)
    parts["all"] = list(model.parameters())
    table = Table("part", "parameters", "trained", "dtype", "weights", "gradients", "AdamW")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, parameters in parts.items():
        trained = [p for p in parameters if p.requires_grad]
        gradients = sum(p.nbytes for p in trained)
        table.add_row(
            part,
            *(f"{sum(p.numel() for p in some):,}" for some in (parameters, trained)),
            ", ".join(sorted({_dtype(p) for p in parameters})),
            *(
                f"{size / 1e9:.2f} GB"
                for size in (sum(map(num_bytes, parameters)), gradients, 2 * gradients)
            ),
        )
    text = StringIO()
    Console(file=text, width=110).print(table)
    return text.getvalue()


def num_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes that a tensor takes, also one that is made of others, such as NF4."""
    if not hasattr(tensor.data, "__tensor_flatten__"):
        return tensor.nbytes
    inner, _ = tensor.data.__tensor_flatten__()
    return sum(getattr(tensor.data, name).nbytes for name in inner)


def _dtype(parameter: nn.Parameter) -> str:
    if hasattr(parameter.data, "__tensor_flatten__"):
        return type(parameter.data).__name__.removesuffix("Tensor").lower()
    return str(parameter.dtype).removeprefix("torch.")
