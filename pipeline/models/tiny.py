"""A small model with random weights and a tokenizer of bytes, made here: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.core.files import write_json

SPECIAL = ("<bos>", "<eos>")
PADDING_ROWS = 14  # rows of the head behind the tokenizer's vocabulary, as most real models have


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What the parameters of a Llama follow from."""

    hidden: int
    layers: int
    heads: int
    positions: int
    """The longest window."""


def save_tiny_model(folder: Path, size: Size, *, seed: int) -> Path:
    """Write a Llama with random weights, its input and output embeddings tied, and its tokenizer, as float32."""
    vocabulary = save_byte_tokenizer(folder)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary + PADDING_ROWS,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(size.heads // 2, 1),
        max_position_embeddings=size.positions,
        initializer_range=1.5 * size.hidden**-0.5,  # large, so that the distributions differ from position to position
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> int:
    """Write a tokenizer whose tokens are the 256 bytes and two special tokens; returns their number."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *byte_characters()])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token} | flags for index, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": by_bytes,
        "post_processor": None,
        "decoder": by_bytes,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    write_json(folder / "tokenizer.json", tokenizer)
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    write_json(folder / "tokenizer_config.json", options)
    return len(vocabulary)


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2): itself where it can be printed."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]
