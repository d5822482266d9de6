"""The tokenizers that other tests read: each gives the ids of its family's library and its chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.models.tokenizer import load_tokenizer, vocabulary_size
from support.real_tokenizers import TOKENIZERS, real_tokenizer
from support.trained_tokenizers import metaspace_tokenizer, phi3_tokenizer, unigram_tokenizer

TEXT = "It's 1234 naïve  cats\n\n日本"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    ids: list[int]
    """Of TEXT, by tiktoken, sentencepiece, mistral-common or, for smollm2 and deepseek_v3, the published tokenizer."""
    special: dict[str, int]
    begin: list[int]
    """What stands before a text without being asked for."""
    size: int
    chat: str
    """Up to and with the generation prompt, of the system text "S" and the user's "hi"."""


KNOWN = {
    "smollm2": Known(
        ids=[1589, 506, 216, 33, 34, 35, 36, 15486, 46494, 216, 7680, 198, 198, 23274, 115, 40993],
        special={"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2},
        begin=[],
        size=49152,
        chat="<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen3": Known(
        ids=[2132, 594, 220, 16, 17, 18, 19, 94880, 586, 220, 19423, 271, 101059],
        special={"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
        begin=[],
        size=151669,
        chat="<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "deepseek_v3": Known(
        ids=[2107, 734, 223, 6895, 22, 112752, 223, 21624, 271, 6392],
        special={"<｜begin▁of▁sentence｜>": 0, "<｜end▁of▁sentence｜>": 1, "<｜Assistant｜>": 128804},
        begin=[],
        size=128815,
        chat="<｜begin▁of▁sentence｜>S<｜User｜>hi<｜Assistant｜>",
    ),
    "gpt_oss": Known(
        ids=[15834, 220, 7633, 19, 153475, 737, 220, 28854, 279, 9048],
        special={"<|endoftext|>": 199999, "<|return|>": 200002, "<|channel|>": 200005, "<|start|>": 200006}
        | {"<|end|>": 200007, "<|message|>": 200008},
        begin=[],
        size=200019,
        chat="<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nS\n\n<|end|>"
        "<|start|>user<|message|>hi<|end|><|start|>assistant",
    ),
    "mistral_v1": Known(
        ids=[
            661,
            28742,
            28713,
            28705,
            28740,
            28750,
            28770,
            28781,
            1879,
            28920,
            333,
            28705,
            18097,
            13,
            13,
            29142,
            29119,
        ],
        special={"<unk>": 0, "<s>": 1, "</s>": 2},
        begin=[1],
        size=32000,
        chat="<s>[INST] S\n\nhi [/INST]",
    ),
    "mistral_v3": Known(
        ids=[
            1429,
            29510,
            29481,
            29473,
            29508,
            29518,
            29538,
            29549,
            2647,
            29688,
            1101,
            29473,
            18865,
            781,
            781,
            29910,
            29887,
        ],
        special={"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4},
        begin=[1],
        size=32768,
        chat="<s>[INST] S\n\nhi[/INST]",
    ),
    "mistral_tekken": Known(
        ids=[2757, 1681, 1032, 1049, 1050, 1051, 1052, 98355, 1032, 44835, 1267, 10008],
        special={"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4},
        begin=[1],
        size=131072,
        chat="<s>[INST]S\n\nhi[/INST]",
    ),
}
CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in TOKENIZERS])
def loaded(request: pytest.FixtureRequest, folders: Path) -> tuple[Known, Any]:
    return KNOWN[request.param], load_tokenizer(real_tokenizer(request.param, folders / request.param))


def test_ids_are_those_of_the_family(loaded: tuple[Known, Any]) -> None:
    known, tokenizer = loaded
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == known.ids
    assert tokenizer(TEXT)["input_ids"] == known.begin + known.ids
    assert tokenizer.decode(known.ids) == TEXT
    assert vocabulary_size(tokenizer) == known.size
    assert tokenizer.is_fast


def test_special_tokens_are_single_ids(loaded: tuple[Known, Any]) -> None:
    known, tokenizer = loaded
    assert {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in known.special} == {
        token: [token_id] for token, token_id in known.special.items()
    }
    assert tokenizer.eos_token_id in known.special.values()


def test_chat_is_rendered_as_by_the_family(loaded: tuple[Known, Any]) -> None:
    known, tokenizer = loaded
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == known.chat
    words = ["first question", "first answer", "second question", "second answer"]
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, words, strict=True)]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert [text.count(content) for content in words] == [1, 1, 1, 1]
    assert sorted(words, key=text.index) == words
    assert text.rstrip("\n").endswith("second answer" + tokenizer.eos_token)


@pytest.mark.slow
def test_qwen3_closes_its_reasoning_when_asked(folders: Path) -> None:
    tokenizer = load_tokenizer(real_tokenizer("qwen3", folders / "thinking"))
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert text == KNOWN["qwen3"].chat + "<think>\n\n</think>\n\n"


# ------------------------------------------------------------------------------------------------ trained ones

TRAINED: dict[str, tuple[Callable[[Path], Path], str, list[str]]] = {  # how it is made, a text, its tokens
    "first": (metaspace_tokenizer, "the</s>the é", ["<s>", "▁the", "</s>", "t", "he", "▁", "<0xC3>", "<0xA9>"]),
    "first, a leading space": (metaspace_tokenizer, " the", ["<s>", "▁the"]),
    "always": (partial(metaspace_tokenizer, space="always"), "the</s>the", ["<s>", "▁the", "</s>", "▁the"]),
    "never": (partial(metaspace_tokenizer, space="never"), "the the", ["<s>", "t", "he", "▁the"]),
    "normalizer": (partial(metaspace_tokenizer, space="normalizer"), " the", ["<s>", "▁", "▁the"]),
    "ends": (partial(metaspace_tokenizer, ends=True), "the", ["<s>", "▁the", "</s>"]),
    "phi3": (phi3_tokenizer, "<|end|>\n <|user|>\n\nthe", ["<s>", "<|end|>", "<|user|>", "▁the"]),
    "unigram": (unigram_tokenizer, "ﬁ  the", ["▁", "f", "i", "▁t", "h", "e", "</s>"]),
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_tokenizers_have_the_form_of_their_name(name: str, folders: Path) -> None:
    make, text, tokens = TRAINED[name]
    tokenizer = load_tokenizer(make(folders / name))
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == tokens


def test_ids_have_a_gap(folders: Path) -> None:
    tokenizer = load_tokenizer(metaspace_tokenizer(folders / "gap", id_gap=50))
    ids = set(tokenizer.get_vocab().values())
    assert set(range(vocabulary_size(tokenizer))) - ids == set(range(259, 309))
    assert tokenizer.decode(tokenizer("the é", add_special_tokens=False)["input_ids"]) == "the é"
