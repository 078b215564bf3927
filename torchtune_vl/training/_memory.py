"""Memory of training on one of several devices, computed from a config."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from torchtune_vl._torchtune import instantiate
from torchtune_vl.modules import Segments
from torchtune_vl.modules.adapters import num_bytes
from torchtune_vl.modules.loss import CHUNK
from torchtune_vl.training._sharding import DTYPES, default_dtype, dtypes_of, plain_parameters

# Logits of a chunk in the dtype of the model and in float32, and the float32 gradient
_LOGIT_BYTES = 2 + 4 + 4


def estimate_memory(config: DictConfig, num_devices: int = 1) -> dict[str, int]:
    """Compute the bytes that the recipe ``finetune`` takes on each device, at its peak, by purpose.

    Weights but NF4 ones, gradients and optimizer are sharded over ``num_devices``. Not in it are
    what the allocator loses to fragments, the CUDA context, about 0.5 GB, buffers of communication,
    and what compilation saves. Raises ``ValueError`` if the model cannot be built.
    """
    dtype = DTYPES[config.dtype]
    compute_dtype = DTYPES[config.compute_dtype or config.dtype]
    with default_dtype(dtype), torch.device("meta"):
        model = instantiate(config.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = plain_parameters(model)
    states = {
        "weights": sum(map(num_bytes, plain)),
        "gradients": sum(map(num_bytes, trained)),
        "optimizer": sum(
            _optimizer_bytes(config.optimizer, d) * sum(p.numel() for p in trained if p.dtype == d)
            for d in {p.dtype for p in trained}
        ),
    }
    on_device = 0 if config.parallel.cpu_offload else 1 / num_devices
    memory = {name: round(size * on_device) for name, size in states.items()}
    memory["weights"] += sum(map(num_bytes, {*model.parameters()} - {*plain}))
    is_sharded = num_devices > config.parallel.tensor or config.parallel.cpu_offload
    if is_sharded or dtypes_of(model) != {compute_dtype}:
        memory["gathered layers"] = _gathered_bytes(model, compute_dtype)
    with default_dtype(compute_dtype):
        memory |= _activation_bytes(config, model)
    return memory


def _optimizer_bytes(component: DictConfig, dtype: torch.dtype) -> float:
    """Bytes of state for each parameter, as the optimizer allots them to one it is given."""
    parameter = nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = instantiate(component, [parameter])
    with torch.compiler.set_stance("force_eager"):  # torchao compiles the step
        optimizer.step()
    states = [x for x in optimizer.state[parameter].values() if isinstance(x, torch.Tensor)]
    return sum(num_bytes(x) for x in states if x.ndim) / parameter.numel()


def _gathered_bytes(model: Any, dtype: torch.dtype) -> int:
    """What is whole at a time: a layer, the next, what is in no layer, and gradients of these."""
    layer = plain_parameters(model.decoder.layers[0])
    rest = {*plain_parameters(model)}
    for layers in (model.decoder.layers, model.encoders["vision"].layers):
        rest -= {*layers.parameters()}
    gradients = sum(p.numel() for p in (*layer, *rest) if p.requires_grad)
    return dtype.itemsize * (sum(p.numel() for p in (*layer, *layer, *rest)) + gradients)


def _activation_bytes(config: DictConfig, model: Any) -> dict[str, int]:
    """What layers keep for their gradients, and what one layer takes beside that as it runs."""
    encoder, decoder = model.encoders["vision"], model.decoder
    embedding, rows = decoder.tok_embeddings, config.rows
    is_padded = "batch_size" in rows
    tokens = rows.batch_size * config.tokenizer.max_seq_len if is_padded else rows.max_tokens
    patches = encoder.merger.unit_size * tokens
    patches = min(patches, rows.get("max_patches") or patches)
    with FakeTensorMode():
        x_NE = torch.empty(patches, encoder.merger.norm.weight.numel(), requires_grad=True)
        rope = torch.empty(patches, 2, encoder.layers[0].attn.head_dim, dtype=torch.float32)
        segments = Segments.of([patches])  # how they are cut makes no difference
        vision = _kept_bytes(encoder.layers[0], x_NE, segments=segments, rope=rope)
        merger = _kept_bytes(encoder.merger, x_NE)
        h_BSE = torch.empty(1, tokens, embedding.embedding_dim, requires_grad=True)
        rope = torch.empty(1, tokens, 2, decoder.layers[0].attn.head_dim, dtype=torch.float32)
        text = _kept_bytes(decoder.layers[0], h_BSE, mask=None, rope=rope)
    # How much of the layers is computed anew
    share = {"none": 0.0, "selective": 0.5, "full": 1.0}[config.activation_checkpointing]

    def kept_by(layers: nn.ModuleList, layer_bytes: int, input_bytes: int) -> int:
        return round(len(layers) * (share * input_bytes + (1 - share) * layer_bytes))

    kept = kept_by(decoder.layers, text, h_BSE.nbytes)
    if any(p.requires_grad for p in encoder.parameters()):
        kept += merger
    if any(p.requires_grad for m in (encoder.patch_embed, encoder.layers) for p in m.parameters()):
        kept += kept_by(encoder.layers, vision, x_NE.nbytes)
    return {
        "activations": 0 if config.activation_offloading else kept,
        "a layer at work": max(text, vision),
        "logits": min(CHUNK, tokens) * embedding.num_embeddings * _LOGIT_BYTES,
    }


def _kept_bytes(layer: nn.Module, x: torch.Tensor, **inputs: Any) -> int:
    """Bytes that autograd keeps of a layer from forward to backward."""
    named = layer.named_parameters()
    weights = {name: torch.empty(p.shape, requires_grad=p.requires_grad) for name, p in named}
    given = [x for x in (*weights.values(), *inputs.values()) if isinstance(x, torch.Tensor)]
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        functional_call(layer, weights, (x,), inputs)
    storages = {x.untyped_storage() for x in kept} - {x.untyped_storage() for x in given}
    return sum(storage.nbytes() for storage in storages)
