"""The decoder, from top to bottom: layers of attention and feed-forward, norm and output.

Parameters have torchtune's names, and layers are torchtune layers by type, so that its recipes
compile, checkpoint and shard them.

Shape suffixes: B sequences, S tokens of a sequence, M tokens that are looked at (S, or those in the
cache), E width, H heads of queries, K heads of keys and values, D dimension of a head, V
vocabulary, P positions whose logits or losses are wanted.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from torchtune_vl._torchtune import TransformerSelfAttentionLayer
from torchtune_vl.modules.attention import attend_within_segments
from torchtune_vl.modules.loss import chunked_cross_entropy
from torchtune_vl.modules.rotary import MultimodalRotaryTable, rotate
from torchtune_vl.modules.segments import Segments

# What attends to what: bool [B, S, M], the documents of a packed row, or causal attention
Mask = torch.Tensor | Segments | BlockMask | None


class Decoder(nn.Module):
    """The language model: embedding, layers, norm and output.

    Args:
        tok_embeddings: embedding of tokens.
        layers: its layers.
        norm: what follows them.
        output: from hidden states to logits; None where the token embedding does that too.
        rope: makes the rotary table of all layers.
        max_seq_len: tokens of the longest sequence.
    """

    def __init__(
        self,
        *,
        tok_embeddings: nn.Embedding,
        layers: list["DecoderLayer"],
        norm: nn.Module,
        output: nn.Module | None,
        rope: MultimodalRotaryTable,
        max_seq_len: int,
    ) -> None:
        super().__init__()
        self.tok_embeddings = tok_embeddings
        self.layers: Any = nn.ModuleList(layers)
        self.norm = norm
        self.output = output
        self.rope = rope
        self.max_seq_len = max_seq_len
        self.num_output_chunks = 0

    def forward(
        self,
        x_BSE: torch.Tensor,
        *,
        mask: Mask = None,
        input_pos: torch.Tensor | None = None,
        output_positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits, or losses.

        Args:
            x_BSE: embeddings of tokens and media.
            mask: which token attends to which, bool [B, S, S] (with a KV cache [B, S, length of
                the cache]), a BlockMask, or the :class:`~torchtune_vl.modules.Segments` of the
                flattened batch. Causal by default.
            input_pos: positions, int64 [B, S, 3] or, equal on all axes, [B, S]; 0, 1, 2, ... by
                default.
            output_positions: positions in the flattened batch whose logits are wanted, int64 [P].
            targets: the right entries at these positions, int64 [P], if it is their losses that
                are wanted.

        Returns:
            Logits, float32 [B, S, V], or [P, V] with ``output_positions``; a list of their chunks
            after ``set_num_output_chunks``. With ``targets`` the cross-entropy of each, float32
            [P].

        Raises:
            ValueError: if a sequence is longer than ``max_seq_len``, or there is a cache and no
                mask or positions.
        """
        if x_BSE.shape[1] > self.max_seq_len:
            raise ValueError(
                f"a sequence of {x_BSE.shape[1]} tokens is longer than max_seq_len, "
                f"{self.max_seq_len}"
            )
        if self.caches_are_setup() and (mask is None or input_pos is None):
            raise ValueError("with a KV cache the decoder needs a mask and positions")
        rope = self.rope(_three_axes(input_pos, x_BSE))
        for layer in self.layers:
            x_BSE = layer(x_BSE, mask=mask, rope=rope)
        if output_positions is not None:
            x_BSE = x_BSE.flatten(0, 1).index_select(0, output_positions)
        if targets is not None:
            return chunked_cross_entropy(self.norm(x_BSE), self.logits, targets)
        if self.num_output_chunks:
            chunks = self.norm(x_BSE).chunk(self.num_output_chunks, dim=1)
            return [self.logits(chunk) for chunk in chunks]
        return self.logits(self.norm(x_BSE)).float()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits of normalized hidden states, [..., E] to [..., V]."""
        if self.output is None:
            return F.linear(x, self.tok_embeddings.weight)
        return self.output(x)

    def set_num_output_chunks(self, num_output_chunks: int) -> None:
        """Return logits in parts, as torchtune's losses that make them chunk by chunk ask for.

        Args:
            num_output_chunks: how many.
        """
        self.num_output_chunks = num_output_chunks

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None = None,
        decoder_max_seq_len: int | None = None,
    ) -> None:
        """Keep keys and values of what is read, on the device of the layers.

        Args:
            batch_size: number of sequences.
            dtype: dtype of the caches.
            encoder_max_seq_len: ignored, torchtune's generation passes it.
            decoder_max_seq_len: tokens that they hold, by default ``max_seq_len``.
        """
        max_seq_len = decoder_max_seq_len or self.max_seq_len
        for layer in self.layers:
            layer.attn.kv_cache = KVCache(batch_size, max_seq_len, dtype)

    def caches_are_setup(self) -> bool:
        """Whether keys and values are kept."""
        return self.layers[0].attn.kv_cache is not None

    def delete_caches(self) -> None:
        """Keep nothing any more."""
        for layer in self.layers:
            layer.attn.kv_cache = None


def _three_axes(input_pos: torch.Tensor | None, x_BSE: torch.Tensor) -> torch.Tensor:
    if input_pos is None:
        input_pos = torch.arange(x_BSE.shape[1], device=x_BSE.device)
    if input_pos.ndim == 1:  # of tokens or, where there is one of each, of sequences
        input_pos = input_pos.view(-1, x_BSE.shape[1]).expand(x_BSE.shape[:2])
    if input_pos.ndim == 2:
        input_pos = input_pos[..., None].expand(-1, -1, 3)
    return input_pos


class DecoderLayer(TransformerSelfAttentionLayer):
    """Attention and feed-forward, each with its norm before it.

    Args:
        attn: attention.
        mlp: feed-forward.
        sa_norm: norm before attention.
        mlp_norm: norm before the feed-forward.
    """

    def __init__(
        self, *, attn: "Attention", mlp: "FeedForward", sa_norm: nn.Module, mlp_norm: nn.Module
    ) -> None:
        super().__init__(attn, mlp, sa_norm=sa_norm, mlp_norm=mlp_norm)

    def forward(self, x_BSE: torch.Tensor, *, mask: Mask, rope: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            x_BSE: hidden states.
            mask: as in :meth:`Decoder.forward`.
            rope: rotary table, float32 [B, S, 2, D/2].

        Returns:
            Hidden states.
        """
        x_BSE = x_BSE + self.attn(self.sa_norm(x_BSE), mask=mask, rope=rope)
        return x_BSE + self.mlp(self.mlp_norm(x_BSE))


class Attention(nn.Module):
    """Attention with heads of keys and values that several heads of queries share.

    Args:
        q_proj: projection to queries.
        k_proj: projection to keys.
        v_proj: projection to values.
        output_proj: projection of the heads' outputs.
        head_dim: dimension of a head.
        dropout: dropout of attention weights in training.
    """

    def __init__(
        self,
        *,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
        head_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj
        self.head_dim = head_dim
        self.dropout = dropout
        self.kv_cache: KVCache | None = None

    def forward(self, x_BSE: torch.Tensor, *, mask: Mask, rope: torch.Tensor) -> torch.Tensor:
        """Attend; see :meth:`DecoderLayer.forward`."""
        q_BSHD, k_BSKD, v_BSKD = (
            projection(x_BSE).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BSHD, k_BSKD = rotate(q_BSHD, rope), rotate(k_BSKD, rope)
        dropout = self.dropout if self.training else 0.0
        if isinstance(mask, Segments):
            if dropout:
                raise ValueError("packed rows have no attn_dropout: set it to 0, or pad instead")
            rows = (x.flatten(0, 1) for x in (q_BSHD, k_BSKD, v_BSKD))
            out = attend_within_segments(*rows, mask, is_causal=True).view_as(q_BSHD)
        else:
            q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSKD, v_BSKD))
            if self.kv_cache is not None:
                k, v = self.kv_cache.append(k, v)
            out = _attend(q, k, v, mask, dropout).transpose(1, 2)
        return self.output_proj(out.flatten(2))


def _attend(
    q_BHSD: torch.Tensor,
    k_BKMD: torch.Tensor,
    v_BKMD: torch.Tensor,
    mask: torch.Tensor | BlockMask | None,
    dropout: float,
) -> torch.Tensor:
    if isinstance(mask, BlockMask):
        return flex_attention(q_BHSD, k_BKMD, v_BKMD, block_mask=mask, enable_gqa=True)
    if mask is not None:
        mask = mask[:, None, :, : k_BKMD.shape[2]]
    return F.scaled_dot_product_attention(
        q_BHSD,
        k_BKMD,
        v_BKMD,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        enable_gqa=True,
    )


class KVCache(nn.Module):
    """Keys and values of all tokens that a layer has read.

    Their number is known to the host, so that attention looks at no more than there is.

    Args:
        batch_size: number of sequences.
        max_seq_len: tokens of each that find room.
        dtype: dtype of what is kept.
    """

    def __init__(self, batch_size: int, max_seq_len: int, dtype: torch.dtype) -> None:
        super().__init__()  # torchtune's generation finds and deletes modules
        self.size = (batch_size, max_seq_len)
        self.dtype = dtype
        self.length = 0
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def append(
        self, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens.

        Args:
            k_BKSD: their keys.
            v_BKSD: their values.

        Returns:
            Keys and values of all tokens so far, [B, K, M, D].
        """
        if self.kept is None:
            batch_size, max_seq_len = self.size
            shape = (batch_size, k_BKSD.shape[1], max_seq_len, k_BKSD.shape[3])
            self.kept = (
                k_BKSD.new_zeros(shape, dtype=self.dtype),
                k_BKSD.new_zeros(shape, dtype=self.dtype),
            )
        end = self.length + k_BKSD.shape[2]
        for kept, new in zip(self.kept, (k_BKSD, v_BKSD), strict=True):
            kept[:, :, self.length : end] = new
        self.length = end
        k, v = (kept[:, :, :end] for kept in self.kept)
        return k, v


class FeedForward(nn.Module):
    """A feed-forward, gated where it has a third layer (SwiGLU, arXiv 2002.05202).

    Args:
        w1: from the width to that of the hidden layer, before the activation.
        w2: back to the width.
        w3: the gate's partner, likewise from the width; None for none.
        activation: the activation.
    """

    def __init__(
        self,
        *,
        w1: nn.Module,
        w2: nn.Module,
        w3: nn.Module | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self.w1 = w1
        self.w2 = w2
        self.w3 = w3
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it to hidden states [..., E]."""
        hidden = self.activation(self.w1(x))
        # In place, for inference takes no third tensor of the hidden width then
        return self.w2(hidden if self.w3 is None else hidden.mul_(self.w3(x)))
