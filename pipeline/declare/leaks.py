"""Records that two texts of a study share: a test record that a model has trained on measures memory, not skill."""

from __future__ import annotations

import hashlib
import itertools
import json
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from pipeline.config.schema import TextConfig
from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.data.messages import check_unicode, text_content
from pipeline.data.records import MalformedRecords, fields_of, find_shape
from pipeline.data.shapes import Fields
from pipeline.data.text_files import Raw, Text, all_records, open_text

TRAINING = ("teacher_labels", "corpus", "gold", "ceiling")  # every other text is held out
STREAMED = ("corpus", "ceiling")  # may be large: compared record by record with the others, not kept, nor with another
MAX_EXAMPLES = 3  # of a pair of texts, in a message

Places = dict[bytes, dict[bytes, str]]
"""Key of a prompt -> the hash of each of its exact spellings -> where that stands first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The prompts that two texts have in common."""

    names: tuple[str, str]
    """The text that trains first."""
    num_same: int
    """Different prompts that stand in both, character by character."""
    num_similar: int
    """Further ones that differ only in case, white space or Unicode form."""
    examples: tuple[str, ...]
    """Places in both texts."""
    is_refused: bool
    """Whether a study with such records is refused unless it allows them."""

    def sentence(self) -> str:
        """One sentence with the counts and the examples."""
        first, second = self.names
        found = f"{self.num_same:,} prompts of {second} are also in {first}"
        if self.num_similar:
            found += f" ({self.num_similar:,} more differ only in case, spaces or Unicode form)"
        return found + (f": {'; '.join(self.examples)}" if self.examples else "")


def check_texts(texts: Mapping[str, Text | TextConfig], *, allowed: bool) -> list[Shared]:
    """Count the prompts that each two texts of a study share; InputError where they must not, unless `allowed`.

    `texts` are named as in a study's file; further tests by their own names. Refused are held-out prompts in any other
    text, and gold prompts in the corpus. Not refused: the ceiling's, which are the corpus's with labels, and those of
    teacher_labels in other training texts, which are counted. Prompts that differ only in case, white space or Unicode
    form are a warning. Chats are compared by their messages before the answer, plain texts as a whole.
    Why it matters: Lee et al. 2022, Deduplicating Training Data Makes Language Models Better.
    """
    opened = {name: text if isinstance(text, Text) else open_text(text, name) for name, text in texts.items()}
    found = find_shared({name: find_shape(text) for name, text in opened.items()})
    refused = [shared for shared in found if shared.is_refused and shared.num_same and not allowed]
    for shared in found:
        if shared not in refused:
            log.log(30 if shared.is_refused else 20, "texts: %s", shared.sentence())
    if refused:
        lines = "".join(f"\n  {shared.sentence()}" for shared in refused)
        raise InputError(
            f"texts: expected no record in two of them, found:{lines}\nremove them from one of the two (so that "
            "test keeps its records, from the other one), or set allow_shared_records: true in the study's file"
        )
    return found


def find_shared(texts: Mapping[str, Text]) -> list[Shared]:
    """The pairs of texts with common prompts; each large text is read once, and once more only if it has some."""
    seen = {
        name: {prompt_key(asked.prompt) for asked in _prompts(text)}
        for name, text in texts.items()
        if name not in STREAMED
    }
    common: dict[tuple[str, str], set[bytes]] = {
        (first, second): seen[first] & seen[second] for first, second in itertools.combinations(seen, 2)
    }
    for name in STREAMED:
        if name in texts:
            common |= {(name, other): set() for other in seen}
            _compare(texts[name], seen, {other: common[name, other] for other in seen})
    return [_shared(pair, keys, texts) for pair, keys in common.items() if keys]


def _compare(text: Text, seen: Mapping[str, Collection[bytes]], common: Mapping[str, set[bytes]]) -> None:
    """Add the keys of a text's prompts to those that it shares with each text that was read; warn of known answers."""
    num_records = num_labeled = 0
    for asked in _prompts(text):
        key = prompt_key(asked.prompt)
        num_records, num_labeled = num_records + 1, num_labeled + asked.has_answer
        for name, keys in seen.items():
            if key in keys:
                common[name].add(key)
    if num_labeled and text.what == "corpus":
        log.warning(
            "corpus: %s of %s records hold an answer, which the cache keeps as a known target; leave it out if the "
            "corpus is to be unlabeled",
            *(f"{num_labeled:,}", f"{num_records:,}"),
        )


def _shared(pair: tuple[str, str], keys: Collection[bytes], texts: Mapping[str, Text]) -> Shared:
    """Which of the common keys are the same prompt in both texts, and where the first of them stand."""
    first, second = sorted(pair, key=lambda name: name not in TRAINING)  # stable
    held_out = [name for name in (first, second) if name not in TRAINING]
    one, other = (_places(texts[name], keys) for name in (first, second))
    same = {key: one[key].keys() & other[key].keys() for key in keys}
    exact = sorted(key for key in keys if same[key])
    examples = []
    for key in (exact or sorted(keys))[:MAX_EXAMPLES]:
        spelling = min(same[key], default=None)
        places = [next(iter(p.values())) if spelling is None else p[spelling] for p in (other[key], one[key])]
        examples.append(" and ".join(places))
    return Shared(
        names=(first, second),
        num_same=len(exact),
        num_similar=len(keys) - len(exact),
        examples=tuple(examples),
        is_refused=bool(held_out) or {first, second} == {"corpus", "gold"},
    )


def _places(text: Text, keys: Collection[bytes]) -> Places:
    """Where the prompts with these keys stand in a text, by their exact spelling."""
    places: Places = {}
    for asked in _prompts(text):
        if (key := prompt_key(asked.prompt)) in keys:
            places.setdefault(key, {}).setdefault(_digest(asked.prompt), asked.where)
    return places


# ------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one record asks."""

    where: str
    prompt: str
    has_answer: bool


def _prompts(text: Text) -> Iterator[_Asked]:
    """What each record asks; one that cannot be read stops or is skipped, as the text says."""
    malformed = MalformedRecords(skip=text.skip_malformed)
    for raw in all_records(text.files, text.read_columns, take=text.take):
        try:
            yield _quick(raw, text) or _asked(raw[0], fields_of(raw, text), text)
        except InputError as error:
            malformed.reject(raw[0], str(error))


def _asked(where: str, fields: Fields, text: Text) -> _Asked:
    return _Asked(where, prompt_of(fields, text), has_answer(fields, text))


def _quick(raw: Raw, text: Text) -> _Asked | None:
    """The same for the commonest record, a JSON object with a prompt, several times as fast; None for any other.

    Whatever else such a record holds is checked when it is tokenized.
    """
    where, kind, content = raw
    if kind != "json" or text.shape != "own":
        return None
    try:
        row = json.loads(content.decode())
    except (ValueError, RecursionError):
        return None  # the usual way says what is wrong
    columns = text.columns
    if not isinstance(row, dict) or row.get(columns["text"]) is not None or row.get(columns["messages"]) is not None:
        return None
    prompt = row.get(columns["prompt"])
    if not isinstance(prompt, str) or not prompt:
        return None
    is_chosen = row.get(columns["answer"]) is not None and bool(row.get(columns["choices"]) or text.choices)
    return _Asked(
        where, check_unicode(prompt, columns["prompt"]), is_chosen or row.get(columns["completion"]) is not None
    )


def prompt_of(fields: Fields, text: Text) -> str:
    """What a record asks: its prompt; of a chat the contents before the answer, without system messages; its text."""
    if fields.messages is None:
        return fields.text or fields.prompt or ""
    asked = fields.messages[:-1] if _role(fields.messages[-1], text) == "assistant" else fields.messages
    contents = (text_content(m.get(text.chat.content, "")) for m in asked if _role(m, text) != "system")
    return "\n".join(contents)


def has_answer(fields: Fields, text: Text) -> bool:
    """Whether a record with a prompt holds its answer."""
    if fields.messages:
        return fields.answer is not None or _role(fields.messages[-1], text) == "assistant"
    return fields.prompt is not None and (fields.completion is not None or fields.answer is not None)


def _role(message: object, text: Text) -> str:
    return str(message.get(text.chat.role, "")) if isinstance(message, dict) else ""


def prompt_key(prompt: str) -> bytes:
    """16 bytes that prompts share which differ only in case, white space or Unicode form (NFC)."""
    plain = prompt if prompt.isascii() else unicodedata.normalize("NFC", prompt)
    return _digest(" ".join(plain.casefold().split()))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
