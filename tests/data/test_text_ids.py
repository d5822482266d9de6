"""Every kind of tokenizer: what is supervised decodes to what the record says, with one beginning and the right end."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.config.schema import ChatConfig, Supervise, Targets
from pipeline.core.types import InputError, Record
from pipeline.data.encode import EncodedRecord, encode_records
from pipeline.data.records import MalformedRecords, parse_records
from pipeline.data.text_ids import open_encoder
from pipeline.data.tokenize import segments
from pipeline.evaluation.requests import open_evaluation_set
from pipeline.models.tokenizer import end_token_ids, load_tokenizer
from support.real_tokenizers import TOKENIZERS, real_tokenizer
from support.tiny import text_of, write_lines
from support.trained_tokenizers import metaspace_tokenizer, phi3_tokenizer, unigram_tokenizer

MAKERS: dict[str, Callable[[Path], Path]] = {
    **{name: partial(real_tokenizer, name) for name in TOKENIZERS},
    "metaspace": metaspace_tokenizer,
    "metaspace always": partial(metaspace_tokenizer, space="always"),
    "metaspace never": partial(metaspace_tokenizer, space="never"),
    "metaspace by normalizer": partial(metaspace_tokenizer, space="normalizer"),
    "metaspace that ends": partial(metaspace_tokenizer, ends=True),
    "phi3": phi3_tokenizer,
    "unigram": unigram_tokenizer,
}
# the real ones are downloaded, 165 MB
EACH = [pytest.param(name, marks=pytest.mark.slow if name in TOKENIZERS else ()) for name in MAKERS]
WITH_CHAT = [parameter for parameter in EACH if parameter.values != ("unigram",)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lru_cache(lambda name: MAKERS[name](tmp_path_factory.mktemp("tokenizer") / "folder"))


@pytest.fixture(scope="module")
def load(folders: Callable[[str], Path]) -> Callable[[str], Any]:
    return lru_cache(lambda name: load_tokenizer(folders(name)))


def record(prompt: str | None, completion: str | None, choices: tuple[str, ...] = ()) -> Record:
    return Record(
        record_id=0, prompt=prompt, completion=completion, choices=choices, answer=None, templated=False, where="here"
    )


def encoded(tokenizer: Any, *args: Any, end_token: bool = True) -> EncodedRecord:
    malformed = MalformedRecords(skip=False)
    (one,) = encode_records([record(*args)], tokenizer, malformed, end_token=end_token, with_choices=True)
    return one


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))


def check_ends(tokenizer: Any, ids: list[int]) -> list[int]:
    """One beginning (where the tokenizer has one) and one end; returns what lies between."""
    begin = list(open_encoder(tokenizer).begin_ids)
    assert ids[: len(begin)] == begin
    assert ids[-1] == tokenizer.eos_token_id
    return ids[len(begin) : -1]


# ---------------------------------------------------------------------------- prompt and completion


PAIRS = [  # (prompt, completion): seams where tokenizers put or take spaces
    ("A:\n", "Paris"),
    ("A:", " Paris"),
    ("A:", "Paris"),
    ("Q:  two ", " spaces"),
    ("tab\t", "\ttab"),
    ("one\n\n", "\n\ntwo\n"),
    ("Grüße, ", "Москва 東京"),
    ("شكرا", " جزيلا"),
    ("👩", "\u200d👩\u200d👧"),
    ("1", "23"),
    ("don", "'t"),
    ("def f(x):\n    ", "return x"),
]


@pytest.mark.parametrize("name", WITH_CHAT)
def test_a_completion_continues_its_prompt(name: str, load: Callable[[str], Any]) -> None:
    tokenizer = load(name)
    for prompt, completion in PAIRS:
        one = encoded(tokenizer, prompt, completion)
        ids = check_ends(tokenizer, [*one.prompt_ids, *one.completion_ids])
        assert decoded(tokenizer, ids) == prompt + completion
        assert decoded(tokenizer, one.prompt_ids[len(open_encoder(tokenizer).begin_ids) :]) == prompt


SPELLED = ["</s>", "<s>", "<|im_end|>", "<|endoftext|>", "[INST]", "<think>", "<|user|>", "<0x0A>", "▁", "<unk>"]
ALPHABET = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [" ", "  ", "\n", "\n\n", "\t", "A:", "é", "e\u0301", "ﬁ", "한국어", "ไทย", "🇳🇴", "\u200b", *SPELLED]
    ),
)
TEXTS = st.lists(ALPHABET, min_size=1, max_size=5).map("".join).filter(bool)


def same(found: str, text: str) -> bool:
    return found == text or any(
        unicodedata.normalize(form, found) == unicodedata.normalize(form, text) for form in ("NFC", "NFKC")
    )


@pytest.mark.parametrize("name", EACH)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXTS, completion=TEXTS)
@example(prompt="A:\n", completion="Paris")
@example(prompt="a <|user|>", completion="  b")
def test_any_text_decodes_to_itself_or_is_refused(
    name: str, prompt: str, completion: str, load: Callable[[str], Any]
) -> None:
    tokenizer = load(name)
    encoder = open_encoder(tokenizer)
    malformed = MalformedRecords(skip=True)
    found = list(encode_records([record(prompt, completion)], tokenizer, malformed, end_token=False))
    if not found:
        assert not encoder.is_lossless(prompt + completion)
        return
    (one,) = found
    begin = encoder.begin_ids
    ids = [*one.prompt_ids, *one.completion_ids]
    if tuple(one.prompt_ids[: len(begin)]) == begin and not (
        begin and prompt.startswith(decoded(tokenizer, list(begin)))
    ):
        ids = ids[len(begin) :]
    # a space at the very beginning is the tokenizer's own to lose: SentencePiece writes one there itself
    assert same(decoded(tokenizer, ids).lstrip(" "), (prompt + completion).lstrip(" "))


def test_a_text_that_cannot_be_written_is_refused_with_both_texts(load: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match=r"here: expected a text that the tokenizer can write, found 'a▁b', which it "):
        encoded(load("metaspace"), "a▁b", "c")
    with pytest.raises(InputError, match=r"found 'a▁', which the tokenizer writes as 'a '"):
        encoded(load("metaspace"), "a", "▁")
    with pytest.raises(InputError, match="expected a text that the tokenizer can write"):
        encoded(load("unigram"), "two\nlines", "c")


@pytest.mark.parametrize("name", ["metaspace", pytest.param("mistral_tekken", marks=pytest.mark.slow)])
def test_beginnings_and_ends_that_a_text_brings_are_not_doubled(name: str, load: Callable[[str], Any]) -> None:
    tokenizer = load(name)
    one = encoded(tokenizer, "<s>the weak", " one</s>")
    assert [*one.prompt_ids, *one.completion_ids].count(tokenizer.bos_token_id) == 1
    assert [*one.prompt_ids, *one.completion_ids].count(tokenizer.eos_token_id) == 1


# ---------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("name", WITH_CHAT)
def test_choices_and_completions_are_the_same_tokens(name: str, load: Callable[[str], Any]) -> None:
    tokenizer, choices = load(name), (" weak", "strong", "\nweak or strong")
    one = encoded(tokenizer, "Which?", None, choices)
    for choice, ids in zip(choices, one.choice_ids, strict=True):
        assert ids == encoded(tokenizer, "Which?", choice).completion_ids
        check_ends(tokenizer, [*one.prompt_ids, *ids])
        assert decoded(tokenizer, [*one.prompt_ids, *ids[:-1]]).endswith("Which?" + choice)


# ------------------------------------------------------------------------------------------- chat


CHAT = [("user", "Where is Oslo?"), ("assistant", "In Norway."), ("user", "日本 👍"), ("assistant", "def f():\n  pass")]


def supervised_turns(tokenizer: Any, path: Path, supervise: Supervise) -> list[list[int]]:
    """The targets of each supervised turn."""
    messages = [{"role": role, "content": content} for role, content in CHAT]
    text = text_of(
        write_lines(path, [{"messages": messages}]), targets=Targets.completion, chat=ChatConfig(supervise=supervise)
    )
    malformed = MalformedRecords(skip=False)
    records = parse_records([("here", "row", {"messages": messages})], text, tokenizer, malformed)
    (segment,) = segments(records, text, tokenizer, malformed, window=2048)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    if open_encoder(tokenizer).begin_ids:  # as often as the template writes it: that of Phi-3 does not
        assert segment.ids.count(tokenizer.bos_token_id) == rendered.count(tokenizer.bos_token) <= 1
    assert all(segment.ids[s + 1] == token for s, token in segment.targets)
    turns: list[list[int]] = []
    for number, (position, token) in enumerate(segment.targets):
        if number == 0 or segment.targets[number - 1][0] + 1 != position:
            turns.append([])
        turns[-1].append(token)
    return turns


@pytest.mark.parametrize("supervise", Supervise)
@pytest.mark.parametrize("name", WITH_CHAT)
def test_turns_decode_to_what_the_assistant_says(
    name: str, supervise: Supervise, load: Callable[[str], Any], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = load(name)
    turns = supervised_turns(tokenizer, tmp_path / "a.jsonl", supervise)
    wanted = [content for role, content in CHAT if role == "assistant"][0 if supervise is Supervise.all_turns else 1 :]
    ends = set(end_token_ids(folders(name), tokenizer))
    assert len(turns) == len(wanted)
    for number, (turn, content) in enumerate(zip(turns, wanted, strict=True)):
        text = decoded(tokenizer, turn[:-1]).removeprefix("<|channel|>final<|message|>")  # gpt-oss chooses a channel
        assert text.lstrip(" ") == content
        if number == len(turns) - 1:
            assert turn[-1] in ends
        assert not ends & set(turn[:-1])
    if supervise is Supervise.last:
        path = tmp_path / "a.jsonl"  # where the teacher's completion stops and what is scored: the same end
        held_out = open_evaluation_set(
            text_of(path, "test", targets=Targets.completion),
            tokenizer,
            longest=None,
            max_new_tokens=8,
            end_ids=sorted(ends),
        )
        (request,), (likelihood,) = held_out.generations, held_out.likelihoods
        assert turns[0][-1] in request.end_ids
        assert [token for _, token in likelihood.targets] == turns[0]
