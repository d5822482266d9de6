"""Tokenizers: load and check, hash, compare between teacher and student."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers

from pipeline.config.schema import ModelConfig
from pipeline.core.files import content_hash
from pipeline.core.progress import log
from pipeline.core.types import InputError, Manifest
from pipeline.models.paths import model_folder

TOKENIZER_FILES = ("token*", "vocab*", "merges*", "*.model")  # a folder with none of them has no tokenizer
MAX_SHOWN_IDS = 12  # in a message

PROBES = (  # texts on which normalizers and pre-tokenizers of different families disagree
    "12345 678,901.25",
    "1 22 333 4444",
    "cafe\u0301 A\u030a n\u0303",  # accents as combining characters: NFC composes them
    "\ufb01ne \u212b \uff21\uff11 \u00bd",  # characters that NFKC replaces
    "\u4e2d\u6587\u5b57\u7b26 \u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8 \ud55c\uad6d\uc5b4",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "don't I'LL we'Ve 'tis",
    "def f(x):\n\treturn x  # ok\n",
    "    if a_b != CamelCase:\n        pass\n",
    "a  b   c    d",
    "  leading and trailing  ",
    "tab\tand\t\ttabs",
    "one\ntwo\n\nthree\n\n\n  four\r\nfive",
    "https://a.b/c?d=e&f=%20g",
    "...!!! -- (a) [b] {c} \u201cd\u201d \u2014 e",
    "UPPER lower MiXed",
    "x=1;y+=2**3",
    "\u00a0no\u2009break\u200bspace",
    "\\frac{1}{2} $x^2$ <br/> &amp;",
)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model folder; InputError if it has none, or if its class changes its ids."""
    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        inner = folder / "model"  # of a run
        advice = f"give {inner}" if inner.is_dir() else "copy the tokenizer's files into the folder"
        raise InputError(f"{folder}: expected a tokenizer (tokenizer.json), found none; {advice}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{folder}: expected a tokenizer that transformers can load, found: {reason}; check its files"
        ) from error
    _check_class(tokenizer, folder)
    return tokenizer


def _check_class(tokenizer: Any, folder: Path) -> None:
    """InputError if the tokenizer's class does not give the ids of tokenizer.json.

    A class of transformers may replace the normalizer and pre-tokenizer of the file by its own. The generic class reads
    the same two files (so it has the same added tokens and options) and replaces nothing.
    """
    generic_class = transformers.PreTrainedTokenizerFast
    if type(tokenizer) is generic_class or not (folder / "tokenizer.json").exists():
        return
    generic = generic_class.from_pretrained(folder)
    probes = [*PROBES, *(f"a{token.content} b" for token in tokenizer.added_tokens_decoder.values())]
    options = folder / "tokenizer_config.json"
    if options.exists() and "add_prefix_space" in json.loads(options.read_text()):
        # an option that only the classes follow; it adds no space to a text that begins with one
        probes = [f" {probe}" for probe in probes]
    all_found, all_expected = (one(probes, add_special_tokens=False)["input_ids"] for one in (tokenizer, generic))
    for probe, found, expected in zip(probes, all_found, all_expected, strict=True):
        if found != expected:
            raise InputError(
                f"{folder}: expected the ids of tokenizer.json for {probe!r}, {_first(expected)}, found "
                f"{_first(found)} by {type(tokenizer).__name__}; set tokenizer_class in tokenizer_config.json to "
                "PreTrainedTokenizerFast, in a copy of the folder (or save the tokenizer of this class there, if the "
                "model was trained with it)"
            )


def _first(ids: list[int]) -> str:
    """The first ids of a text, for a message."""
    return f"{ids[:MAX_SHOWN_IDS]}{' and more' if len(ids) > MAX_SHOWN_IDS else ''}"


def open_tokenizer(config: ModelConfig) -> tuple[Path, Any]:
    """The local folder of the model that options describe, and its tokenizer, which callers share: read, never change.

    A study or a sweep opens the same one for each of its runs.
    """
    folder = model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code)
    files = [(path.name, path.stat()) for path in sorted(folder.glob("*")) if path.is_file()]
    stamp = tuple((name, status.st_size, status.st_mtime_ns) for name, status in files)
    return folder, _loaded(folder, stamp, config.trust_remote_code)


@lru_cache(maxsize=8)
def _loaded(folder: Path, stamp: tuple[tuple[str, int, int], ...], trust_remote_code: bool) -> Any:
    """The tokenizer of a folder as long as its files stay as they are."""
    return load_tokenizer(folder, trust_remote_code=trust_remote_code)


def vocabulary_size(tokenizer: Any) -> int:
    """The largest token id plus one; a model's head may have more rows, as padding.

    Not the number of tokens: ids may have gaps, and a row of the head behind a gap is as alive as any other.
    """
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of all that maps text to ids (model, merges, added tokens, normalizer), not of truncation or padding.

    InputError for a tokenizer without tokenizer.json.
    """
    return content_hash(_state(tokenizer))


def _state(tokenizer: Any) -> dict[str, Any]:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: expected one with a tokenizer.json, found {type(tokenizer).__name__}; convert it to a fast "
            "tokenizer"
        )
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return state


def tokenizer_parts(tokenizer: Any) -> dict[str, Any]:
    """What `tokenizer_hash` hashes, by parts: the added tokens as they are, a hash of every other part."""
    state = _state(tokenizer)
    added = {str(token.pop("id")): token for token in state.pop("added_tokens")}
    model = state.pop("model")
    parts = {"vocabulary": model.pop("vocab", None), "merges": model.pop("merges", None), "model": model, **state}
    return {"added_tokens": added, "hashes": {name: content_hash(part) for name, part in sorted(parts.items())}}


def chat_template_and_end_token(tokenizer: Any) -> dict[str, Any]:
    """What shapes the ids of a record besides the tokenizer's hash: part of a fingerprint.

    Teacher and student may differ in it: their ids still mean the same tokens.
    """
    return {"chat_template": tokenizer.chat_template, "end_token_id": tokenizer.eos_token_id}


def end_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a completion, ascending: the tokenizer's end token, those of generation_config.json, and the
    token with which the chat template ends a turn of the assistant."""
    ids = {tokenizer.eos_token_id, _turn_end(tokenizer)}
    path = folder / "generation_config.json"
    if path.exists():
        named = json.loads(path.read_text()).get("eos_token_id")
        ids |= set(named if isinstance(named, list) else [named])
    return tuple(sorted(token for token in ids if token is not None))


def _turn_end(tokenizer: Any) -> int | None:
    """The first of the special tokens that the chat template writes after an answer, or None."""
    if not tokenizer.chat_template:
        return None
    answer = "Answer"
    chat = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": answer}]
    try:
        before, _, end = str(tokenizer.apply_chat_template(chat, tokenize=False)).rpartition(answer)
        if not before:
            raise ValueError("it changes the answer")
    except Exception as error:  # a template is a program, which may raise anything
        log.warning("chat template: its end of turn is unknown, completions end at the other end tokens (%s)", error)
        return None
    after = tokenizer(end, add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in after if token in special), None)


def needs_begin_token(folder: Path) -> bool:
    """Whether each window of a long text should begin with the beginning token: Gemma fails without it."""
    path = folder / "config.json"
    return path.exists() and str(json.loads(path.read_text()).get("model_type", "")).startswith("gemma")


def split_option(tokenizer: Any) -> dict[str, bool]:
    """{"split_special_tokens": True} where special tokens in a text are split: the hash does not contain it."""
    return {"split_special_tokens": True} if getattr(tokenizer, "split_special_tokens", False) else {}


def check_same_tokenizer(teacher: Manifest, tokenizer: Any, *, cache: str, student: str) -> None:
    """InputError if the same id means different tokens for the teacher of a cache and the student.

    The student may have further tokens behind the teacher's vocabulary, such as one for padding: the teacher's text and
    distributions contain none of them.
    """
    expected, found = teacher.made_of["tokenizer"], tokenizer_hash(tokenizer)
    if expected == found:
        return
    parts = tokenizer_parts(tokenizer)
    difference = _difference(teacher, parts)
    if difference is not None:
        raise InputError(
            f"tokenizer: expected {student} to have the teacher's tokenizer {expected[:12]} ({cache}), "
            f"found {found[:12]}: {difference}; use a student of the teacher's family, or capture with another teacher"
        )
    assert teacher.tokenizer is not None
    more = [
        token["content"] for id, token in parts["added_tokens"].items() if id not in teacher.tokenizer["added_tokens"]
    ]
    log.info("tokenizer: %s has tokens that the teacher has not, and no captured text contains: %s", student, more)


def check_tokenizers(teacher: Any, student: Any, *, names: tuple[str, str]) -> None:
    """InputError if an id means different tokens for two models; `names` are the teacher's and the student's.

    The rule of `check_same_tokenizer`, before anything is captured.
    """
    if tokenizer_hash(teacher) == tokenizer_hash(student):
        return
    parts = tokenizer_parts(teacher), tokenizer_parts(student)
    difference = _parts_difference(*parts, teacher_size=vocabulary_size(teacher))
    if difference is not None:
        raise InputError(
            f"tokenizer: expected teacher {names[0]} and student {names[1]} to have the same, found {difference}; use "
            "two models of one family"
        )


def _difference(teacher: Manifest, student: dict[str, Any]) -> str | None:
    if teacher.tokenizer is None:
        return "captured before the parts of a tokenizer were recorded, so only equal ones are accepted"
    return _parts_difference(teacher.tokenizer, student, teacher_size=teacher.vocabulary_size)


def _parts_difference(teacher: dict[str, Any], student: dict[str, Any], *, teacher_size: int) -> str | None:
    """The first difference between the tokenizers that makes an id ambiguous, as text; None if there is none."""
    hashes = teacher["hashes"]
    for name in sorted(hashes.keys() | student["hashes"].keys()):
        if hashes.get(name) != student["hashes"].get(name):
            return f"another {name.replace('_', '-')}"
    teacher_added, student_added = teacher["added_tokens"], student["added_tokens"]
    for id in sorted(teacher_added.keys() | student_added.keys(), key=int):
        one, other = teacher_added.get(id), student_added.get(id)
        if one != other and (one is not None or int(id) < teacher_size):
            return f"token {id} is {_shown(one)} of the teacher and {_shown(other)} of the student"
    return None


def _shown(token: dict[str, Any] | None) -> str:
    """An added token with those of its options that are on, for a message."""
    if token is None:
        return "no added token"
    return " ".join([repr(token["content"]), *(name for name, value in token.items() if value is True)])
