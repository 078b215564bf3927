"""The vision encoder, and how what it makes of media comes into the decoder's text."""

# Shape suffixes: B sequences, S tokens of a sequence, N patches, U units of patches that become one
# embedding, E width of the decoder (of B and S) or the encoder (of N), H heads, D their dimension

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map

from torchtune_vl.media import CHANNELS, Geometry
from torchtune_vl.modules import attention
from torchtune_vl.modules.adapters import MakeLinear
from torchtune_vl.modules.context import RowShare
from torchtune_vl.modules.decoder import Decoder, FeedForward, Mask, TransformerLayer
from torchtune_vl.modules.dimensions import Dimensions
from torchtune_vl.modules.kv_cache import Continuations, Step
from torchtune_vl.modules.layout import Segments, encoder_index, vision_index


class VisionLanguageModel(nn.Module):
    """A decoder whose placeholder tokens are replaced by embeddings of images and videos, in order.

    Early fusion, without a host synchronisation.
    """

    def __init__(
        self, *, decoder: Decoder, vision_encoder: nn.Module, placeholder_ids: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.encoders: Any = nn.ModuleDict({"vision": vision_encoder})
        self.placeholder_ids = placeholder_ids

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        encoder_input: dict[str, dict[str, Any]] | None = None,
        mask: Mask = None,
        input_pos: torch.Tensor | None = None,
        output_positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits, or losses, of tokens with placeholders expanded, int64 [B, S].

        ``encoder_input``, None for text alone, is ``{"vision": {...}}`` with the arguments of
        :meth:`VisionEncoder.forward` for the media of all sequences in order. Others, and what
        is returned, are those of :meth:`Decoder.forward`.

        Without media the encoder has no part in it, and its gradients are missing. Where other
        processes, which may have media, would wait for this one in it, it takes a blank image, and
        its gradients are zero: a step in which no process has media has to drop them, or else
        momentum and weight decay act on it.

        Raises ``ValueError`` if ``encoder_input`` has another key, and ``RuntimeError`` if the
        number of embeddings is not that of the placeholders (on a GPU a device-side assert).
        """
        x_BSE = self.decoder.tok_embeddings(tokens)
        encoder = self.encoders["vision"]
        if encoder_input is not None:
            if encoder_input.keys() != {"vision"}:
                raise ValueError(f"encoder_input has {sorted(encoder_input)}, expected ['vision']")
            media = encoder(**encoder_input["vision"])
            if isinstance(mask, RowShare):
                media = mask.exchange(media)
            x_BSE = self._fuse(tokens, x_BSE, media)
        elif self._is_awaited(mask):
            blank = encoder(**_blank(encoder.geometry, tokens.device))
            x_BSE = x_BSE + 0 * blank.sum().to(x_BSE.dtype)
        return self.decoder(
            x_BSE, mask, input_pos=input_pos, output_positions=output_positions, targets=targets
        )

    def _fuse(self, tokens: torch.Tensor, x_BSE: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
        is_placeholder = torch.zeros_like(tokens, dtype=torch.bool)
        for token_id in self.placeholder_ids:
            is_placeholder |= tokens == token_id
        torch._assert_async(
            is_placeholder.sum() == len(media),
            "the batch does not have one placeholder token for each embedding of its media",
        )
        # The size is known from the media: the positions need no answer from the device
        positions = torch.nonzero_static(is_placeholder.flatten(), size=len(media)).squeeze(1)
        return x_BSE.flatten(0, 1).index_copy(0, positions, media.to(x_BSE.dtype)).view_as(x_BSE)

    def _is_awaited(self, mask: Mask) -> bool:
        """Whether the encoder has to run without media."""
        if self.training:
            # A backward needs something that is trained
            alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2
            return not (alone and any(p.requires_grad for p in self.decoder.parameters()))
        is_sharded = (isinstance(m, FSDPModule) for m in self.encoders["vision"].modules())
        # No process has media behind a prompt
        return not isinstance(mask, Step | Continuations) and any(is_sharded)

    # What torchtune's recipes and generation ask the decoder for
    tok_embeddings = property(lambda self: self.decoder.tok_embeddings)
    set_num_output_chunks = property(lambda self: self.decoder.set_num_output_chunks)
    setup_caches = property(lambda self: self.decoder.setup_caches)
    caches_are_setup = property(lambda self: self.decoder.caches_are_setup)
    caches_are_enabled = caches_are_setup
    decoder_max_cache_seq_len = property(lambda self: self.decoder.layers[0].attn.kv_cache.size[1])
    delete_caches = property(lambda self: self.decoder.delete_caches)


class VisionEncoder(nn.Module):
    """Vision transformer with attention in windows, and over whole frames in some layers.

    After "Qwen2.5-VL Technical Report" (arXiv 2502.13923, section 2.1.1) and transformers'
    ``Qwen2_5_VisionTransformerPretrainedModel``. Cost grows linearly with the number of media.
    Raises ``ValueError`` if the width does not divide into the heads.
    """

    def __init__(self, dims: Dimensions, linear: MakeLinear, merger_linear: MakeLinear) -> None:
        super().__init__()
        width, heads = dims.vision_embed_dim, dims.vision_num_heads
        if width % (4 * heads):
            expected = f"{heads} heads of a dimension divisible by 4"
            raise ValueError(f"the encoder's width of {width} does not divide into {expected}")
        patch, frames = dims.patch_size, dims.temporal_patch_size
        self.geometry = replace(dims.geometry, patch_size=patch, temporal_patch_size=frames)
        self.head_dim = width // heads
        self.full_attention_layers = frozenset(dims.full_attention_layers)
        self.patch_embed = PatchEmbedding(self.geometry, dims.vision_in_channels, width)
        gated, activation = dims.vision_gated, dims.vision_activation
        mlp = partial(FeedForward, bias=True, gated=gated, activation=activation)
        self.layers = nn.ModuleList(
            TransformerLayer(
                VisionAttention(width, self.head_dim, linear),
                mlp(width, dims.vision_intermediate_dim, linear),
                sa_norm=dims.vision_norm(width),
                mlp_norm=dims.vision_norm(width),
            )
            for _ in range(dims.vision_num_layers)
        )
        self.merger = PatchMerger(dims, merger_linear)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor, **index: Any) -> torch.Tensor:
        """Encode media, as [U, width of the decoder] in their order.

        ``patches`` are those of all, as :class:`PatchEmbedding` takes them, ``grid_thw``, int64
        [k, 3], their numbers along time, height and width. The index is that of
        :func:`~torchtune_vl.modules.encoder_index`, as the collate function gives it; without it
        it is computed from ``grid_thw``, which waits for the device.
        """
        index = index or _index(grid_thw, self.geometry)
        segments = {k: Segments(*next(iter(index[k].items()))) for k in ("windows", "frames")}
        rope = self._rope(index["unit_positions"])
        order_U = index["unit_order"]
        back_U = order_U.argsort()
        x_UNE = self.patch_embed(patches).unflatten(0, (len(order_U), -1))
        x_NE = attention.permute_rows(x_UNE, order_U, back_U).flatten(0, 1)
        for number, layer in enumerate(self.layers):
            kind = "frames" if number in self.full_attention_layers else "windows"
            x_NE = layer(x_NE, segments=segments[kind], rope=rope)
        return attention.permute_rows(self.merger(x_NE), back_U, order_U)

    def _rope(self, unit_positions: torch.Tensor) -> torch.Tensor:
        """Make the rotary table of all patches [N, 2, D] from row and column of units [U, 2]."""
        size, device = self.geometry.merge_size, unit_positions.device
        steps = torch.arange(size, device=device)
        positions = unit_positions[:, None] * size + torch.cartesian_prod(steps, steps)
        frequencies = attention.inverse_frequencies(self.head_dim // 2, 10000.0, device)
        return attention.rotary_table(positions.flatten(0, 1), [frequencies] * 2)


def _index(grid_thw: torch.Tensor, geometry: Geometry) -> dict[str, Any]:
    index = encoder_index(vision_index(grid_thw.cpu(), geometry))
    return tree_map(lambda tensor: tensor.to(grid_thw.device), index)


@lru_cache
@torch.inference_mode(False)  # kept, it serves training after generation
def _blank(geometry: Geometry, device: torch.device) -> dict[str, Any]:
    """What the encoder takes for the smallest image, all zeros."""
    size = geometry.merge_size
    shape = (size**2, CHANNELS * geometry.patch_size**2)
    patches = torch.zeros(shape, dtype=torch.uint8, device=device)
    grid_thw = torch.tensor([[1, size, size]], device=device)
    return {"patches": patches, "grid_thw": grid_thw, **_index(grid_thw, geometry)}


class PatchEmbedding(nn.Module):
    """Linear embedding of patches (transformers' ``PatchEmbed`` of Qwen2-VL)."""

    def __init__(self, geometry: Geometry, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.geometry = geometry
        kernel = (geometry.temporal_patch_size, geometry.patch_size, geometry.patch_size)
        self.proj = nn.Conv3d(in_channels, embed_dim, kernel, stride=kernel, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Embed patches [N, values of a patch] as [N, E] in the dtype of the weights.

        They are float, or uint8 before normalization, where images alone may have a single frame.
        """
        if patches.dtype == torch.uint8:
            patches = self._normalize(patches)
        # A convolution whose stride is its kernel is a matrix product, and faster as one
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1))

    def _normalize(self, patches: torch.Tensor) -> torch.Tensor:
        """The float32 operations of the image transform, and an image's copy along time."""
        # Filled on the device: a tensor made from a list would be copied there, and waited for
        mean, std = (
            255 * torch.stack([patches.new_full((), v, dtype=torch.float32) for v in values])
            for values in (self.geometry.mean, self.geometry.std)
        )
        levels = patches.unflatten(1, (CHANNELS, -1)).float()
        normalized = levels.sub_(mean[:, None]).div_(std[:, None])
        if patches.shape[1] == self.geometry.values_per_patch:
            return normalized.flatten(1)
        frames = self.geometry.temporal_patch_size
        return normalized.unsqueeze(2).expand(-1, -1, frames, -1).flatten(1)


class VisionAttention(nn.Module):
    """Attention within segments (transformers' ``VisionAttention`` of Qwen2-VL)."""

    def __init__(self, embed_dim: int, head_dim: int, linear: MakeLinear) -> None:
        super().__init__()
        self.qkv = linear("qkv", embed_dim, 3 * embed_dim, True)
        self.output_proj = linear("output_proj", embed_dim, embed_dim, True)
        self.head_dim = head_dim

    def forward(self, x_NE: torch.Tensor, segments: Segments, rope: torch.Tensor) -> torch.Tensor:
        """Attend within segments, with a rotary table, float32 [N, 2, D]."""
        q_NHD, k_NHD, v_NHD = self.qkv(x_NE).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        q_NHD, k_NHD = attention.rotate(q_NHD, rope), attention.rotate(k_NHD, rope)
        out_NHD = attention.attend_within_segments(q_NHD, k_NHD, v_NHD, segments)
        return self.output_proj(out_NHD.flatten(1))


class PatchMerger(nn.Module):
    """Joins the patches of a unit into one embedding (transformers' ``PatchMerger``)."""

    def __init__(self, dims: Dimensions, linear: MakeLinear) -> None:
        super().__init__()
        self.unit_size = dims.geometry.merge_size**2
        width = dims.vision_embed_dim * self.unit_size
        self.norm = dims.vision_norm(dims.vision_embed_dim)
        mlp = partial(FeedForward, bias=True, gated=False, activation=F.gelu)
        self.mlp = mlp(width, width, linear, out_dim=dims.embed_dim)

    def forward(self, x_NE: torch.Tensor) -> torch.Tensor:
        """Merge hidden states into embeddings [U, width of the decoder]."""
        return self.mlp(self.norm(x_NE).unflatten(0, (-1, self.unit_size)).flatten(1))
