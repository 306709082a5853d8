"""Let a model write: greedy answers to prompts, many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, stop_ids: Sequence[int]
) -> list[str]:
    """Greedy answers, decoded without special tokens. Prompts are padded on the left; similar lengths go together."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
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
                ids[row, longest - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
                mask[row, longest - len(prompts[i]) :] = 1
            out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
            for row, i in enumerate(chosen):
                texts[i] = tokenizer.decode(out[row, longest:], skip_special_tokens=True).strip()
    return [texts[i] for i in range(len(prompts))]


def is_match(answer: str, reference: str) -> bool:
    """Exact match: equal once surrounding blanks are removed."""
    return answer.strip() == reference.strip()
