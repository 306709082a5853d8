"""``peftcli chat``: talk to a tuned model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from peftcli.data.templates import stop_ids
from peftcli.methods.kinds import mixes_precision
from peftcli.result import Result, open_result


def run(
    path: Path,
    *,
    prompt: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    base_model: str | None,
    trust_remote_code: bool,
) -> None:
    """Answer one prompt, or go on until the input ends. The conversation's earlier turns are part of each prompt."""
    result = open_result(path, base_model=base_model, trust_remote_code=trust_remote_code)
    history = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        answer(result, [*history, {"role": "user", "content": prompt}], max_new_tokens, temperature)
        return
    console = Console(stderr=True)
    console.print("Type a message; /clear forgets the conversation, /exit or Ctrl-D ends.", style="dim")
    while True:
        try:
            text = console.input("[bold]you>[/] ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if text.strip() == "/exit":
            return
        if text.strip() == "/clear":
            history = history[:1] if system else []
            continue
        if text.strip():
            history.append({"role": "user", "content": text})
            history.append({"role": "assistant", "content": answer(result, history, max_new_tokens, temperature)})


def answer(result: Result, messages: list[dict[str, str]], max_new_tokens: int, temperature: float) -> str:
    """Write the model's answer to standard output as it comes, and return it."""
    from transformers import GenerationConfig, TextStreamer

    tokenizer: Any = result.base.tokenizer
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    else:
        ids = tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]
    ids = ids.to(next(result.model.parameters()).device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=stop_ids(tokenizer), **sampling
    )
    with torch.no_grad(), torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=mixes_precision(result.model)):
        out = result.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()
