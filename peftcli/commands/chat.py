"""``peftcli chat``: talk to tuned models, switching between adapters of one base."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from peftcli.adapters import Adapters, names_of, open_adapters
from peftcli.data.templates import stop_ids
from peftcli.errors import UsageError
from peftcli.methods.kinds import mixes_precision
from peftcli.result import QUANTIZATIONS, locate, open_result

HELP = """/adapters    list the adapters; * marks the one that answers
/use NAME    let this adapter answer; the conversation goes on
/base        let the base answer without an adapter
/reset       forget the conversation
/exit        end (as does Ctrl-D)"""


def run(
    paths: Sequence[Path],
    named: Sequence[str],
    *,
    prompt: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    base_model: str | None,
    quantization: str | None,
    trust_remote_code: bool,
) -> None:
    """Answer one prompt, or go on until the input ends. The conversation's earlier turns are part of each prompt."""
    adapters = _open(_paths(paths, named), base_model, quantization, trust_remote_code)
    talk = Conversation(adapters, system, max_new_tokens, temperature)
    if prompt is None:
        _listen(talk)
        return
    everyone: list[str | None] = [*adapters.names]
    for name in everyone or [None]:
        adapters.use(name)
        if len(adapters.names) > 1:
            sys.stdout.write(f"{name}> ")
            sys.stdout.flush()
        talk.forget()
        talk.say(prompt)


def _paths(paths: Sequence[Path], named: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for one in named:
        name, equals, path = one.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"--adapter: {one!r} is not NAME=PATH", hint="--adapter poet=runs/poet")
        if name in found:
            raise UsageError(f"--adapter: two are called {name!r}")
        found[name] = Path(path)
    plain = names_of(paths)
    both = sorted(set(plain) & set(found))
    if both:
        raise UsageError(f"--adapter: {both[0]!r} is also the name of {plain[both[0]]}", hint="choose another name.")
    if not plain and not found:
        raise UsageError("there is nothing to talk to", hint="name a run's folder or an adapter's: peftcli chat runs/my-run")
    return plain | found


def _open(paths: dict[str, Path], base_model: str | None, quantization: str | None, trust_remote_code: bool) -> Adapters:
    """The adapters, the first of them active. A whole model by itself needs no base, and is one."""
    if quantization is not None and quantization not in (*QUANTIZATIONS, "none"):
        raise UsageError(f"--quantization: {quantization!r} is not one of {', '.join((*QUANTIZATIONS, 'none'))}")
    if len(paths) == 1 and locate(path := next(iter(paths.values())), base_model).adapter is None:
        return Adapters(open_result(path, base_model=base_model, quantization=quantization, trust_remote_code=trust_remote_code).base)
    adapters, _ = open_adapters(paths, base_model=base_model, quantization=quantization, trust_remote_code=trust_remote_code)
    adapters.use(adapters.names[0])
    return adapters


class Conversation:
    """Turns so far, and who answers the next one."""

    def __init__(self, adapters: Adapters, system: str | None, max_new_tokens: int, temperature: float) -> None:
        self.adapters, self.max_new_tokens, self.temperature = adapters, max_new_tokens, temperature
        self._start = [{"role": "system", "content": system}] if system else []
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._turns = list(self._start)

    def say(self, text: str) -> None:
        """Let the active adapter answer on standard output."""
        self._turns.append({"role": "user", "content": text})
        reply = answer(self.adapters.model, self.adapters.tokenizer, self._turns, self.max_new_tokens, self.temperature)
        self._turns.append({"role": "assistant", "content": reply})

    def command(self, text: str) -> str:
        """Do what a line with a slash says; returns what to tell.

        Raises:
            UsageError: there is no such command or adapter.
        """
        word, _, rest = text.partition(" ")
        name = rest.strip()
        if word == "/use" and name:
            self.adapters.use(name)
            return f"{name} answers"
        if word == "/use":
            raise UsageError("/use wants the name of an adapter", hint="/adapters lists them.")
        if word == "/base":
            self.adapters.use(None)
            return "the base answers"
        if word == "/adapters":
            marks = {True: "*", False: " "}
            return "\n".join(f"{marks[n == self.adapters.active]} {n}" for n in self.adapters.names) or "there is only the base"
        if word in ("/reset", "/clear"):
            self.forget()
            return "the conversation is forgotten"
        if word == "/help":
            return HELP
        raise UsageError(f"there is no command {word}", hint="/help lists them.")


def _listen(talk: Conversation) -> None:
    """Read lines until the input ends; what is no answer goes to standard error."""
    console = Console(stderr=True)
    names = talk.adapters.names
    several = f" Adapters: {', '.join(names)}; {names[0]} answers." if len(names) > 1 else ""
    console.print(f"Type a message; /help lists the commands, /exit or Ctrl-D ends.{several}", style="dim", markup=False, highlight=False)
    while True:
        who = talk.adapters.active or "base"
        try:
            text = (
                console.input(f"[bold]you to {who}>[/] " if len(names) > 1 else "[bold]you>[/] ") if sys.stdin.isatty() else input()
            ).strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text.startswith("/"):
            try:
                console.print(talk.command(text), markup=False, highlight=False)
            except UsageError as error:  # a typing error ends no conversation
                console.print(error.message + (f" ({error.hint})" if error.hint else ""), markup=False, highlight=False, style="red")
        elif text:
            talk.say(text)


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], max_new_tokens: int, temperature: float) -> str:
    """Write the model's answer to standard output as it comes, and return it."""
    from transformers import GenerationConfig, TextStreamer

    reads = bool(model.config.is_encoder_decoder)
    if reads:  # it has learned one answer to one text
        asked = [*(m["content"] for m in messages[:1] if m["role"] == "system"), messages[-1]["content"]]
        ids = tokenizer("\n\n".join(asked), return_tensors="pt")["input_ids"]
    elif tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    else:
        ids = tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]
    ids = ids.to(next(model.parameters()).device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=stop_ids(tokenizer), **sampling
    )
    with torch.no_grad(), torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=mixes_precision(model)):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return str(tokenizer.decode(out[0, 1 if reads else ids.shape[1] :], skip_special_tokens=True)).strip()
