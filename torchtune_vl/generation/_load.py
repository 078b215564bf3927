"""Models to answer with."""

from pathlib import Path

import torch
from torch import nn

from torchtune_vl.checkpoint._adapters import load_adapter, merge_adapter
from torchtune_vl.files._safetensors import weight_files
from torchtune_vl.models._builders import vision_language_model
from torchtune_vl.models._registry import family_of
from torchtune_vl.models._weights import Tensors, load_weights, load_weights_into
from torchtune_vl.modules.quantized import Quantized, check_dtype, quantize_layers
from torchtune_vl.modules.vision import VisionLanguageModel


def load_model(
    checkpoint_dir: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantized | None = None,
    device: torch.device | str = "cpu",
) -> VisionLanguageModel:
    """Load a checkpoint to answer with, merged with an adapter of torchtune-vl or of peft.

    ``dtype`` is that of all weights, by default as they are stored. With ``quantize`` the layers of
    the decoder, but for embedding, routers and output, have 8-bit or 4-bit weights, ``"int8"`` or
    ``"int4"``; one layer at a time is on the device in bfloat16. Raises ``ValueError`` if files are
    missing or damaged, the adapter is of another model, or weights cannot be quantized.
    """
    directory = Path(checkpoint_dir)
    dimensions = family_of(directory).all_dimensions(directory)
    if quantize:
        dtype = dtype or torch.bfloat16
        check_dtype(quantize, dtype)
    weights = load_weights(directory, weight_files(directory))
    if adapter is not None:
        weights = merge_adapter(weights, load_adapter(Path(adapter), weights), dtype)
    dtype = dtype or next(iter(weights.values())).dtype
    with torch.device("meta"):
        model = vision_language_model(**dimensions).to(dtype)
    if quantize:
        _load_quantized(model, weights, quantize, torch.device(device))
    else:
        load_weights_into(model, weights, torch.device(device))
    return model.eval().requires_grad_(False)


def _load_quantized(
    model: VisionLanguageModel, weights: Tensors, how: Quantized, device: torch.device
) -> None:
    layers, model.decoder.layers = model.decoder.layers, nn.ModuleList()
    load_weights_into(model, weights, device)
    model.decoder.layers = layers
    for number, layer in enumerate(layers):
        prefix = f"decoder.layers.{number}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        load_weights_into(layer, own, device)
        quantize_layers(layer, how)
