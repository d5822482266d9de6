"""Texts -> token ids: one beginning token a record, and completions that continue their prompt.

Some tokenizers put a space mark before every text that they are given (SentencePiece, Metaspace): a completion that is
tokenized alone then decodes with a space that the record does not have. Here a completion's tokens must decode, after
those of the prompt, to the completion itself; otherwise the record is refused.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.core.types import InputError

KNOWN_PREFIXES = ("\n", ":", "a")  # texts after which a continuation is tokenized, to be cut off again
CONTEXT_TOKENS = 16  # of a prompt, decoded before a continuation: what stands further left changes nothing
SHOWN_CHARACTERS = 60  # of a text in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """A tokenizer, and what it does around a text."""

    tokenizer: Any
    begin_ids: tuple[int, ...]
    """The special tokens that it puts before a text: for most the beginning token, for many nothing."""
    end_ids: tuple[int, ...]
    """The special tokens that it puts after a text. They are left out: `end_token` alone decides about the end."""
    is_byte_level: bool
    """Each byte becomes a token or a part of one: then text in parts decodes to itself, and need not be compared."""
    missing_bytes: re.Pattern[bytes]
    """The bytes for which a byte-level vocabulary has no token: some have none for rare control characters."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text alone, without special tokens around it."""
        if not texts:
            return []
        called = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )
        return list(called["input_ids"])

    def ids_of(self, text: str) -> list[int]:
        """The tokens of one text alone; quicker than `ids`, whose call takes longer than most texts."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return self.ids([text])[0] if backend is None else list(backend.encode(text, add_special_tokens=False).ids)

    def is_lossless(self, text: str) -> bool:
        """Whether a text is known to decode to itself, in whatever parts it is tokenized."""
        return self.is_byte_level and not self.missing_bytes.search(text.encode())

    def text(self, ids: Sequence[int]) -> str:
        """What token ids decode to, special tokens included."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return str(backend.decode(list(ids), skip_special_tokens=False))
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


@lru_cache(maxsize=8)
def open_encoder(tokenizer: Any) -> Encoder:
    """The encoder of a tokenizer; InputError if special tokens change how it reads the text between them."""
    alone, special = (tokenizer(["a"], add_special_tokens=special)["input_ids"][0] for special in (False, True))
    starts = [i for i in range(len(special) - len(alone) + 1) if list(special[i : i + len(alone)]) == list(alone)]
    if not starts:
        raise InputError(
            f"tokenizer: expected special tokens around a text only, found 'a' as {alone} without them and {special} "
            "with them; use another tokenizer"
        )
    is_byte_level = _is_byte_level(tokenizer)
    return Encoder(
        tokenizer=tokenizer,
        begin_ids=tuple(special[: starts[0]]),
        end_ids=tuple(special[starts[0] + len(alone) :]),
        is_byte_level=is_byte_level,
        missing_bytes=_missing_bytes(tokenizer) if is_byte_level else re.compile(b""),
    )


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer maps bytes to tokens one to one, whatever text it is given; at most NFC comes before that."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    normalizers, pre_tokenizers, decoders = (
        list(_parts(backend, name)) for name in ("normalizer", "pre_tokenizer", "decoder")
    )
    byte_level = [part for part in pre_tokenizers if part["type"] == "ByteLevel"]
    return (
        all(part["type"] == "NFC" for part in normalizers)
        and len(byte_level) == 1
        and not byte_level[0]["add_prefix_space"]
        and all(part["type"] in ("ByteLevel", "Split", "Digits") for part in pre_tokenizers)
        and not any(part.get("behavior") == "Removed" for part in pre_tokenizers)
        and [part["type"] for part in decoders] == ["ByteLevel"]
        # a token that takes the spaces beside it loses them
        and not any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values())
    )


def _parts(backend: Any, name: str) -> Iterator[dict[str, Any]]:
    """The parts of a tokenizer's normalizer, pre-tokenizer or decoder, as in tokenizer.json."""
    component = getattr(backend, name)
    if component is None:
        return
    state = json.loads(component.__getstate__())
    yield from state[name.replace("_", "") + "s"] if state["type"] == "Sequence" else [state]


def _missing_bytes(tokenizer: Any) -> re.Pattern[bytes]:
    """The bytes without a symbol in a byte-level vocabulary, which writes them as Radford et al. 2019 do.

    Printable bytes are written as the character of that code, the others as the characters from 256 on.
    """
    vocabulary, others = tokenizer.get_vocab(), itertools.count(256)
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    symbols = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    missing = bytes(byte for byte, symbol in enumerate(symbols) if symbol not in vocabulary)
    return re.compile(b"[" + re.escape(missing) + b"]" if missing else rb"(?!)")


# ------------------------------------------------------------------------------------- continuations


def join_parts(
    encoder: Encoder, parts: Sequence[str], alone: Sequence[list[int]], must_match: Sequence[bool]
) -> list[list[int]]:
    """The ids of the parts of a text, each continuing those before it; `alone` are the ids of each part alone.

    InputError where a part of `must_match` does not decode to itself. Others are what a chat template wrote: some
    tokenizers put spaces around its special tokens, or take them away, and their models were trained so.
    """
    if all(map(encoder.is_lossless, parts)):
        return list(alone)
    part_ids: list[list[int]] = []
    for number, (text, ids) in enumerate(zip(parts, alone, strict=True)):
        before = [token for earlier in part_ids for token in earlier]
        try:
            ids = continuation(encoder, before, "".join(parts[:number]), text, ids)
        except InputError:
            if must_match[number]:
                raise
        part_ids.append(ids)
    return part_ids


def continuation(encoder: Encoder, before: Sequence[int], text_before: str, text: str, alone: list[int]) -> list[int]:
    """The ids of a text that decode to it after the ids `before`; those of the text alone (`alone`) if they do."""
    if encoder.is_lossless(text) and encoder.is_lossless(text_before):
        return alone
    if not text_before:
        # a space at the very beginning is the tokenizer's own to lose: SentencePiece puts one there itself
        if is_same_text(encoder.text(alone).lstrip(" "), text.lstrip(" ")):
            return alone
        raise InputError(
            f"expected a text that the tokenizer can write, found {_shown(text)}, which it decodes to "
            f"{_shown(encoder.text(alone))}"
        )
    context = list(before[-CONTEXT_TOKENS:])
    context_text = encoder.text(context)
    for ids in _candidates(encoder, before, text_before, text, alone):
        found = encoder.text([*context, *ids])
        if found.startswith(context_text) and is_same_text(found[len(context_text) :], text):
            return ids
    raise InputError(
        f"expected a text that continues its prompt, found {_shown(context_text + text)}, which the tokenizer writes "
        f"as {_shown(encoder.text([*context, *alone]))}"
    )


def _candidates(
    encoder: Encoder, before: Sequence[int], text_before: str, text: str, alone: list[int]
) -> Iterator[list[int]]:
    yield alone
    for prefix in KNOWN_PREFIXES:
        prefix_ids, ids = encoder.ids_of(prefix), encoder.ids_of(prefix + text)
        if ids[: len(prefix_ids)] == prefix_ids:
            yield ids[len(prefix_ids) :]
    ids = encoder.ids_of(text_before + text)
    if ids[: len(before)] == list(before):
        yield ids[len(before) :]


def is_same_text(found: str, text: str) -> bool:
    """Whether two texts are equal, up to the Unicode normalisation that many tokenizers begin with."""
    return found == text or any(
        unicodedata.normalize(form, found) == unicodedata.normalize(form, text) for form in ("NFC", "NFKC")
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else "..." + text[-SHOWN_CHARACTERS:])
