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
        encoder, features, positions = self.encoders["vision"], (), None
        if encoder_input is not None:
            if encoder_input.keys() != {"vision"}:
                raise ValueError(f"encoder_input has {sorted(encoder_input)}, expected ['vision']")
            media = encoder(**encoder_input["vision"])
            if isinstance(mask, RowShare):
                media = mask.exchange(media)
            media, *features = media.split(x_BSE.shape[-1], dim=1)
            positions = self._positions(tokens, len(media))
            rows = x_BSE.flatten(0, 1).index_copy(0, positions, media.to(x_BSE.dtype))
            x_BSE = rows.view_as(x_BSE)
        elif self._is_awaited(mask):
            blank = encoder(**_blank(encoder.geometry, tokens.device))
            x_BSE = x_BSE + 0 * blank.sum().to(x_BSE.dtype)
        return self.decoder(
            x_BSE,
            mask,
            input_pos=input_pos,
            output_positions=output_positions,
            targets=targets,
            features=features,
            feature_positions=positions,
        )

    def _positions(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """The places of so many embeddings of media in the flattened batch, int64 [U]."""
        is_placeholder = torch.zeros_like(tokens, dtype=torch.bool)
        for token_id in self.placeholder_ids:
            is_placeholder |= tokens == token_id
        torch._assert_async(
            is_placeholder.sum() == count,
            "the batch does not have one placeholder token for each embedding of its media",
        )
        # The size is known from the media: the positions need no answer from the device
        return torch.nonzero_static(is_placeholder.flatten(), size=count).squeeze(1)

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
    ``Qwen2_5_VisionTransformerPretrainedModel``; with learned positions and features of several
    layers, after "Qwen3-VL Technical Report" (arXiv 2511.21631, section 2) and transformers'
    ``Qwen3VLVisionModel``. Cost grows linearly with the number of media. Raises ``ValueError`` if
    the width does not divide into the heads.
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
        channels = dims.vision_in_channels
        self.patch_embed = PatchEmbedding(self.geometry, channels, width, dims.patch_bias)
        grid = dims.position_grid
        self.pos_embed = LearnedPositions(grid, width, self.geometry) if grid else None
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
        self.deepstack_layers = tuple(dims.deepstack_layers)
        self.deepstack_mergers = nn.ModuleList(
            DeepstackMerger(dims, merger_linear) for _ in self.deepstack_layers
        )

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor, **index: Any) -> torch.Tensor:
        """Encode media, as embeddings [U, width of the decoder] in their order.

        Where there are deepstack layers, features of these stand behind the embeddings, each as
        wide.

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
        if self.pos_embed is not None:
            x_NE = x_NE + self.pos_embed(index["unit_positions"], segments["frames"]).to(x_NE.dtype)
        stacked = []
        for number, layer in enumerate(self.layers):
            kind = "frames" if number in self.full_attention_layers else "windows"
            x_NE = layer(x_NE, segments=segments[kind], rope=rope)
            if number in self.deepstack_layers:
                stacked.append(x_NE)
        features = [m(x) for m, x in zip(self.deepstack_mergers, stacked, strict=True)]
        media = torch.cat([self.merger(x_NE), *features], dim=1)
        return attention.permute_rows(media, back_U, order_U)

    def _rope(self, unit_positions: torch.Tensor) -> torch.Tensor:
        """Make the rotary table of all patches [N, 2, D] from row and column of units [U, 2]."""
        positions = _patch_positions(unit_positions, self.geometry.merge_size)
        frequencies = attention.inverse_frequencies(self.head_dim // 2, 10000.0, positions.device)
        angles = attention.angles_by_sections(positions, [frequencies] * 2)
        return attention.rotary_table(angles)


def _patch_positions(unit_positions: torch.Tensor, size: int) -> torch.Tensor:
    """Row and column of all patches [N, 2] from those of units [U, 2]."""
    steps = torch.arange(size, device=unit_positions.device)
    return (unit_positions[:, None] * size + torch.cartesian_prod(steps, steps)).flatten(0, 1)


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

    def __init__(
        self, geometry: Geometry, in_channels: int, embed_dim: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.geometry = geometry
        kernel = (geometry.temporal_patch_size, geometry.patch_size, geometry.patch_size)
        self.proj = nn.Conv3d(in_channels, embed_dim, kernel, stride=kernel, bias=bias)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Embed patches [N, values of a patch] as [N, E] in the dtype of the weights.

        They are float, or uint8 before normalization, where images alone may have a single frame.
        """
        if patches.dtype == torch.uint8:
            patches = self._normalize(patches)
        # A convolution whose stride is its kernel is a matrix product, and faster as one
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)

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


class LearnedPositions(nn.Module):
    """Embeddings of a square grid, interpolated to the patches of each frame.

    Bilinear, the corners of both lie on each other (transformers' ``Qwen3VLVisionModel``, its
    ``get_vision_interpolation_indices_and_weights``). Units of a frame have to come row by row.
    """

    def __init__(self, side: int, embed_dim: int, geometry: Geometry) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(side**2, embed_dim))
        self.side, self.merge_size = side, geometry.merge_size

    def forward(self, unit_positions: torch.Tensor, frames: Segments) -> torch.Tensor:
        """Interpolate for units at row and column [U, 2]; returns [N, E], at least float32."""
        unit_size, count = self.merge_size**2, len(unit_positions)
        ends = frames.boundaries.long() // unit_size
        # The last unit of a frame is in its last row and column
        last_F2 = unit_positions.index_select(0, ends[1:] - 1)
        last_U2 = last_F2.repeat_interleave(ends.diff(), dim=0, output_size=count)
        last_N2 = ((last_U2 + 1) * self.merge_size - 1).repeat_interleave(unit_size, dim=0)
        at_N2 = _patch_positions(unit_positions, self.merge_size).float()
        at_N2 = at_N2 * (self.side - 1) / last_N2
        before_N2 = at_N2.floor()
        share_N2 = at_N2 - before_N2
        lower_N2 = before_N2.long()
        upper_N2 = (lower_N2 + 1).clamp(max=self.side - 1)
        parts = [(lower_N2, 1 - share_N2), (upper_N2, share_N2)]
        corners = [
            F.embedding(y[:, 0] * self.side + x[:, 1], self.weight)
            * (of_y[:, 0] * of_x[:, 1])[:, None]
            for y, of_y in parts
            for x, of_x in parts
        ]
        return torch.stack(corners).sum(0)


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


class DeepstackMerger(PatchMerger):
    """Joins them as features, with a norm over each unit (``Qwen3VLVisionPatchMerger``)."""

    def __init__(self, dims: Dimensions, linear: MakeLinear) -> None:
        super().__init__(dims, linear)
        self.norm = dims.vision_norm(dims.vision_embed_dim * self.unit_size)

    def forward(self, x_NE: torch.Tensor) -> torch.Tensor:
        """Merge hidden states into features [U, width of the decoder]."""
        return self.mlp(self.norm(x_NE.unflatten(0, (-1, self.unit_size)).flatten(1)))
