"""Decoding with a KV cache."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F

from torchtune_vl.modules.vision import VisionLanguageModel


@torch.no_grad()  # FSDP cannot gather parameters in inference mode
def generate(
    model: VisionLanguageModel,
    batch: dict[str, Any],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int],
    temperature: float = 0.0,
    top_k: int | None = None,
) -> list[list[int]]:
    """Continue the prompts of a batch.

    They are padded on the left by :func:`~torchtune_vl.data.padded_collate_vision`, and on the
    device of the model, whose caches are not set up. A ``temperature`` of 0 takes the likeliest
    token, more makes unlikely ones likelier; the ``top_k`` likeliest are sampled from, or else all.

    Returns at most ``max_new_tokens`` new ids of each prompt, up to and with the first stop token.
    Raises ``ValueError`` if prompts are not padded on the left, or ``max_seq_len`` is too short.
    """
    if not isinstance(batch.get("mask"), torch.Tensor):
        remedy = 'collate it with padded_collate_vision(..., pad_direction="left")'
        raise ValueError(f"the batch has no mask of prompts that are padded on the left: {remedy}")
    tokens, mask, input_pos = batch["tokens"], batch["mask"], batch["input_pos"]
    media = batch.get("encoder_input")
    batch_size, prompt_length = tokens.shape
    length = prompt_length + max_new_tokens
    if length > model.decoder.max_seq_len:
        wanted = f"{prompt_length} tokens of prompt and {max_new_tokens} new ones"
        raise ValueError(f"{wanted} exceed the model's max_seq_len of {model.decoder.max_seq_len}")
    # An answer sees what the last token of its prompt sees, and what of itself is in the cache
    answer_mask = F.pad(mask[:, -1:], (0, max_new_tokens), value=True)
    position = input_pos.amax(dim=(1, 2))
    last = torch.arange(1, batch_size + 1, device=tokens.device) * prompt_length - 1
    stops = torch.tensor(list(stop_tokens), device=tokens.device)
    answers: list[torch.Tensor] = []
    ended = torch.zeros(batch_size, dtype=torch.bool, device=tokens.device)

    model.setup_caches(batch_size, next(model.parameters()).dtype, decoder_max_seq_len=length)
    try:
        prompt = {"mask": mask, "encoder_input": media, "input_pos": input_pos}
        logits = model(tokens, **prompt, output_positions=last)
        for end in range(prompt_length, length):
            new = _choose(logits, temperature, top_k)
            answers.append(new)
            ended |= torch.isin(new, stops)
            if end + 1 == length or bool(ended.all()):
                break
            position = position + 1
            next_pos = position[:, None, None].expand(-1, 1, 3)
            logits = model(new[:, None], mask=answer_mask, input_pos=next_pos).squeeze(1)
    finally:
        model.delete_caches()
    return [until_stop(ids, stop_tokens) for ids in torch.stack(answers, dim=1).tolist()]


def _choose(logits: torch.Tensor, temperature: float, top_k: int | None) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1).squeeze(-1)


def until_stop(ids: list[int], stop_tokens: Collection[int]) -> list[int]:
    """Return the ids of an answer up to and with its first stop token, all if there is none."""
    ends = [i + 1 for i, token in enumerate(ids) if token in stop_tokens]
    return ids[: ends[0]] if ends else ids
