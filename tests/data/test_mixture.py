"""Several caches in one run: what is dealt, read and refused, from the options to the batch."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cache import shards
from pipeline.cache.shards import ShardReader
from pipeline.core.types import InputError
from pipeline.data.mixture import Mixture
from pipeline.training import driver
from pipeline.training.builders import steps_of
from support.commands import (
    BIT_BY_BIT,
    capture_arguments,
    composed,
    losses_of,
    mixture_of,
    only,
    script,
    stop_at,
    train_arguments,
)
from support.tiny import make_model, make_tokenizer, prompts, write_lines


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A second, smaller cache of other text, with fewer entries kept."""
    folder = tmp_path_factory.mktemp("other")
    write_lines(folder / "corpus.jsonl", prompts(20, labeled=False, first=200))
    script("capture", *capture_arguments(teacher, folder, name="other", k=5), cwd=folder)
    (found,) = folder.glob("caches/other-*")
    return found


@pytest.fixture
def opened(student: Path, data: Path, cache: Path) -> Callable[..., Mixture]:
    def mixture(**changes: Any) -> Mixture:
        config = composed("train", *train_arguments(student, data, str(cache), **changes))
        return mixture_of(config)

    return mixture


def targets_of(mixture: Mixture, steps: range) -> Counter[str]:
    found: Counter[str] = Counter()
    for step in steps:
        for slot in mixture.slots(step):
            found[f"{slot.source} {slot.cache}"] += len(mixture.read(slot)[0].target_ids_N)
    return found


def test_two_caches_by_weight(opened: Callable[..., Mixture], other: Path) -> None:
    """Three of four corpus sequences from the first; one batch holds both and their distributions in their places."""
    mixture = opened(more_caches=f"[{other}]", cache_weights="[3,1]", global_batch=16)
    slots = [slot for step in range(9) for slot in mixture.slots(step)]
    counts = Counter((slot.source, slot.cache) for slot in slots)
    assert counts == {("gold", 0): 36, ("corpus", 0): 81, ("corpus", 1): 27}
    (batch,) = mixture.micro_batches(0, rank=0, world_size=1, micro_batch=16)
    assert batch.teacher is not None
    expected = [mixture.read(slot) for slot in mixture.slots(0)]
    assert batch.keys_B is not None
    assert batch.keys_B.tolist() == [int.from_bytes(s.key[:8], "little", signed=True) for s, _ in expected]
    tails = torch.cat([captured.top.log_tail_NC for _, captured in expected if captured is not None])
    assert torch.equal(batch.teacher.log_tail_NC, tails)
    assert batch.teacher.ids_NK.shape[1] == 8
    assert (batch.teacher.relative_logits_NK[:, 5:] == -torch.inf).all(dim=1).any()  # those of the smaller k


def test_without_weights_all_caches_end_their_epoch_together(
    student: Path, data: Path, cache: Path, other: Path
) -> None:
    changes = {"more_caches": f"[{other}]", "gold_fraction": 0, "steps": "null", "epochs": 2, "global_batch": 4}
    config = composed("train", *train_arguments(student, data, str(cache), **changes))
    mixture = mixture_of(config)
    sizes = [sum(ShardReader(place).blocks) for place in (cache, other)]
    steps = steps_of(config, mixture)
    assert steps == -(-2 * sum(sizes) // 4)
    slots = [slot for step in range(steps) for slot in mixture.slots(step)][: 2 * sum(sizes)]
    seen = Counter((slot.cache, slot.block, slot.row) for slot in slots)
    assert set(seen.values()) == {2}
    assert len(seen) == sum(sizes)


@pytest.mark.parametrize("more", [False, True])
def test_a_fraction_of_targets(opened: Callable[..., Mixture], other: Path, more: bool) -> None:
    """Half of all targets, where half of the sequences would be far fewer; whole epochs have it nearly exactly."""
    changes = {"more_caches": f"[{other}]", "cache_weights": "[1,2]"} if more else {}
    by_targets = opened(gold_fraction=0.5, gold_fraction_of="targets", **changes)
    found = targets_of(by_targets, range(200))
    assert found["gold 0"] / found.total() == pytest.approx(0.5, abs=0.01)
    found = targets_of(opened(gold_fraction=0.5, **changes), range(200))
    assert abs(found["gold 0"] / found.total() - 0.5) > 0.03


def test_gold_epochs_are_counted_in_gold_sequences(opened: Callable[..., Mixture]) -> None:
    mixture = opened(gold_epochs=2, gold_fraction=0.5)
    read = Counter(slot.row for step in range(40) for slot in mixture.slots(step) if slot.source == "gold")
    assert read == dict.fromkeys(range(len(mixture.gold)), 2)
    assert {slot.source for slot in mixture.slots(39)} == {"corpus"}


def test_a_gold_set_with_a_teacher_is_read_where_it_is_used(
    opened: Callable[..., Mixture], other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows in the order of its cache; none is decoded before, so a gold set may be larger than memory."""
    decoded: list[int] = []
    decode = shards.decode

    def counted(table: Any, **named: Any) -> Any:
        decoded.append(table.num_rows)
        return decode(table, **named)

    monkeypatch.setattr(shards, "decode", counted)
    mixture = opened(gold_cache=other, gold_fraction=0.5, gold_fraction_of="targets")
    assert decoded == []
    reader = ShardReader(other)
    places = [(block, row) for block, size in enumerate(reader.blocks) for row in range(size)]
    assert len(mixture.gold) == len(places)
    for index, place in enumerate(places):
        (found, found_captured), (expected, captured) = mixture.gold[index], reader.row(*place)
        assert found.key == expected.key
        assert found_captured is not None
        assert torch.equal(found_captured.top.ids_NK, captured.top.ids_NK)
    found = targets_of(mixture, range(200))
    assert found["gold 0"] / found.total() == pytest.approx(0.5, abs=0.01)


def test_a_curriculum_reads_the_surest_sequences_first(opened: Callable[..., Mixture], other: Path) -> None:
    """Each cache by the entropies as they are captured, three parts of like size one after another."""
    mixture = opened(more_caches=f"[{other}]", curriculum_parts=3, gold_fraction=0, global_batch=4)
    sizes = [sum(reader.blocks) for reader in mixture.readers]
    found: dict[int, list[float]] = {0: [], 1: []}
    for step in range(sum(sizes) // 4):
        for slot in mixture.slots(step):
            captured = mixture.read(slot)[1]
            assert captured is not None
            found[slot.cache].append(float(captured.entropy_N.float().mean()))
    for entropies in found.values():
        third = len(entropies) // 3
        assert third > 1
        parts = entropies[:third], entropies[third : 2 * third], entropies[2 * third :]
        assert max(parts[0]) <= min(parts[2])
        assert sum(parts[0]) / len(parts[0]) < sum(parts[1]) / len(parts[1]) < sum(parts[2]) / len(parts[2])


def test_what_cannot_be_mixed_is_refused_before_any_rank_starts(
    student: Path, data: Path, cache: Path, teacher: Path, tmp_path: Path
) -> None:
    script("capture", *capture_arguments(teacher, data, kind="sampled", draws=5, temperatures="[1.0]"), cwd=tmp_path)
    (drawn,) = tmp_path.glob("caches/tiny-*")
    stranger = make_model(tmp_path / "stranger", make_tokenizer(lines=["quite other words"]), seed=3)
    script("capture", *capture_arguments(stranger, data, name="strange", window=96), cwd=tmp_path)
    (strange,) = tmp_path.glob("caches/strange-*")
    shutil.copytree(cache, tmp_path / "imported")
    manifest = tmp_path / "imported" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tail": "exact"', '"tail": "remainder"'))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"more_caches": f"[{drawn}]"}, "expected the same captured temperatures in all that are read together"),
        ({"gold_cache": drawn}, "expected the same captured temperatures in all that are read together"),
        (
            {"more_caches": f"[{manifest.parent}]", "curriculum_parts": 2},
            "expected caches with the teacher's entropy, found one with tail remainder",
        ),
        ({"more_caches": f"[{strange}]"}, "to have the teacher's tokenizer"),
        ({"more_caches": f"[{drawn}]", "loss.kd.temperature": 2.0}, "expected one of the captured [1.0], found 2.0"),
        ({"more_caches": f"[{drawn}]", "loss.kd.gate.keep_fraction": 0.5}, "expected 1 with more_caches, because"),
    ]
    for changes, message in cases:
        arguments = train_arguments(student, data, str(cache), runs_dir=str(tmp_path / "runs"), **changes)
        with pytest.raises(InputError, match=re.escape(message)):
            driver.run(composed("train", *arguments))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_mixed_run_stopped_and_gone_on_with_is_the_same_to_the_last_bit(
    student: Path, data: Path, cache: Path, other: Path, tmp_path: Path
) -> None:
    """Two caches by weight, a curriculum, gold by targets and used up early: the pure order is what was read."""
    changes = {"more_caches": f"[{other}]", "cache_weights": "[2,1]", "curriculum_parts": 2}
    gold = {"gold_epochs": 3, "gold_fraction_of": "targets"}
    arguments = train_arguments(student, data, str(cache), steps=120, **changes, **gold)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    script("train", *arguments, cwd=undisturbed)
    stop_at(4, arguments, tmp_path)
    done = script("train", *arguments, cwd=tmp_path)
    assert 4 <= int(re.findall(r"step (\d+) of 120", done.stderr)[0]) < 120
    run, reference = only(tmp_path / "runs"), only(undisturbed / "runs")
    assert run.name == reference.name
    assert losses_of(run) == losses_of(reference)
    for name in BIT_BY_BIT:
        assert (run / "model" / name).read_bytes() == (reference / "model" / name).read_bytes()
    identity = json.loads((run / "identity.json").read_text())
    told = [json.loads((place / "manifest.json").read_text())["fingerprint"] for place in (cache, other)]
    assert [identity["cache"], *identity["more_caches"]] == told
    assert identity["options"]["cache_weights"] == [2.0, 1.0]
    assert f"| mixed with it | {told[1]} |" in (run / "model" / "README.md").read_text()
    config = composed("train", *arguments)
    mixture = mixture_of(config)
    keys = [[int.from_bytes(mixture.read(s)[0].key[:8], "little") for s in mixture.slots(step)] for step in range(120)]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [row["sequences"] for row in rows] == [f"{sum(of_step) % 2**64:016x}" for of_step in keys]
    golds = [slot for step in range(120) for slot in mixture.slots(step) if slot.source == "gold"]
    assert len(golds) == 3 * len(mixture.gold)
