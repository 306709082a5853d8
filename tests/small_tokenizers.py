"""Small tokenizers built in code: byte-level BPE, and one that puts a space before each text."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML_MARKS = ("<|im_start|>", "<|im_end|>")
_CORPUS = ["the quick brown fox jumps over the lazy dog and asks the assistant what it can do for the user\n"] * 20 + [
    "\n\n",
    "   ",
    "12345",
] * 20


def byte_tokenizer(*, adds_bos: bool = False, marks: tuple[str, ...] = CHATML_MARKS, eos: str = "</s>", template: str | None = None) -> Any:
    """Byte-level BPE, which holds any text without loss. BOS is ``<s>``, and pad is EOS, as with many published models."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = list(dict.fromkeys(["<s>", eos, *marks]))
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=eos, clean_up_tokenization_spaces=False
    )
    fast.chat_template = template
    return fast


def space_tokenizer(template: str | None = None) -> Any:
    """As old SentencePiece models: a space is put before each text, so texts cannot be tokenized in pieces."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(
        ["▁".join(text.split(" ")) for text in _CORPUS],
        trainers.BpeTrainer(
            vocab_size=200, special_tokens=["<unk>", "<s>", "</s>", *CHATML_MARKS], show_progress=False, max_token_length=6
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = template
    return fast
