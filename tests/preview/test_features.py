"""Features against plain transformers, what their sidecar is made of, and what a preview can read."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.cache.shards import ShardReader
from pipeline.config.commands import PreviewConfig
from pipeline.config.schema import Dtype, ModelConfig, Targets, TextConfig
from pipeline.core.types import InputError, TokenSequence, TopK
from pipeline.preview import features
from pipeline.preview.features import Features, Reading, open_features
from pipeline.preview.texts import (
    LOG_FLOOR,
    choose_outcomes,
    columns_of,
    outcome_log_probs,
    read_corpus,
    read_dev,
    read_gold,
)
from support.tiny import make_model, write_lines

OUTCOMES = torch.tensor([3, 70, 71, 200])


@pytest.fixture
def texts(cache: Path) -> dict[str, list[TokenSequence]]:
    reader = ShardReader(cache)
    corpus = [reader.at(place)[0] for place in range(sum(reader.blocks))]
    return {"corpus": corpus, "gold": corpus[:3]}


@pytest.fixture
def reading(student: Path, teacher: Path) -> Reading:
    return Reading(
        student=ModelConfig(path=str(student), dtype=Dtype.float32, attention="sdpa"),
        teacher=ModelConfig(path=str(teacher), dtype=Dtype.float32, attention="sdpa"),
        depths=(0.4, 0.6, 1.0),
        vocabulary_size=300,
        batch_sequences=4,
        log_every_seconds=60,
    )


def opened(reading: Reading, texts: Any, place: Path, *, outcomes: torch.Tensor = OUTCOMES) -> Features:
    return open_features(reading, texts, outcomes, cache_fingerprint="abc", place=place)


def test_they_are_the_hidden_states_of_plain_transformers(
    reading: Reading, texts: dict[str, list[TokenSequence]], tmp_path: Path
) -> None:
    """Each record alone, without packing; with a kernel for rows and one for segments. And the teacher's outcomes."""
    model, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(one.path).eval() for one in (reading.student, reading.teacher)
    )
    expected, outcomes = [], []
    for sequence in texts["corpus"]:
        start = 0
        for length, position in zip(sequence.segment_lengths, sequence.target_positions_N.tolist(), strict=True):
            ids_1S = sequence.input_ids_S[None, start : start + length]
            with torch.no_grad():
                states = model(ids_1S, output_hidden_states=True).hidden_states
                logits_V = teacher(ids_1S).logits[0, position - start, :300].double()
            expected.append(torch.cat([states[layer][0, position - start] for layer in (1, 2, 3)]))
            p_V = logits_V.softmax(dim=0)
            outcomes.append([*p_V[OUTCOMES].tolist(), 1 - float(p_V[OUTCOMES].sum())])
            start += length
    num_gold = sum(len(sequence.segment_lengths) for sequence in texts["gold"])
    for attention in ("sdpa", "eager_segments"):
        one = dataclasses.replace(reading, student=dataclasses.replace(reading.student, attention=attention))
        found = opened(one, texts, tmp_path / attention)
        assert found.layers == (1, 2, 3)
        torch.testing.assert_close(found.states["corpus"].float(), torch.stack(expected), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(found.states["gold"], found.states["corpus"][:num_gold], atol=2e-3, rtol=2e-3)
        assert found.states["corpus"].dtype is torch.float16
        expected_GC = torch.tensor(outcomes[:num_gold], dtype=torch.float64)
        torch.testing.assert_close(found.teacher_gold_GC.exp(), expected_GC, atol=1e-5, rtol=1e-4)


def test_they_are_computed_once(
    reading: Reading, texts: dict[str, list[TokenSequence]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would change them is another sidecar; what only speeds them up is not."""
    first = opened(reading, texts, tmp_path)
    made_of = json.loads((first.folder / "features.json").read_text())
    assert {"cache", "student_weights", "student_dtype", "layers", "texts", "outcomes"} <= made_of.keys()
    again = [reading, dataclasses.replace(reading, batch_sequences=1, log_every_seconds=1.0)]

    def never(*arguments: Any) -> Any:
        raise AssertionError("computed")

    monkeypatch.setattr(features, "compute", never)
    for one in again:
        found = opened(one, texts, tmp_path)
        assert found.folder == first.folder
        assert all(torch.equal(found.states[name], values) for name, values in first.states.items())
        assert torch.equal(found.teacher_gold_GC, first.teacher_gold_GC)
    for other, other_texts, outcomes in (
        (dataclasses.replace(reading, depths=(1.0,)), texts, OUTCOMES),
        (dataclasses.replace(reading, student=reading.teacher), texts, OUTCOMES),
        (reading, texts | {"gold": texts["corpus"][:2]}, OUTCOMES),
        (reading, texts, OUTCOMES[:3]),
    ):
        with pytest.raises(AssertionError, match="computed"):
            opened(other, other_texts, tmp_path, outcomes=outcomes)


def test_killed_while_they_are_written_leaves_nothing_to_be_read(
    reading: Reading, texts: dict[str, list[TokenSequence]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_json", killed)  # the weights of the file are written before
        with pytest.raises(KeyboardInterrupt):
            opened(reading, texts, tmp_path)
    assert not list(tmp_path.glob("features-*"))
    assert opened(reading, texts, tmp_path).states.keys() == {"corpus", "gold"}


def test_states_that_float16_does_not_hold_are_refused(tmp_path: Path, tokenizer: Any, reading: Reading) -> None:
    folder = make_model(tmp_path / "large", tokenizer, seed=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    model.save_pretrained(folder)
    large = dataclasses.replace(reading, student=dataclasses.replace(reading.student, path=str(folder)))
    text = read_gold(
        TextConfig(
            files=[str(write_lines(tmp_path / "a.jsonl", [{"prompt": "the", "completion": "a"}]))],
            targets=Targets.completion,
            end_token=False,
        ),
        tokenizer,
        window=48,
    )
    with pytest.raises(InputError, match="depths: expected hidden states up to 65504, which float16 holds"):
        opened(large, {"corpus": text, "gold": text}, tmp_path)


# ------------------------------------------------------------------------------------------- texts


def top_of(ids: list[list[int]], kept: list[list[float]]) -> TopK:
    p_NK = torch.tensor(kept, dtype=torch.float64)
    largest_N1 = p_NK.amax(dim=1, keepdim=True)
    return TopK(
        ids_NK=torch.tensor(ids, dtype=torch.int32),
        relative_logits_NK=(p_NK / largest_N1).log(),
        log_tail_NC=((1 - p_NK.sum(dim=1, keepdim=True)) / largest_N1).log(),
        temperatures=(1.0,),
    )


def test_outcomes_are_the_fewest_tokens_with_nearly_all_mass() -> None:
    top = top_of([[9, 4, 2], [4, 9, 7]], [[0.9, 0.0995, 0.0004], [0.9, 0.0993, 0.0006]])
    ids = choose_outcomes(top, [7], vocabulary_size=20)
    assert ids.tolist() == [4, 7, 9]  # 4 and 9 hold 99.94 %; 7 is required, and 2 is not
    found = outcome_log_probs(top, ids).exp()
    expected = [[0.0995, 0.0, 0.9, 0.0005], [0.9, 0.0006, 0.0993, 0.0001]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert outcome_log_probs(top, ids)[0, 1] == pytest.approx(LOG_FLOOR, abs=1e-6)
    assert columns_of([9, 4, 9], ids).tolist() == [2, 0, 2]


def test_a_teacher_with_too_many_outcomes_is_refused() -> None:
    spread = top_of([list(range(300))], [[1 / 301] * 300])
    with pytest.raises(InputError, match=r"expected at most 256 tokens with 99\.9% of the teacher's probability"):
        choose_outcomes(spread, [], vocabulary_size=400)
    unkept = top_of([[1, 2]], [[0.5, 0.4]])  # the tail holds the rest
    with pytest.raises(InputError, match="a preview reads records with one supervised position each"):
        choose_outcomes(unkept, [], vocabulary_size=400)


def test_texts_with_several_positions_a_record_are_refused(
    data: Path, student: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": "a:", "completion": " one two"}, {"prompt": "b:", "completion": "c"}]
    several = TextConfig(files=[str(write_lines(tmp_path / "a.jsonl", rows))], targets=Targets.completion)
    with pytest.raises(InputError, match=r"gold: a preview reads .* found \d+ supervised positions in 2 records"):
        read_gold(several, tokenizer, window=48)
    choices = TextConfig(files=[str(data / "dev.jsonl")], targets=Targets.completion, end_token=False)
    with pytest.raises(InputError, match="expected choices of one token and the answer, found other ones"):
        read_dev(choices, tokenizer, folder=student, window=48)  # " three of"


def test_a_part_of_the_cache_is_spread_over_it(cache: Path) -> None:
    reader = ShardReader(cache)
    rows = [reader.at(place) for place in range(sum(reader.blocks))]
    whole = read_corpus(PreviewConfig(study="x", max_records=4000), cache)
    assert [one.key for one in whole.sequences] == [sequence.key for sequence, _ in rows]
    assert torch.equal(whole.top.ids_NK, TopK.cat([captured.top for _, captured in rows]).ids_NK)
    part = read_corpus(PreviewConfig(study="x", max_records=30), cache)  # of 60
    places = [[one.key for one in whole.sequences].index(one.key) for one in part.sequences]
    assert len(places) == -(-len(rows) // 2)
    assert places == sorted(set(places))
    assert max(b - a for a, b in itertools.pairwise(places)) <= 3


def test_dev_has_its_choices_in_the_order_of_its_positions(student: Path, tokenizer: Any, tmp_path: Path) -> None:
    letters = ["a", "b", "c"]
    rows = [
        {"prompt": "the weak model supervises " * (1 + i % 3) + f"{i}:", "choices": letters[i % 2 :], "answer": i % 2}
        for i in range(9)
    ]
    config = TextConfig(
        files=[str(write_lines(tmp_path / "dev.jsonl", rows))], targets=Targets.completion, end_token=False
    )
    dev = read_dev(config, tokenizer, folder=student, window=24)
    token = {letter: tokenizer(letter)["input_ids"][0] for letter in letters}
    places = []
    for sequence in dev.sequences:
        start = 0
        for length, position in zip(sequence.segment_lengths, sequence.target_positions_N.tolist(), strict=True):
            assert position == start + length - 1  # the last token of the prompt
            text = tokenizer.decode(sequence.input_ids_S[start : start + length])
            places.append(next(i for i, row in enumerate(rows) if row["prompt"] == text))
            start += length
    assert sorted(places) == list(range(9))
    assert list(dev.choice_ids) == [tuple(token[one] for one in rows[i]["choices"]) for i in places]
    assert list(dev.answers) == [i % 2 for i in places]
