"""Small tokenizers of the kinds that no small package contains, trained on a few lines, in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from support.chat_templates import MISTRAL_V1, PHI3
from support.real_tokenizers import begin_with, llama_decoder, write_folder
from support.tiny import LINES

PHI3_TOKENS = tuple(
    AddedToken(f"<|{name}|>", rstrip=True, normalized=False, special=True)
    for name in ("user", "assistant", "system", "end")
)


def metaspace_tokenizer(
    folder: Path,
    *,
    space: Literal["first", "always", "never", "normalizer"] = "first",
    ends: bool = False,
    id_gap: int = 0,
    added: Sequence[AddedToken] = (),
    chat_template: str = MISTRAL_V1,
) -> Path:
    """Write a tokenizer like Llama 2's: BPE with byte fallback, a space as "▁", `<s>` before each text.

    `space` is where a space is prepended: Metaspace's scheme, or by a normalizer as in older files. `ends` adds `</s>`
    behind each text. `id_gap` leaves this many ids unused before the learned tokens. `added` are further tokens, last.
    """
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learned.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate(fixed)}
    vocabulary |= {token: i + len(fixed) + id_gap for token, i in model["vocab"].items()}
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if space == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    tokenizer.decoder = llama_decoder()
    tokenizer.post_processor = begin_and_end() if ends else begin_with("<s>", 1)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in fixed[:3]])
    tokenizer.add_tokens(list(added))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_folder(folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", **special, chat_template=chat_template)
    return folder


def begin_and_end() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s>:1 $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


def phi3_tokenizer(folder: Path) -> Path:
    """Llama's kind with the markers of Phi-3, which swallow the white space behind them."""
    return metaspace_tokenizer(folder, space="normalizer", added=PHI3_TOKENS, chat_template=PHI3)


def unigram_tokenizer(folder: Path) -> Path:
    """Write a tokenizer like T5's: Unigram, NFKC, runs of spaces joined, `</s>` behind each text and no begin token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_folder(folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", **named)
    return folder
