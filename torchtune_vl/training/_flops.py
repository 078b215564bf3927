"""Floating-point operations of training, for model FLOPs utilization (MFU)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torchtune_vl.modules.experts import MixtureOfExperts

# Dense bfloat16 products with float32 sums, by NVIDIA's data sheets, which often print twice that,
# for sparse matrices. Of a name by `torch.cuda.get_device_name` the first pattern in it counts.
_PEAK_FLOPS = (
    (r"\bB200\b", 2250e12),
    (r"\bH(100|200) NVL\b", 835.5e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\b(H100|H200|H800|GH200)\b", 989.4e12),
    (r"\b(A100|A800)\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090$", 165.2e12),
    (r"\bRTX 3090$", 71e12),
)


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's dense bfloat16 operations per second at most, or None if it is not known."""
    return next((peak for name, peak in _PEAK_FLOPS if re.search(name, device_name)), None)


class FlopCounter:
    """Counts the operations of forward and backward for rows of any composition.

    They are what the mathematics needs, two for each multiply-add of a matrix product, as in PaLM
    (arXiv 2204.02311, appendix B), without what checkpointing, kernels and chunked losses compute a
    second time. The model is as it is before its layers are wrapped, on the meta device perhaps.
    """

    def __init__(self, model: Any) -> None:
        encoder = model.encoders["vision"]
        trace = _Trace(carries=False)
        self._patch = trace.linear(encoder.patch_embed)
        self._patch_pair = {"windows": 0, "frames": 0}
        for i, layer in enumerate(encoder.layers):
            row, pair = trace.layer(layer)
            self._patch += row
            kind = "frames" if i in encoder.full_attention_layers else "windows"
            self._patch_pair[kind] += pair
        carries, unit = trace.carries, 0
        traces = [trace]
        for merger in (encoder.merger, *encoder.deepstack_mergers):
            traces.append(_Trace(carries))
            unit += sum(map(traces[-1].linear, (merger.norm, merger.mlp.w1, merger.mlp.w2)))
        trace.carries = any(one.carries for one in traces)
        self._patch += unit // encoder.merger.unit_size  # they work on several patches at once
        self._text = _decoder_flops(model.decoder, carries=False)
        self._text_with_media = _decoder_flops(model.decoder, carries=trace.carries)

    def step(self, documents: Sequence[int], media: Mapping[str, Any] | None, targets: int) -> int:
        """Count the operations of one forward and backward.

        ``documents`` are the tokens of each, ``media`` is ``encoder_input["vision"]``, of which no
        tensor is read, and ``targets`` are the positions the output layer is computed for.
        """
        token, pair, target = self._text if media is None else self._text_with_media
        flops = token * sum(documents) + target * targets
        flops += pair * sum(n * (n + 1) // 2 for n in documents)
        if media is not None:
            flops += self._patch * sum(map(sum, media["frames"]))
            for kind, patch_pair in self._patch_pair.items():
                flops += patch_pair * sum(n**2 for lengths in media[kind] for n in lengths)
        return flops


def _decoder_flops(decoder: Any, carries: bool) -> tuple[int, int, int]:
    """Operations for each token, for each pair of a query and a key, and for each target."""
    trace = _Trace(carries)
    trace.carries = trace.after(decoder.tok_embeddings)
    layers = [trace.layer(layer) for layer in decoder.layers]
    trace.linear(decoder.norm)
    target = trace.linear(decoder.output or decoder.tok_embeddings)
    return sum(row for row, _ in layers), sum(pair for _, pair in layers), target


class _Trace:
    """Follows hidden states through the layers, and knows whether they carry gradients."""

    def __init__(self, carries: bool) -> None:
        self.carries = carries

    def after(self, module: nn.Module) -> bool:
        """Whether the output of a module carries gradients."""
        return self.carries or any(p.requires_grad for p in module.parameters())

    def linear(self, *layers: nn.Module) -> int:
        """Operations per row of layers that have one input, with adapters of their own weights."""
        flops = 0
        for name, weight in nn.ModuleList(layers).named_parameters():
            if weight.ndim > 1:  # others, of normalisations too, are no matrices
                takes_input_gradient = self.carries or "lora_b" in name  # lora_a, below, is trained
                flops += 2 * weight.numel() * (1 + takes_input_gradient + weight.requires_grad)
        self.carries = any(map(self.after, layers))
        return flops

    def layer(self, layer: Any) -> tuple[int, int]:
        """Operations of a transformer layer per row, and per pair of a query and a key."""
        attn, mlp = layer.attn, layer.mlp
        self.linear(layer.sa_norm)
        inputs = [attn.qkv] if hasattr(attn, "qkv") else [attn.q_proj, attn.k_proj, attn.v_proj]
        q, k, v = (self.after(inputs[i % len(inputs)]) for i in range(3))
        # Scores and weighted values; the gradient of weights, and those of queries, keys and values
        pair = 2 * (2 + (q or k) + q + k + v) * attn.output_proj.weight.shape[1]
        row = self.linear(*inputs) + self.linear(attn.output_proj) + self.linear(layer.mlp_norm)
        if isinstance(mlp, MixtureOfExperts):
            return row + self.experts(mlp), pair
        row += self.linear(*(w for w in (mlp.w1, mlp.w3) if w is not None)) + self.linear(mlp.w2)
        return row, pair

    def experts(self, mlp: MixtureOfExperts) -> int:
        """Operations of a mixture of experts per row: of those alone that a token takes."""
        weighs = self.after(mlp.router)  # whether gradients of experts' weights are wanted
        router = mlp.router.weight
        flops = 2 * router.numel() * (1 + self.carries + router.requires_grad)
        for layer in (mlp.experts.gate_up_proj, mlp.experts.down_proj):
            for name, weight in layer.named_parameters():
                takes_input_gradient = self.carries or "lora_b" in name
                times = 1 + takes_input_gradient + weight.requires_grad
                flops += 2 * mlp.num_active * weight.shape[1:].numel() * times
            self.carries = self.after(layer)
        embed_dim = router.shape[1]
        flops += 2 * mlp.num_active * embed_dim * (1 + self.carries + weighs)  # the weighted sum
        return flops
