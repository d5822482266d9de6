"""Tokenizers: compared by content, part by part, and refused where their class changes the ids of the file."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.config.schema import CaptureConfig, Dtype, ModelConfig, TextConfig
from pipeline.core.types import InputError, Manifest
from pipeline.models.tokenizer import (
    chat_template_and_end_token,
    check_same_tokenizer,
    end_token_ids,
    load_tokenizer,
    split_option,
    tokenizer_hash,
    tokenizer_parts,
    vocabulary_size,
)
from support.tiny import LINES, make_model, make_tokenizer
from support.tiny import manifest_of as planned


def manifest_of(tokenizer: Any) -> Manifest:
    """The manifest of a cache of a teacher with this tokenizer."""
    options = CaptureConfig(
        name="x", teacher=ModelConfig(path="x", dtype=Dtype.float32), corpus=TextConfig(files=["x"]), window=16
    )
    manifest = planned(options, tokenizer, 1, {"tokenizer": tokenizer_hash(tokenizer)})
    return dataclasses.replace(manifest, tokenizer=json.loads(json.dumps(tokenizer_parts(tokenizer))))


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[1].content | upper }}"])
def test_an_unknown_end_of_turn_is_said(
    template: str, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    assert end_token_ids(tmp_path, other) == (tokenizer.eos_token_id,)
    assert "chat template: its end of turn is unknown" in caplog.text


def test_the_end_token_is_in_the_fingerprint_but_not_in_the_tokenizers_hash(tokenizer: Any) -> None:
    before = chat_template_and_end_token(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<bos>"
    assert chat_template_and_end_token(other) != before
    assert tokenizer_hash(other) == tokenizer_hash(tokenizer)  # the ids still mean the same tokens


def test_tokenizers_are_compared_by_content_not_by_name(tmp_path: Path, student: Path, teacher: Path) -> None:
    student_hash, teacher_hash = (tokenizer_hash(load_tokenizer(folder)) for folder in (student, teacher))
    assert student_hash == teacher_hash  # although their heads are padded to different sizes
    check_same_tokenizer(manifest_of(load_tokenizer(teacher)), load_tokenizer(student), cache="c", student="s")
    other = make_tokenizer(lines=[*LINES, "other words altogether"])
    make_model(tmp_path / "student", other, seed=1)  # the same folder name
    with pytest.raises(
        InputError, match="expected .* to have the teacher's tokenizer .* use a student of the teacher's family"
    ):
        check_same_tokenizer(
            manifest_of(load_tokenizer(teacher)), load_tokenizer(tmp_path / "student"), cache="c", student="s"
        )


def test_a_student_may_have_tokens_behind_the_teachers_vocabulary(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, student = manifest_of(tokenizer), copy.deepcopy(tokenizer)
    student.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer_hash(student) != teacher.made_of["tokenizer"]
    with caplog.at_level(logging.INFO):
        check_same_tokenizer(teacher, student, cache="c", student="s")
    assert "no captured text contains: ['<pad>']" in caplog.text
    # the other way round the cache may contain ids that the student has not
    with pytest.raises(InputError, match="token 300 is '<pad>' .*of the teacher and no added token of the student"):
        check_same_tokenizer(manifest_of(student), tokenizer, cache="c", student="s")


def changed(tokenizer: Any, part: str) -> Any:
    """The tokenizer with one part changed."""
    other = copy.deepcopy(tokenizer)
    backend = other.backend_tokenizer
    if part == "normalizer":
        backend.normalizer = normalizers.NFC()
    elif part == "pre-tokenizer":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif part == "added token":
        other.add_special_tokens({"pad_token": "<pad>"})
    else:
        state = json.loads(backend.to_str())
        if part == "merges":
            state["model"]["merges"] = state["model"]["merges"][:-1]
        elif part == "vocabulary":
            state["model"]["vocab"]["more"] = len(state["model"]["vocab"])
        backend = type(backend).from_str(json.dumps(state))
        other = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    return other


@pytest.mark.parametrize("part", ["normalizer", "pre-tokenizer", "merges", "vocabulary"])
def test_the_first_part_that_differs_is_named(tokenizer: Any, part: str) -> None:
    with pytest.raises(InputError, match=f"tokenizer: expected s .* found .*: another {part}; use a student"):
        check_same_tokenizer(manifest_of(tokenizer), changed(tokenizer, part), cache="c", student="s")


def test_added_tokens_inside_the_teachers_vocabulary_are_compared(tokenizer: Any) -> None:
    one, other = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    one.add_tokens(AddedToken("<think>"))
    other.add_tokens(AddedToken("<call>", special=True))
    with pytest.raises(
        InputError, match="token 300 is '<think>' .*of the teacher and '<call>' .*special of the student"
    ):
        check_same_tokenizer(manifest_of(one), other, cache="c", student="s")


def test_older_caches_accept_equal_tokenizers_only(tokenizer: Any) -> None:
    teacher = dataclasses.replace(manifest_of(tokenizer), tokenizer=None)
    check_same_tokenizer(teacher, tokenizer, cache="c", student="s")
    with pytest.raises(InputError, match="only equal ones are accepted"):
        check_same_tokenizer(teacher, changed(tokenizer, "added token"), cache="c", student="s")


def test_padding_and_truncation_do_not_change_the_tokenizers_hash(student: Path) -> None:
    tokenizer = load_tokenizer(student)
    before = tokenizer_hash(tokenizer)
    tokenizer.pad_token = "<eos>"
    tokenizer(["a", "weak teacher"], padding=True, truncation=True, max_length=3)
    assert tokenizer_hash(tokenizer) == before


def test_split_special_tokens_is_in_the_fingerprint_only_where_it_is_on(tokenizer: Any) -> None:
    splitting = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), split_special_tokens=True
    )
    assert tokenizer("<eos>")["input_ids"] != splitting("<eos>")["input_ids"]
    assert tokenizer_hash(tokenizer) == tokenizer_hash(splitting)  # therefore it needs a place of its own
    assert split_option(tokenizer) == {}
    assert split_option(splitting) == {"split_special_tokens": True}
    assert manifest_of(splitting).made_of["split_special_tokens"] is True
    assert "split_special_tokens" not in manifest_of(tokenizer).made_of


# --------------------------------------------------------------------------- the class and the file


def folder_with(tokenizer: Any, folder: Path, **options: Any) -> Path:
    """A folder with the tokenizer, whose tokenizer_config.json has these options."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": "<eos>"} | options))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_a_class_that_replaces_the_normalizer_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """GPT-2's class reads vocabulary and merges of any tokenizer.json, but normalizes and splits like GPT-2."""
    composing = changed(tokenizer, "normalizer")
    assert load_tokenizer(folder_with(tokenizer, tmp_path / "same", tokenizer_class="GPT2Tokenizer")).is_fast
    folder = folder_with(composing, tmp_path / "other", tokenizer_class="GPT2Tokenizer")
    with pytest.raises(InputError, match=r"expected the ids of tokenizer.json for 'cafe.*, found .* by GPT2Tokenizer"):
        load_tokenizer(folder)
    for model_type in ("llama", "gpt2", "qwen3"):  # what the message advises
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        options = folder / "tokenizer_config.json"
        options.write_text(json.dumps(json.loads(options.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
        loaded = load_tokenizer(folder)
        assert loaded("cafe\u0301")["input_ids"] == composing("caf\u00e9")["input_ids"]


def test_a_class_that_adds_a_token_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """The class has a default unknown token, which is in neither file: it gets an id behind the vocabulary."""
    folder = folder_with(tokenizer, tmp_path, tokenizer_class="GPT2Tokenizer", unk_token=None)
    options = json.loads((folder / "tokenizer_config.json").read_text())
    del options["unk_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(InputError, match=r"expected the ids of tokenizer.json for 'a<\|endoftext\|> b'"):
        load_tokenizer(folder)


def test_a_class_that_splits_otherwise_is_refused(tmp_path: Path) -> None:
    by_digit = make_tokenizer(lines=[*LINES, "1234 1234 1234"] * 3)
    by_digit.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(InputError, match="set tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast"):
        load_tokenizer(folder_with(by_digit, tmp_path, tokenizer_class="GPT2Tokenizer"))


def test_options_of_the_tokenizers_config_are_no_disagreement(tokenizer: Any, tmp_path: Path) -> None:
    folder = folder_with(tokenizer, tmp_path / "a", tokenizer_class="GPT2Tokenizer", add_prefix_space=True)
    assert load_tokenizer(folder)("a")["input_ids"] == tokenizer(" a")["input_ids"]
    folder = folder_with(tokenizer, tmp_path / "b", tokenizer_class="GPT2Tokenizer", split_special_tokens=True)
    assert len(load_tokenizer(folder)("<eos>")["input_ids"]) > 1
    token = {"content": "<new>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    added = {
        "0": token | {"content": "<bos>"},
        "1": token | {"content": "<eos>"},
        "300": token | {"single_word": False},
    }
    added = {number: {"single_word": False} | one for number, one in added.items()}
    folder = folder_with(tokenizer, tmp_path / "c", tokenizer_class="GPT2Tokenizer", added_tokens_decoder=added)
    assert load_tokenizer(folder)("<new>")["input_ids"] == [300]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, student: Path) -> None:
    (tmp_path / "config.json").write_bytes((student / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"expected a tokenizer \(tokenizer.json\), found none; copy the tokenizer's"):
        load_tokenizer(tmp_path)
    (tmp_path / "model").mkdir()  # as in the folder of a run
    with pytest.raises(InputError, match=f"found none; give {tmp_path}/model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="expected a tokenizer that transformers can load, found: .*; check its files"):
        load_tokenizer(tmp_path)


def test_the_vocabulary_ends_at_the_largest_id_not_at_the_number_of_tokens() -> None:
    """Four tokens, the largest id 9: row 9 of the head belongs to a token."""

    class Gaps:
        def __len__(self) -> int:
            return 4

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "c": 2, "<end>": 9}

    assert vocabulary_size(Gaps()) == 10
    tokenizer = make_tokenizer()
    assert vocabulary_size(tokenizer) == len(tokenizer)
