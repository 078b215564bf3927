"""The vision encoder, and how what it makes of media comes into the decoder's text.

Shape suffixes: B sequences, S tokens of a sequence, N patches, U units of patches that become one
embedding, E width of the decoder (of B and S) or of the encoder (of N), H heads, D dimension of a
head.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from torchtune_vl._torchtune import TransformerSelfAttentionLayer
from torchtune_vl.media import CHANNELS, Geometry
from torchtune_vl.modules.attention import attend_within_segments, permute_rows
from torchtune_vl.modules.decoder import Decoder, FeedForward, Mask
from torchtune_vl.modules.positions import encoder_index, vision_index
from torchtune_vl.modules.rotary import VisionRotaryTable, rotate
from torchtune_vl.modules.segments import Segments


class VisionLanguageModel(nn.Module):
    """A decoder whose placeholder tokens are replaced by embeddings of images and videos.

    Early fusion, without a host synchronisation.

    Args:
        decoder: the language model.
        vision_encoder: from patches to embeddings of the decoder's width.
        placeholder_ids: ids of the tokens that embeddings of media replace, in order.
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
        mask: Mask = None,
        encoder_input: dict[str, dict[str, Any]] | None = None,
        input_pos: torch.Tensor | None = None,
        output_positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits, or losses, of text with media.

        Without media the encoder has no part in it, and its gradients are missing. Where other
        processes, which may have media, would wait for this one in it, it takes a blank image, and
        its gradients are zero: a step in which no process has media has to drop them, or else
        momentum and weight decay act on it.

        Args:
            tokens: ids with placeholders expanded, int64 [B, S].
            mask: as in :meth:`~torchtune_vl.modules.Decoder.forward`.
            encoder_input: ``{"vision": {...}}`` with the arguments of
                :meth:`VisionEncoder.forward` for the media of all
                sequences in order; None for text alone.
            input_pos: M-RoPE positions, int64 [B, S, 3].
            output_positions: as in :meth:`~torchtune_vl.modules.Decoder.forward`.
            targets: likewise.

        Returns:
            Logits or losses as in :meth:`~torchtune_vl.modules.Decoder.forward`.

        Raises:
            ValueError: if ``encoder_input`` has another key than ``vision``.
            RuntimeError: if the number of embeddings is not that of the placeholders (on a GPU a
                device-side assert).
        """
        x_BSE = self.decoder.tok_embeddings(tokens)
        if encoder_input is not None:
            if encoder_input.keys() != {"vision"}:
                raise ValueError(
                    f"encoder_input has the keys {sorted(encoder_input)}, expected ['vision']"
                )
            media = self.encoders["vision"](**encoder_input["vision"])
            x_BSE = self._fuse(tokens, x_BSE, media)
        elif self._is_awaited(tokens):
            encoder = self.encoders["vision"]
            blank = encoder(**encoder.blank(tokens.device))
            x_BSE = x_BSE + 0 * blank.sum().to(x_BSE.dtype)
        return self.decoder(
            x_BSE,
            mask=mask,
            input_pos=input_pos,
            output_positions=output_positions,
            targets=targets,
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

    def _is_awaited(self, tokens: torch.Tensor) -> bool:
        """Whether the encoder has to run without media."""
        if self.training:
            # A backward needs something that is trained
            alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2
            return not (alone and any(p.requires_grad for p in self.decoder.parameters()))
        # And no process has media then. An empty row has one token, too, and no cache
        is_decoded = tokens.shape[1] == 1 and self.caches_are_setup()
        return not is_decoded and any(
            isinstance(m, FSDPModule) for m in self.encoders["vision"].modules()
        )

    def set_num_output_chunks(self, num_output_chunks: int) -> None:
        """See :meth:`Decoder.set_num_output_chunks`."""
        self.decoder.set_num_output_chunks(num_output_chunks)

    def setup_caches(self, batch_size: int, dtype: torch.dtype, **lengths: int | None) -> None:
        """See :meth:`Decoder.setup_caches`."""
        self.decoder.setup_caches(batch_size, dtype, **lengths)

    def caches_are_setup(self) -> bool:
        """Whether the decoder keeps what it has read."""
        return self.decoder.caches_are_setup()

    caches_are_enabled = caches_are_setup  # torchtune's generation asks for these, too
    tok_embeddings = property(lambda self: self.decoder.tok_embeddings)
    decoder_max_cache_seq_len = property(lambda self: self.decoder.layers[0].attn.kv_cache.size[1])

    def delete_caches(self) -> None:
        """See :meth:`Decoder.delete_caches`."""
        self.decoder.delete_caches()


class VisionEncoder(nn.Module):
    """Vision transformer with attention in windows, and over whole frames in some layers.

    After "Qwen2.5-VL Technical Report" (arXiv 2502.13923, section 2.1.1) and transformers'
    ``Qwen2_5_VisionTransformerPretrainedModel``. Cost grows linearly with the number of media.

    Args:
        geometry: sizes of patches, units and windows.
        patch_embed: embedding of patches.
        layers: the layers.
        merger: joins units of patches.
        rope: makes the rotary table.
        full_attention_layers: indices of the layers that attend over whole frames.
    """

    def __init__(
        self,
        *,
        geometry: Geometry,
        patch_embed: "PatchEmbedding",
        layers: list["VisionLayer"],
        merger: "PatchMerger",
        rope: VisionRotaryTable,
        full_attention_layers: Sequence[int],
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.patch_embed = patch_embed
        self.layers = nn.ModuleList(layers)
        self.merger = merger
        self.rope = rope
        self.full_attention_layers = frozenset(full_attention_layers)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor, **index: Any) -> torch.Tensor:
        """Encode media.

        Args:
            patches: of all media, as :class:`PatchEmbedding` takes them.
            grid_thw: patches of each medium along time, height and width, int64 [k, 3].
            **index: from :func:`~torchtune_vl.modules.encoder_index`, as the collate function
                gives it. Without it it is computed from ``grid_thw``, which waits for the device.

        Returns:
            Embeddings of the units, in the order of ``patches`` [U, width of the decoder].
        """
        index = index or self._index_of(grid_thw)
        segments = {k: Segments(*next(iter(index[k].items()))) for k in ("windows", "frames")}
        order_U = index["unit_order"]
        back_U = order_U.argsort()
        rope = self.rope(index["unit_positions"])
        x_NE = self.patch_embed(patches)
        x_NE = permute_rows(x_NE.unflatten(0, (len(order_U), -1)), order_U, back_U).flatten(0, 1)
        for number, layer in enumerate(self.layers):
            kind = "frames" if number in self.full_attention_layers else "windows"
            x_NE = layer(x_NE, segments=segments[kind], rope=rope)
        return permute_rows(self.merger(x_NE), back_U, order_U)

    def _index_of(self, grid_thw: torch.Tensor) -> dict[str, Any]:
        index = encoder_index(vision_index(grid_thw.cpu(), self.geometry))
        return _on_device(index, grid_thw.device)

    def blank(self, device: torch.device) -> dict[str, Any]:
        """Return what :meth:`forward` takes for the smallest image, all zeros."""
        return _blank(self.geometry, device)


@lru_cache
@torch.inference_mode(False)  # kept, it serves training after generation
def _blank(geometry: Geometry, device: torch.device) -> dict[str, Any]:
    size = geometry.merge_size
    grid_thw = torch.tensor([[1, size, size]])
    patches = torch.zeros(size**2, CHANNELS * geometry.patch_size**2, dtype=torch.uint8)
    index = encoder_index(vision_index(grid_thw, geometry))
    return _on_device({"patches": patches, "grid_thw": grid_thw, **index}, device)


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _on_device(entry, device) for key, entry in value.items()}
    return value.to(device)


class PatchEmbedding(nn.Module):
    """Linear embedding of patches (transformers' ``PatchEmbed`` of Qwen2-VL).

    Args:
        geometry: sizes of patches, and how uint8 patches are normalized.
        in_channels: colour channels.
        embed_dim: width of the encoder.
    """

    def __init__(self, *, geometry: Geometry, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.geometry = geometry
        kernel = (geometry.temporal_patch_size, geometry.patch_size, geometry.patch_size)
        self.proj = nn.Conv3d(in_channels, embed_dim, kernel, stride=kernel, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Embed.

        Args:
            patches: float [N, values of a patch], or uint8 before normalization of that width, or
                uint8 with a single frame each, of images alone.

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
        mean = 255 * _constant(self.geometry.mean, patches.device)
        std = 255 * _constant(self.geometry.std, patches.device)
        levels = patches.unflatten(1, (CHANNELS, -1)).float()
        normalized = levels.sub_(mean[:, None]).div_(std[:, None])
        if patches.shape[1] == self.geometry.values_per_patch:
            return normalized.flatten(1)
        frames = self.geometry.temporal_patch_size
        return normalized.unsqueeze(2).expand(-1, -1, frames, -1).flatten(1)


def _constant(values: Sequence[float], device: torch.device) -> torch.Tensor:
    # Filled on the device: a tensor made from a list would be copied there, and waited for
    return torch.stack(
        [torch.full((), value, dtype=torch.float32, device=device) for value in values]
    )


class VisionLayer(TransformerSelfAttentionLayer):
    """A layer of the encoder (transformers' ``Qwen2_5_VLVisionBlock``).

    Args:
        attn: attention.
        mlp: feed-forward.
        sa_norm: norm before attention.
        mlp_norm: norm before the feed-forward.
    """

    def __init__(
        self, *, attn: "VisionAttention", mlp: FeedForward, sa_norm: nn.Module, mlp_norm: nn.Module
    ) -> None:
        super().__init__(attn, mlp, sa_norm=sa_norm, mlp_norm=mlp_norm)

    def forward(
        self, x_NE: torch.Tensor, *, segments: Segments, rope: torch.Tensor
    ) -> torch.Tensor:
        """Apply the layer.

        Args:
            x_NE: hidden states.
            segments: what attends to what.
            rope: rotary table, float32 [N, 2, D/2].

        Returns:
            Hidden states.
        """
        x_NE = x_NE + self.attn(self.sa_norm(x_NE), segments=segments, rope=rope)
        return x_NE + self.mlp(self.mlp_norm(x_NE))


class VisionAttention(nn.Module):
    """Attention within segments (transformers' ``VisionAttention`` of Qwen2-VL).

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
        """Attend; see :meth:`VisionLayer.forward`."""
        q_NHD, k_NHD, v_NHD = self.qkv(x_NE).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        q_NHD, k_NHD = rotate(q_NHD, rope), rotate(k_NHD, rope)
        return self.output_proj(attend_within_segments(q_NHD, k_NHD, v_NHD, segments).flatten(1))


class PatchMerger(nn.Module):
    """Joins the patches of a unit into one embedding (transformers' ``PatchMerger``).

    Args:
        norm: normalisation of each patch.
        mlp: from a unit's patches, concatenated, to the decoder's width.
        unit_size: patches of a unit.
    """

    def __init__(self, *, norm: nn.Module, mlp: FeedForward, unit_size: int) -> None:
        super().__init__()
        self.norm = norm
        self.mlp = mlp
        self.unit_size = unit_size

    def forward(self, x_NE: torch.Tensor) -> torch.Tensor:
        """Merge hidden states into embeddings [U, width of the decoder]."""
        return self.mlp(self.norm(x_NE).unflatten(0, (-1, self.unit_size)).flatten(1))
