"""Fusion of media into the token stream, and the decoder that takes it.

Shape notation: b sequences, s tokens of a sequence, d width of the decoder, v vocabulary,
n positions whose logits or losses are wanted.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtune.modules import MultiHeadAttention, TransformerDecoder
from torchtune.modules.model_fusion import EarlyFusionModel
from torchtune.utils import batch_to_device

from torchtune_vl.models.qwen2_5_vl._patches import PATCH_SIZE
from torchtune_vl.models.qwen2_5_vl._position_embeddings import MultimodalRotaryTable
from torchtune_vl.models.qwen2_5_vl._positions import MERGE_SIZE, vision_index
from torchtune_vl.modules import (
    Documents,
    attend_within_documents,
    chunked_cross_entropy,
    window_encoder_index,
)


class DocumentAttention(MultiHeadAttention):
    """torchtune's attention, which takes the documents of packed rows for a mask too.

    Args:
        **kwargs: arguments of :class:`~torchtune.modules.MultiHeadAttention`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._attend_by_mask: Callable[..., torch.Tensor] = self._attention_call  # type: ignore[has-type]
        self._attention_call = self._attend

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: Any,
        dropout_p: float,
        is_causal: bool,
    ) -> torch.Tensor:
        if not isinstance(mask, Documents):
            return self._attend_by_mask(
                q, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal
            )
        if dropout_p:
            raise ValueError("packed rows have no attn_dropout: set it to 0, or pad instead")
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        out = attend_within_documents(*rows, documents=mask)
        return out.unflatten(0, (len(q), -1)).transpose(1, 2)


class MRoPEDecoder(TransformerDecoder):
    """torchtune's decoder with M-RoPE, whose rotary table is made once for all layers.

    Args:
        rope: makes the table.
        **kwargs: arguments of :class:`~torchtune.modules.TransformerDecoder`.
    """

    def __init__(self, *, rope: MultimodalRotaryTable, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rope = rope

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        input_pos: torch.Tensor | None = None,
        output_positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits, or losses.

        Args:
            tokens: ids [b, s], or embeddings [b, s, d] where the embedding is taken out.
            mask: which token attends to which, bool [b, s, s] (with a KV cache [b, s, cache
                length]), a BlockMask, or the :class:`~torchtune_vl.modules.Documents` of the
                flattened batch. Causal by default.
            input_pos: positions, int64 [b, s, 3] or, equal on all axes, [b, s]; 0, 1, 2, ... by
                default.
            output_positions: positions in the flattened batch whose logits are wanted, int64 [n].
            targets: the right entries at these positions, int64 [n], if it is their losses that
                are wanted.

        Returns:
            Logits, float32 [b, s, v], or [n, v] with ``output_positions``; a list of their chunks
            after ``set_num_output_chunks``. With ``targets`` the cross-entropy of each, float32
            [n].
        """
        self._validate_inputs(tokens.shape[1], mask=mask, input_pos=input_pos)
        rope = self.rope(_three_axes(input_pos, tokens))
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, mask=mask, input_pos=rope)
        if output_positions is not None:
            h = h.flatten(0, 1).index_select(0, output_positions)
        if targets is not None:
            return chunked_cross_entropy(self.norm(h), self.output, targets)
        return self.unembed(h)


def _three_axes(input_pos: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    if input_pos is None:
        input_pos = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
    if input_pos.ndim == 2:
        input_pos = input_pos[..., None].expand(-1, -1, 3)
    return input_pos


class VisionFusionModel(EarlyFusionModel):
    """torchtune's early fusion for an encoder of images and videos, without a host synchronisation.

    Embeddings of media take the places of the placeholder tokens, in order.

    Args:
        decoder: the language model.
        vision_encoder: from patches to embeddings.
        placeholder_ids: ids of the tokens that embeddings of media replace.
        decoder_trainable: whether the decoder, with its token embedding, is trained.
        encoder_trainable: whether the encoder without its merger is trained.
        fusion_trainable: whether the merger is trained.
    """

    def __init__(
        self,
        *,
        decoder: MRoPEDecoder,
        vision_encoder: nn.Module,
        placeholder_ids: tuple[int, ...],
        decoder_trainable: bool,
        encoder_trainable: bool,
        fusion_trainable: bool,
    ) -> None:
        super().__init__(
            decoder=decoder,
            encoders={"vision": vision_encoder},
            encoder_tokens={"vision": placeholder_ids[0]},
            decoder_trainable=decoder_trainable,
            encoders_trainable=encoder_trainable,
            fusion_trainable=fusion_trainable,
        )
        self.placeholder_ids = placeholder_ids

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None = None,
        decoder_max_seq_len: int | None = None,
    ) -> None:
        """Set up the KV caches of the decoder.

        Args:
            batch_size: number of sequences.
            dtype: dtype of the caches.
            encoder_max_seq_len: ignored, there is no cross-attention.
            decoder_max_seq_len: tokens that the caches hold, by default the decoder's maximum.
        """
        self.decoder.setup_caches(batch_size, dtype, decoder_max_seq_len=decoder_max_seq_len)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
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
            tokens: ids with placeholders expanded, int64 [b, s].
            mask: as in :meth:`MRoPEDecoder.forward`.
            encoder_input: ``{"vision": {...}}`` with the arguments of
                :meth:`Qwen2_5_VLVisionEncoder.forward` for the media of all sequences in order;
                None for text alone.
            input_pos: M-RoPE positions, int64 [b, s, 3].
            output_positions: as in :meth:`MRoPEDecoder.forward`.
            targets: likewise.

        Returns:
            Logits or losses as in :meth:`MRoPEDecoder.forward`.

        Raises:
            ValueError: if ``encoder_input`` has another key than ``vision``.
            RuntimeError: if the number of embeddings is not that of the placeholders (on a GPU a
                device-side assert).
        """
        h = self.tok_embeddings(tokens)
        if encoder_input is not None:
            if encoder_input.keys() != self.encoders.keys():
                raise ValueError(
                    f"encoder_input has the keys {sorted(encoder_input)}, expected "
                    f"{sorted(self.encoders.keys())}"
                )
            h = self._fuse(tokens, h, self.encoders["vision"](**encoder_input["vision"]))
        elif self._is_awaited(tokens):
            h = h + 0 * self.encoders["vision"](**_blank_unit(tokens.device)).sum().to(h.dtype)
        return self.decoder(
            h,
            mask=mask,
            input_pos=input_pos,
            output_positions=output_positions,
            targets=targets,
        )

    def _is_awaited(self, tokens: torch.Tensor) -> bool:
        """Whether the encoder has to run without media."""
        if self.training:
            # A backward needs something that is trained
            alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2
            return not (alone and any(p.requires_grad for p in self.decoder.parameters()))
        # And no process has media then. An empty row has one token, too, and no cache
        is_decoded = tokens.shape[1] == 1 and self.caches_are_setup()
        encoder = self.encoders["vision"]
        return not is_decoded and any(isinstance(m, FSDPModule) for m in encoder.modules())

    def _fuse(self, tokens: torch.Tensor, h: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
        is_placeholder = torch.zeros_like(tokens, dtype=torch.bool)
        for token_id in self.placeholder_ids:
            is_placeholder |= tokens == token_id
        torch._assert_async(
            is_placeholder.sum() == len(media),
            "the batch does not have one placeholder token for each embedding of its media",
        )
        # The size is known from the media: the positions need no answer from the device
        positions = torch.nonzero_static(is_placeholder.flatten(), size=len(media)).squeeze(1)
        fused = h.flatten(0, 1).index_copy(0, positions, media.to(h.dtype))
        return fused.view_as(h)


@lru_cache
@torch.inference_mode(False)  # kept, it serves training after generation
def _blank_unit(device: torch.device) -> dict[str, Any]:
    """The smallest image that the encoder takes, all zeros."""
    grid_thw = torch.tensor([[1, MERGE_SIZE, MERGE_SIZE]])
    blank = {
        "patches": torch.zeros(MERGE_SIZE**2, 3 * PATCH_SIZE**2, dtype=torch.uint8),
        "grid_thw": grid_thw,
        **window_encoder_index(vision_index(grid_thw)),
    }
    batch_to_device(blank, device)
    return blank
