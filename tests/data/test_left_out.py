"""train.leave_out: which sequences of corpus and gold k students read, each without one of k folds."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cache.shards import ShardReader
from pipeline.capture.driver import run as capture
from pipeline.config.schema import GoldFractionOf, TrainConfig
from pipeline.config.validate_train import check_train
from pipeline.core.folds import Fold, fold_of
from pipeline.core.types import InputError, TokenSequence
from pipeline.data.left_out import left_without
from pipeline.data.mixture import Mixture
from pipeline.objective.gates import threshold, top_probability
from pipeline.training.builders import open_gate, steps_of
from pipeline.training.options_read import options_read
from support.commands import capture_arguments, composed, mixture_of, only, script, train_arguments

NUM_FOLDS = 3
Opened = Callable[..., tuple[TrainConfig, Mixture]]


@pytest.fixture(scope="module")
def config(student: Path, data: Path, cache: Path) -> TrainConfig:
    """Two passes over the corpus, a quarter of each batch gold."""
    found = composed("train", *train_arguments(student, data, str(cache), epochs=2, steps="null"))
    assert isinstance(found, TrainConfig)
    return found


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> list[Path]:
    """The captures of two folds of the corpus."""
    folder = tmp_path_factory.mktemp("halves")
    options = {"caches_dir": str(folder), "k": 5, "temperatures": "[1.0]"}
    captures = [capture_arguments(teacher, data, name=f"half{j}", only_fold=f"{j}/2", **options) for j in range(2)]
    found = [capture(composed("capture", *arguments)) for arguments in captures]
    return [path for path in found if isinstance(path, Path)]


def sequences_read(config: TrainConfig, mixture: Mixture) -> dict[str, Counter[bytes]]:
    """How often a run reads each sequence, by source."""
    found: dict[str, Counter[bytes]] = {"gold": Counter(), "corpus": Counter()}
    for step in range(steps_of(config, mixture)):
        for slot in mixture.slots(step):
            found[slot.source][mixture.read(slot)[0].key] += 1
    return found


def rows_of(mixture: Mixture) -> dict[str, list[TokenSequence]]:
    """All sequences of the texts of a run without leave_out."""
    corpus = [
        reader.row(block, row)[0]
        for reader in mixture.readers
        for block, size in enumerate(reader.blocks)
        for row in range(size)
    ]
    return {"gold": [mixture.gold[row][0] for row in range(len(mixture.gold))], "corpus": corpus}


@pytest.mark.parametrize(
    "changes",
    [{}, {"curriculum_parts": 2}, {"more": True, "gold_cache": True}],
    ids=["text", "curriculum", "several caches and a gold cache"],
)
def test_what_k_students_leave_out_is_everything_once(
    config: TrainConfig, halves: list[Path], changes: dict[str, Any]
) -> None:
    """And each reads all the rest, in whole epochs as often as one another."""
    chosen = {name: value for name, value in changes.items() if name not in ("more", "gold_cache")}
    if changes.get("more"):  # any caches do: here those of halves of the corpus as corpus, and one of them as gold
        chosen |= {"cache": str(halves[0]), "more_caches": [str(halves[1])], "gold_cache": str(halves[0])}
    config = dataclasses.replace(config, **chosen, gold_fraction=0.5, gold_epochs=2.0)
    every = {name: Counter(row.key for row in rows) for name, rows in rows_of(mixture_of(config)).items()}
    unread: dict[str, Counter[bytes]] = {"gold": Counter(), "corpus": Counter()}
    for j in range(NUM_FOLDS):
        without = dataclasses.replace(config, leave_out=f"{j}/{NUM_FOLDS}")
        found = sequences_read(without, mixture_of(without))
        for name, counts in found.items():
            assert counts.keys() == {key for key in every[name] if fold_of(key, NUM_FOLDS) != j}
            unread[name] += Counter({key: every[name][key] for key in every[name].keys() - counts.keys()})
        # the last batch may begin another epoch
        assert all(n >= 2 * every["corpus"][key] for key, n in found["corpus"].items())
        assert all(n <= 2 * every["gold"][key] for key, n in found["gold"].items())
    assert unread == every


def test_steps_and_fractions_count_what_is_left(config: TrainConfig) -> None:
    plain = mixture_of(config)
    fold = Fold(number=1, of=NUM_FOLDS)
    left = {name: [row for row in rows if not fold.holds(row.key)] for name, rows in rows_of(plain).items()}
    config = dataclasses.replace(config, leave_out=str(fold), gold_fraction_of=GoldFractionOf.targets)
    mixture = mixture_of(config)
    assert len(mixture.gold) == len(left["gold"]) < len(plain.gold)
    means = [Fraction(sum(len(row.target_ids_N) for row in left[name]), len(left[name])) for name in ("gold", "corpus")]
    gold, corpus = Fraction(1, 4) / means[0], Fraction(3, 4) / means[1]
    assert mixture.order.gold_fraction == gold / (gold + corpus)
    assert steps_of(config, mixture) == -(-2 * len(left["corpus"]) // (4 * (1 - gold / (gold + corpus))))


def test_a_gate_keeps_a_fraction_of_what_is_left(config: TrainConfig, cache: Path) -> None:
    reader, fold = ShardReader(cache), Fold(number=0, of=2)
    gate = dataclasses.replace(config.loss.kd.gate, keep_fraction=0.5)
    kd = dataclasses.replace(config.loss.kd, gate=gate)
    rows = [reader.row(block, row) for block, size in enumerate(reader.blocks) for row in range(size)]
    least = {}
    for parts in (1, 2):
        mixture = mixture_of(dataclasses.replace(config, leave_out=str(fold), curriculum_parts=parts))
        least[parts] = open_gate(kd, mixture.readers, mixture.curriculum).min_confidence
    confidences = [top_probability(captured.top) for sequence, captured in rows if not fold.holds(sequence.key)]
    assert least[1] == least[2] == threshold(torch.cat(confidences), 0.5, largest=True)
    assert least[1] != open_gate(kd, [reader]).min_confidence


def test_nothing_left_is_refused(config: TrainConfig, halves: list[Path]) -> None:
    """A cache of one fold alone is a cache as any other, except to a student that leaves out this fold."""
    config = dataclasses.replace(config, cache=str(halves[0]), gold_fraction=0.0)
    assert sequences_read(config, mixture_of(config))["corpus"]
    other = dataclasses.replace(config, leave_out="1/2")
    assert sequences_read(other, mixture_of(other)) == sequences_read(config, mixture_of(config))
    with pytest.raises(InputError, match="leave_out: expected sequences outside of fold 0/2 to train on, found none"):
        mixture_of(dataclasses.replace(config, leave_out="0/2"))
    with pytest.raises(InputError, match="leave_out: expected j/k, fold j"):
        check_train(dataclasses.replace(config, leave_out="2/2"))


def test_it_names_another_run_only_where_it_is_given(config: TrainConfig) -> None:
    plain = options_read(config)
    assert "leave_out" not in plain
    assert options_read(dataclasses.replace(config, leave_out="0/3")) == {**plain, "leave_out": "0/3"}


def test_the_rows_of_several_blocks() -> None:
    """Indices run over all blocks, also over one of which nothing is left."""
    fold, blocks = Fold(number=1, of=2), [[0, 1, 2], [1, 3], [4, 6, 1]]
    keyed = [[(key.to_bytes(8, "big") + bytes(8), 10 * key + 1) for key in block] for block in blocks]
    left = left_without(fold, keyed, what="gold")
    assert [rows.tolist() for rows in left.rows] == [[0, 2], [], [0, 1]]
    assert left.indices().tolist() == [0, 2, 5, 6]
    assert (left.num_targets, left.mean_targets) == (1 + 21 + 41 + 61, 31)


@pytest.mark.slow
def test_a_run_without_a_fold(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    """From the command to the sequences that its ranks have read, by the sums of keys in its metrics."""
    arguments = train_arguments(student, data, str(cache), leave_out="2/3", steps=6)
    done = script("train", *arguments, cwd=tmp_path)
    run = only(tmp_path / "runs")
    mixture = mixture_of(composed("train", *arguments))
    read = [[mixture.read(slot)[0].key for slot in mixture.slots(step)] for step in range(6)]
    assert {fold_of(key, 3) for keys in read for key in keys} == {0, 1}
    sums = [sum(int.from_bytes(key[:8], "little") for key in keys) % 2**64 for keys in read]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [row["sequences"] for row in rows] == [f"{value:016x}" for value in sums]
    num_rows = sum(ShardReader(cache).blocks)
    assert re.search(rf"leave_out=2/3: [1-9]\d* of {num_rows} sequences of \S+ are left out", done.stderr)
    assert json.loads((run / "identity.json").read_text())["options"]["leave_out"] == "2/3"
