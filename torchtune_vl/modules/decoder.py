"""The decoder, from top to bottom: embedding, layers of attention and feed-forward, output.

Parameters have torchtune's names, and layers are its layers by type, for its recipes.
"""

# Shape suffixes: B sequences, S tokens of a sequence, M tokens that are looked at (S, or those in
# the cache), E width, H heads of queries, K heads of keys and values, D dimension of a head, V
# vocabulary, P positions whose logits or losses are wanted

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from torchtune_vl._torchtune import TransformerSelfAttentionLayer
from torchtune_vl.modules import attention
from torchtune_vl.modules.adapters import MakeLinear
from torchtune_vl.modules.context import RowShare
from torchtune_vl.modules.dimensions import Dimensions
from torchtune_vl.modules.experts import MixtureOfExperts, balance_loss
from torchtune_vl.modules.kv_cache import Continuations, KVCache, Prefill, Step
from torchtune_vl.modules.layout import Segments
from torchtune_vl.modules.linear import linear
from torchtune_vl.modules.loss import chunked_cross_entropy

# What attends to what: bool [B, S, M], the documents of a packed row, a device's share of one, new
# tokens of sequences that have others in the cache, or causal attention
Mask = torch.Tensor | Segments | RowShare | Prefill | Step | Continuations | BlockMask | None


class Decoder(nn.Module):
    """The language model. Raises ``ValueError`` if its dimensions do not fit each other."""

    def __init__(self, dims: Dimensions, linear: MakeLinear) -> None:
        super().__init__()
        self.head_dim = 2 * sum(dims.mrope_sections)
        dim = f"twice the sum of the M-RoPE sections {list(dims.mrope_sections)}"
        if dims.head_dim not in (None, self.head_dim):
            raise ValueError(f"head_dim is {dims.head_dim}, and not {dim}")
        if dims.head_dim is None and dims.embed_dim != dims.num_heads * self.head_dim:
            heads = f"{dims.num_heads} heads of {dim}"
            raise ValueError(f"a width of {dims.embed_dim} does not divide into {heads}")
        if len(dims.deepstack_layers) > dims.num_layers:
            too_many = f"{len(dims.deepstack_layers)} layers of the encoder have features for it"
            raise ValueError(f"a decoder of {dims.num_layers} layers is too short: {too_many}")
        if dims.router_aux_loss_coef and not dims.num_experts:
            none = "router_aux_loss_coef is for the balance of experts, and this model has none"
            raise ValueError(f"{none}: leave it out")
        self.rope_base = dims.rope_base
        self.mrope_sections = dims.mrope_sections
        self.mrope_interleaved = dims.mrope_interleaved
        self.max_seq_len = dims.max_seq_len
        self.router_aux_loss_coef = dims.router_aux_loss_coef
        self.num_output_chunks = 0
        norm = partial(nn.RMSNorm, dims.embed_dim, eps=dims.norm_eps)
        self.tok_embeddings = nn.Embedding(dims.vocab_size, dims.embed_dim)
        self.layers: Any = nn.ModuleList(
            TransformerLayer(
                Attention(dims, linear),
                _feed_forward(dims, number, linear),
                sa_norm=norm(),
                mlp_norm=norm(),
            )
            for number in range(dims.num_layers)
        )
        self.deepstack = Deepstack()
        self.norm = norm()
        is_tied = dims.tie_word_embeddings
        self.output = None if is_tied else linear("output", dims.embed_dim, dims.vocab_size, False)

    def forward(
        self,
        x_BSE: torch.Tensor,
        mask: Mask = None,
        *,
        input_pos: torch.Tensor | None = None,
        output_positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        features: Sequence[torch.Tensor] = (),
        feature_positions: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits, or losses, of embeddings of tokens and media.

        ``mask`` says which token attends to which: bool [B, S, S] (with torchtune's KV cache [B, S,
        length of the cache]), a BlockMask, the :class:`~torchtune_vl.modules.Segments` of the
        flattened batch, a ``RowShare`` where the tokens are those of one of several devices, or a
        ``Prefill``, ``Step`` or ``Continuations`` of a cache; causal by default. Positions are
        int64 [B, S, 3] or, equal on all axes, [B, S]; 0, 1, 2, ... by default.
        ``output_positions``, int64 [P] in the flattened batch, are those whose logits are wanted,
        ``targets``, int64 [P], the right entries there, if it is losses. ``features`` [U, E] of
        media are added to what the first layers give, one to each, at their ``feature_positions``,
        int64 [U], likewise in the flattened batch.

        Returns logits, float32 [B, S, V] or [P, V], in chunks after :meth:`set_num_output_chunks`;
        with ``targets`` the cross-entropy of each, float32 [P], to which training with a
        ``router_aux_loss_coef`` adds so much of the balance of the row's experts, as their mean has
        it then. Raises ``ValueError`` if a sequence is longer than ``max_seq_len``, there is a
        cache and no mask or positions, or the balance is wanted with logits, or of other than whole
        packed rows.
        """
        longest = _longest_sequence(x_BSE, mask)
        if longest > self.max_seq_len:
            too_long = f"a sequence of {longest} tokens is longer than max_seq_len"
            raise ValueError(f"{too_long}, {self.max_seq_len}")
        if self.caches_are_setup() and (mask is None or input_pos is None):
            raise ValueError("with a KV cache the decoder needs a mask and positions")
        positions = _three_axes(input_pos, x_BSE)
        rope = attention.rotary_table(self._angles(positions))
        shape = x_BSE.shape
        followed = self._follow_routers(mask, targets)
        for layer, feature in zip_longest(self.layers, features):
            x_BSE = layer(x_BSE, mask=mask, rope=rope)
            if feature is not None:
                x_BSE = x_BSE + self.deepstack(feature, feature_positions, shape).to(x_BSE.dtype)
        if output_positions is not None:
            x_BSE = x_BSE.flatten(0, 1).index_select(0, output_positions)
        if targets is not None:
            losses = self._losses(self.norm(x_BSE), targets)
            return losses + self._balance(followed) if followed else losses
        if self.num_output_chunks:
            chunks = self.norm(x_BSE).chunk(self.num_output_chunks, dim=1)
            return [self.logits(chunk) for chunk in chunks]
        return self.logits(self.norm(x_BSE)).float()

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        frequencies = attention.inverse_frequencies(self.head_dim, self.rope_base, positions.device)
        if self.mrope_interleaved:
            return attention.angles_in_turns(positions, frequencies, self.mrope_sections)
        return attention.angles_by_sections(positions, frequencies.split(self.mrope_sections))

    def _follow_routers(self, mask: Mask, targets: torch.Tensor | None) -> list[MixtureOfExperts]:
        """Let experts tell what they do in this forward, if it is to count, and return them."""
        if not (self.training and self.router_aux_loss_coef):
            return []
        if targets is None:
            added = "router_aux_loss_coef is added to losses, and logits are asked for"
            raise ValueError(f"{added}: take the recipe finetune, or set it to 0")
        if not isinstance(mask, Segments):  # padding would count, or a share of the tokens alone
            needs = "router_aux_loss_coef needs packed rows, each whole on its device"
            raise ValueError(f"{needs}: take PackedRows and parallel.context=1, or set it to 0")
        mixtures = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MixtureOfExperts)]
        for mixture in mixtures:
            # Of its own: for each length of one of all, layers would be compiled anew
            mixture.routed = []
        return mixtures

    def _balance(self, mixtures: Sequence[MixtureOfExperts]) -> torch.Tensor:
        routed = [told for mixture in mixtures for told in mixture.routed or ()]
        for mixture in mixtures:
            mixture.routed = None  # recomputed in backward, they have nothing to tell
        return self.router_aux_loss_coef * balance_loss(routed, mixtures[0].num_active)

    def _losses(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.output is None:
            return chunked_cross_entropy(x, self.logits, targets)
        return self.output(x, targets=targets)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits of normalized hidden states, [..., E] to [..., V]."""
        if self.output is None:
            return linear(x, self.tok_embeddings.weight)
        return self.output(x)

    def set_num_output_chunks(self, num_output_chunks: int) -> None:
        """Return logits in parts, as torchtune's losses that make them chunk by chunk ask for."""
        self.num_output_chunks = num_output_chunks

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None = None,
        decoder_max_seq_len: int | None = None,
    ) -> None:
        """Keep keys and values of so many sequences, of ``max_seq_len`` tokens by default.

        Their dtype, and the length of an encoder's, which torchtune's generation passes, are
        ignored: they are kept as they are computed.
        """
        for layer in self.layers:
            layer.attn.kv_cache = KVCache(batch_size, decoder_max_seq_len or self.max_seq_len)

    def caches_are_setup(self) -> bool:
        """Whether keys and values are kept."""
        return self.layers[0].attn.kv_cache is not None

    def delete_caches(self) -> None:
        """Keep nothing any more."""
        for layer in self.layers:
            layer.attn.kv_cache = None


def _longest_sequence(x_BSE: torch.Tensor, mask: Mask) -> int:
    """How many tokens the longest sequence has that is here, 0 where the cache has seen to it."""
    if isinstance(mask, Prefill | Continuations):
        return 0
    if isinstance(mask, Segments | RowShare):  # of a row, whose documents have positions each
        documents = mask if isinstance(mask, Segments) else mask.keys
        return max(documents.lengths, default=0)
    return x_BSE.shape[1]


def _feed_forward(dims: Dimensions, layer: int, linear: MakeLinear) -> nn.Module:
    if dims.num_experts and layer not in dims.dense_layers:
        return MixtureOfExperts(dims, linear)
    return FeedForward(dims.embed_dim, dims.intermediate_dim, linear)


def _three_axes(input_pos: torch.Tensor | None, x_BSE: torch.Tensor) -> torch.Tensor:
    if input_pos is None:
        input_pos = torch.arange(x_BSE.shape[1], device=x_BSE.device)
    if input_pos.ndim == 1:  # of tokens or, where there is one of each, of sequences
        input_pos = input_pos.view(-1, x_BSE.shape[1]).expand(x_BSE.shape[:2])
    if input_pos.ndim == 2:
        input_pos = input_pos[..., None].expand(-1, -1, 3)
    return input_pos


class Deepstack(nn.Module):
    """Puts features of media where their tokens are (DeepStack, arXiv 2406.04334).

    A module, for devices that share tokens to take theirs.
    """

    def forward(
        self, feature_UE: torch.Tensor, positions_U: torch.Tensor, shape: torch.Size
    ) -> torch.Tensor:
        """Return features, and zeros elsewhere, as ``shape`` [B, S, E] says."""
        zeros = feature_UE.new_zeros(shape[:-1].numel(), shape[-1])
        return zeros.index_copy(0, positions_U, feature_UE).view(shape)


class TransformerLayer(TransformerSelfAttentionLayer):
    """Attention and feed-forward, each with its norm before it, of decoder and encoder."""

    def forward(self, x: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Apply the layer to hidden states; other ``inputs`` are those of its attention."""
        x = x + self.attn(self.sa_norm(x), **inputs)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Attention with heads of keys and values that several heads of queries share."""

    def __init__(self, dims: Dimensions, linear: MakeLinear) -> None:
        super().__init__()
        self.head_dim = 2 * sum(dims.mrope_sections)
        q_dim, kv_dim = (n * self.head_dim for n in (dims.num_heads, dims.num_kv_heads))
        self.q_proj = linear("q_proj", dims.embed_dim, q_dim, dims.attn_bias)
        self.k_proj = linear("k_proj", dims.embed_dim, kv_dim, dims.attn_bias)
        self.v_proj = linear("v_proj", dims.embed_dim, kv_dim, dims.attn_bias)
        self.output_proj = linear("output_proj", q_dim, dims.embed_dim, False)
        norm = partial(nn.RMSNorm, self.head_dim, eps=dims.norm_eps)
        self.q_norm, self.k_norm = (norm() if dims.qk_norm else None for _ in range(2))
        self.dropout = dims.attn_dropout
        self.kv_cache: KVCache | None = None

    def forward(self, x_BSE: torch.Tensor, *, mask: Mask, rope: torch.Tensor) -> torch.Tensor:
        """Attend with a mask as in :meth:`Decoder.forward` and a rotary table [B, S, 2, D]."""
        q_BSHD, k_BSKD, v_BSKD = (
            projection(x_BSE).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHD, k_BSKD = self.q_norm(q_BSHD), self.k_norm(k_BSKD)
        q_BSHD, k_BSKD = attention.rotate(q_BSHD, rope), attention.rotate(k_BSKD, rope)
        dropout = self.dropout if self.training else 0.0
        if isinstance(mask, Segments | RowShare) and dropout:
            raise ValueError("packed rows have no attn_dropout: set it to 0, or pad instead")
        if isinstance(mask, Segments):
            rows = (x.flatten(0, 1) for x in (q_BSHD, k_BSKD, v_BSKD))
            out = attention.attend_within_segments(*rows, mask, is_causal=True)
            return self.output_proj(out.view_as(q_BSHD).flatten(2))
        if isinstance(mask, RowShare | Prefill | Step | Continuations):
            q, k, v = (x.flatten(0, 1) for x in (q_BSHD, k_BSKD, v_BSKD))
            out = mask.attend(q, k, v, layer=self)
            return self.output_proj(out.view_as(q_BSHD).flatten(2))
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSKD, v_BSKD))
        if self.kv_cache is not None:
            k, v = self.kv_cache.append(k, v)
        if isinstance(mask, BlockMask):
            out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        else:
            attends = None if mask is None else mask[:, None, :, : k.shape[2]]
            out = F.scaled_dot_product_attention(
                q, k, v, attends, dropout, is_causal=mask is None, enable_gqa=True
            )
        return self.output_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """A feed-forward, gated by a third layer (SwiGLU, arXiv 2002.05202) or not."""

    def __init__(
        self,
        embed_dim: int,
        intermediate_dim: int,
        linear: MakeLinear,
        *,
        out_dim: int | None = None,
        bias: bool = False,
        gated: bool = True,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self.w1 = linear("w1", embed_dim, intermediate_dim, bias)
        self.w2 = linear("w2", intermediate_dim, out_dim or embed_dim, bias)
        self.w3 = linear("w3", embed_dim, intermediate_dim, bias) if gated else None
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it to hidden states [..., E]."""
        hidden = self.activation(self.w1(x))
        # In place, for inference takes no third tensor of the hidden width then
        return self.w2(hidden if self.w3 is None else hidden.mul_(self.w3(x)))
