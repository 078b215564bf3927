"""The vision encoder: patches to embeddings of the decoder's width.

Shape suffixes: N patches, U units of 2 x 2 patches, E width of the encoder,
H heads, D dimension of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchtune.modules import FeedForward, TransformerSelfAttentionLayer
from torchtune.utils import batch_to_device

from torchtune_vl.models.qwen2_5_vl._patches import CLIP_MEAN, CLIP_STD
from torchtune_vl.models.qwen2_5_vl._position_embeddings import VisionRotaryTable, rotate
from torchtune_vl.models.qwen2_5_vl._positions import MERGE_SIZE, vision_index
from torchtune_vl.modules import (
    Segments,
    attend_within_segments,
    permute_rows,
    window_encoder_index,
)


class PatchEmbedding(nn.Module):
    """Linear embedding of patches (transformers' ``Qwen2_5_VisionPatchEmbed``).

    Args:
        in_channels: colour channels.
        temporal_patch_size: frames of a patch.
        patch_size: pixels along a side of a patch.
        embed_dim: width of the encoder.
    """

    def __init__(
        self, *, in_channels: int, temporal_patch_size: int, patch_size: int, embed_dim: int
    ) -> None:
        super().__init__()
        kernel = (temporal_patch_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_channels, embed_dim, kernel, stride=kernel, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Embed.

        Args:
            patches: float [N, in_channels * temporal_patch_size * patch_size**2], or uint8 before
                normalization of that width, or [N, 3 * patch_size**2] of images alone.

        Returns:
            Embeddings [N, E] in the dtype of the weights.
        """
        if patches.dtype == torch.uint8:
            patches = self._normalize(patches)
        # A convolution whose stride is its kernel is a matrix product, and faster as one
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1))

    def _normalize(self, patches: torch.Tensor) -> torch.Tensor:
        """The float32 operations of the image transform, and an image's copy along time."""
        channels = len(CLIP_MEAN)
        mean = 255 * _constant(CLIP_MEAN, patches.device)
        std = 255 * _constant(CLIP_STD, patches.device)
        levels = patches.unflatten(1, (channels, -1)).float()
        normalized = levels.sub_(mean[:, None]).div_(std[:, None])
        if patches.shape[1] == self.proj.weight[0].numel():
            return normalized.flatten(1)
        frames = self.proj.kernel_size[0]
        return normalized.unsqueeze(2).expand(-1, -1, frames, -1).flatten(1)


def _constant(values: Sequence[float], device: torch.device) -> torch.Tensor:
    # Filled on the device: a tensor made from a list would be copied there, and waited for
    return torch.stack(
        [torch.full((), value, dtype=torch.float32, device=device) for value in values]
    )


class VisionAttention(nn.Module):
    """Multi-head attention within segments (transformers' ``Qwen2_5_VLVisionAttention``).

    Args:
        qkv: projection to queries, keys and values, in this order.
        output_proj: projection of the heads' outputs.
        head_dim: dimension of a head.
    """

    def __init__(self, *, qkv: nn.Module, output_proj: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.qkv = qkv
        self.output_proj = output_proj
        self.head_dim = head_dim

    def forward(
        self, x_NE: torch.Tensor, *, segments: Segments, rope: torch.Tensor
    ) -> torch.Tensor:
        """Attend.

        Args:
            x_NE: hidden states [N, E].
            segments: what attends to what.
            rope: rotary table [N, 2, D/2].

        Returns:
            Tensor [N, E].
        """
        q_NHD, k_NHD, v_NHD = self.qkv(x_NE).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        q_NHD, k_NHD = rotate(q_NHD, rope), rotate(k_NHD, rope)
        return self.output_proj(attend_within_segments(q_NHD, k_NHD, v_NHD, segments).flatten(1))


class VisionLayer(TransformerSelfAttentionLayer):
    """A layer of the encoder (transformers' ``Qwen2_5_VLVisionBlock``).

    A torchtune layer by type, so that its recipes checkpoint, compile and shard it as such.
    """

    def forward(
        self, x_NE: torch.Tensor, *, segments: Segments, rope: torch.Tensor
    ) -> torch.Tensor:
        """Apply attention and feed-forward, each with its residual.

        Args:
            x_NE: hidden states [N, E].
            segments: what attends to what.
            rope: rotary table [N, 2, D/2].

        Returns:
            Tensor [N, E].
        """
        x_NE = x_NE + self.attn(self.sa_norm(x_NE), segments=segments, rope=rope)
        return x_NE + self.mlp(self.mlp_norm(x_NE))


class VisionFeedForward(FeedForward):
    """torchtune's gated feed-forward, whose product takes no third tensor of the hidden width.

    Where gradients are recorded, autograd keeps a copy, and memory is torchtune's.
    """

    def forward(self, x_NE: torch.Tensor) -> torch.Tensor:
        """Apply the feed-forward.

        Args:
            x_NE: hidden states [N, E].

        Returns:
            Tensor [N, E].
        """
        return self.w2(self.activation(self.w1(x_NE)).mul_(self.w3(x_NE)))


class PatchMerger(nn.Module):
    """Joins the patches of a unit into one embedding (transformers' ``Qwen2_5_VLPatchMerger``).

    Args:
        norm: normalisation of each patch.
        mlp: from a unit's patches, concatenated, to the decoder's width.
    """

    def __init__(self, *, norm: nn.Module, mlp: FeedForward) -> None:
        super().__init__()
        self.norm = norm
        self.mlp = mlp

    def forward(self, x_NE: torch.Tensor) -> torch.Tensor:
        """Merge.

        Args:
            x_NE: hidden states [N, E].

        Returns:
            Embeddings [U, width of the decoder].
        """
        return self.mlp(self.norm(x_NE).unflatten(0, (-1, MERGE_SIZE**2)).flatten(1))


class Qwen2_5_VLVisionEncoder(nn.Module):
    """Vision transformer with attention in windows, and over whole frames in a few layers.

    After "Qwen2.5-VL Technical Report" (arXiv 2502.13923, section 2.1.1) and transformers'
    ``Qwen2_5_VisionTransformerPretrainedModel``. Cost grows linearly with the number of media.

    Args:
        patch_embed: embedding of patches.
        layers: the layers.
        merger: joins units of patches.
        rope: makes the rotary table.
        full_attention_layers: indices of the layers that attend over whole frames.
    """

    def __init__(
        self,
        *,
        patch_embed: PatchEmbedding,
        layers: list[VisionLayer],
        merger: PatchMerger,
        rope: VisionRotaryTable,
        full_attention_layers: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.layers = nn.ModuleList(layers)
        self.merger = merger
        self.rope = rope
        self.full_attention_layers = frozenset(full_attention_layers)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor, **index: Any) -> torch.Tensor:
        """Encode media.

        Args:
            patches: of all media, float [N, 1176] or uint8 [N, 588].
            grid_thw: patches of each medium along time, height and width, int64 [k, 3].
            **index: from :func:`~torchtune_vl.modules.window_encoder_index`, as the collate
                function gives it. Without it it is computed from ``grid_thw``, which waits for the
                device.

        Returns:
            Embeddings of the units, in the order of ``patches`` [U, width of the decoder].
        """
        index = index or _index_on_device(grid_thw)
        window_order, frame_order = index["window_order"], index["frame_order"]
        window_segments = Segments(**index["window_segments"])
        frame_segments = Segments(**index["frame_segments"])

        unit_order, window_order_of_frames = window_order.argsort(), frame_order.argsort()
        window_rope = self.rope(index["unit_positions"])
        frame_rope = _permute_units(window_rope, frame_order, window_order_of_frames)
        x_NE = _permute_units(self.patch_embed(patches), window_order, unit_order)
        for i, layer in enumerate(self.layers):
            if i in self.full_attention_layers:
                x_NE = _permute_units(x_NE, frame_order, window_order_of_frames)
                x_NE = layer(x_NE, segments=frame_segments, rope=frame_rope)
                x_NE = _permute_units(x_NE, window_order_of_frames, frame_order)
            else:
                x_NE = layer(x_NE, segments=window_segments, rope=window_rope)
        return permute_rows(self.merger(x_NE), unit_order, window_order)


def _index_on_device(grid_thw: torch.Tensor) -> dict[str, Any]:
    index = window_encoder_index(vision_index(grid_thw.cpu()))
    batch_to_device(index, grid_thw.device)
    return index


def _permute_units(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    return permute_rows(x.unflatten(0, (len(order), -1)), order, inverse).flatten(0, 1)
