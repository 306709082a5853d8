"""Let a model write: greedy answers to prompts, many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, stop_ids: Sequence[int]
) -> list[str]:
    """Greedy answers, decoded without special tokens; similar lengths go together. Prompts are padded where the model writes nothing:
    on the left, or on the right for an encoder, whose virtual tokens and positions stand in front."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    pad, encodes = tokenizer.pad_token_id, bool(model.config.is_encoder_decoder)
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=list(stop_ids) or None)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    texts: dict[int, str] = {}
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in chosen)
            ids = torch.full((len(chosen), longest), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                place = slice(0, len(prompts[i])) if encodes else slice(longest - len(prompts[i]), longest)
                ids[row, place] = torch.tensor(list(prompts[i]))
                mask[row, place] = 1
            out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
            for row, i in enumerate(chosen):
                texts[i] = tokenizer.decode(out[row, 1 if encodes else longest :], skip_special_tokens=True).strip()
    return [texts[i] for i in range(len(prompts))]
