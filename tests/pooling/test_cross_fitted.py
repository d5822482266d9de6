"""Captures of single folds: what they hold, and that together they are one member of a pool."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.audit import commands as audit
from pipeline.audit.verify import findings
from pipeline.cache.manifest import committed_shards, load_manifest
from pipeline.cache.shards import ShardReader
from pipeline.capture.driver import run as capture
from pipeline.config.commands import AuditConfig, PoolConfig
from pipeline.config.schema import (
    CaptureConfig,
    CompletionConfig,
    CompletionMode,
    Dtype,
    ModelConfig,
    PoolKind,
    Targets,
    TextConfig,
)
from pipeline.config.validate import check_capture
from pipeline.core.folds import Fold
from pipeline.core.types import InputError
from pipeline.pooling.convert import run as pool
from support.tiny import LINES, write_lines

NUM_FOLDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a corpus of short records, of long ones that fill several windows, and of ones that come twice."""
    found = tmp_path_factory.mktemp("cross")
    texts = [" ".join(LINES[i % 5].split()[: 1 + i % 7]) + f" {i}" for i in range(16)]
    texts += [" ".join([f"{i}", *LINES] * 3) for i in range(2)]
    texts += ["the same record again and again, longer than half of a window"] * 3
    write_lines(found / "corpus.jsonl", [{"text": text} for text in texts])
    return found


def text(file: Path) -> TextConfig:
    return TextConfig(files=[str(file)], targets=Targets.all)


def captured(folder: Path, teacher: Path, name: str, **changes: Any) -> Path:
    """One sequence a forward: in other batches the last bit of a logit may be another."""
    config = CaptureConfig(
        name=name,
        caches_dir=str(folder / "caches"),
        teacher=ModelConfig(path=str(teacher), dtype=Dtype.float32, attention="sdpa"),
        **{"corpus": text(folder / "corpus.jsonl"), "window": 24, "k": 8, "records_per_shard": 4, **changes},
        batch_sequences=1,
    )
    found = capture(config)
    assert isinstance(found, Path)
    return found


@pytest.fixture(scope="module")
def whole(folder: Path, teacher: Path) -> Path:
    return captured(folder, teacher, "whole")


@pytest.fixture(scope="module")
def folds(folder: Path, teacher: Path) -> list[Path]:
    return [captured(folder, teacher, f"fold{j}", only_fold=f"{j}/{NUM_FOLDS}") for j in range(NUM_FOLDS)]


def pooled(out: Path, *members: str | Path, **options: Any) -> Path:
    found = pool(PoolConfig(name="pool", caches_dir=str(out), members=[str(member) for member in members], **options))
    assert isinstance(found, Path)
    return found


def contents(cache: Path) -> dict[str, str]:
    """The rows of each shard, as text, in which a NaN equals a NaN."""
    return {path.name: repr(pq.read_table(path).to_pylist()) for path in (cache / "shards").glob("*.parquet")}


def keys(cache: Path) -> list[bytes]:
    reader = ShardReader(cache)
    return [reader.row(block, row)[0].key for block, size in enumerate(reader.blocks) for row in range(size)]


def test_folds_part_a_capture(whole: Path, folds: list[Path]) -> None:
    """Each sequence is in the capture of its fold, in the plan's order; a shard may have none of them."""
    every = keys(whole)
    assert max(Counter(every).values()) > 1  # a repeated sequence is in one fold
    infos = {cache: committed_shards(cache, load_manifest(cache)) for cache in (whole, *folds)}
    for j, cache in enumerate(folds):
        assert keys(cache) == [key for key in every if Fold(number=j, of=NUM_FOLDS).holds(key)]
        assert len(infos[cache]) == len(infos[whole])
    assert any(info.rows == 0 for cache in folds for info in infos[cache])
    for of_whole, *of_folds in zip(infos[whole], *(infos[cache] for cache in folds), strict=True):
        assert sum(info.rows for info in of_folds) == of_whole.rows
        assert sum(info.targets for info in of_folds) == of_whole.targets
    made_of = [load_manifest(cache).made_of for cache in (whole, *folds)]
    assert "only_fold" not in made_of[0]
    for j, found in enumerate(made_of[1:]):
        assert found == {**made_of[0], "only_fold": f"{j}/{NUM_FOLDS}"}
    assert len({load_manifest(cache).fingerprint for cache in (whole, *folds)}) == 1 + NUM_FOLDS


def test_all_folds_by_one_model_are_its_capture_bit_for_bit(whole: Path, folds: list[Path], tmp_path: Path) -> None:
    found = pooled(tmp_path, folds[0].parent / "fold?-*")
    assert contents(found) == contents(whole)
    assert load_manifest(found).made_of["members"] == [[load_manifest(cache).fingerprint for cache in folds]]
    assert "only_fold" not in load_manifest(found).made_of
    assert findings(found) == []


def test_a_cross_fitted_student_beside_others(whole: Path, folds: list[Path], tmp_path: Path) -> None:
    """First or not: what the same model captured at once has the same pool."""
    cross = folds[0].parent / "fold?-*"
    expected = contents(pooled(tmp_path, whole, whole, kind=PoolKind.linear))
    for members in ([whole, cross], [cross, whole], [cross, cross]):
        assert contents(pooled(tmp_path, *members, kind=PoolKind.linear)) == expected


def test_a_small_text_may_have_no_sequence_in_a_fold(folder: Path, teacher: Path, tmp_path: Path) -> None:
    """As a gold set of a few windows; a text without any usable record is an error all the same."""
    write_lines(folder / "one.jsonl", [{"text": LINES[0]}])
    one = text(folder / "one.jsonl")
    expected = contents(captured(folder, teacher, "one", corpus=one))
    found = [captured(folder, teacher, f"of_one{j}", corpus=one, only_fold=f"{j}/2") for j in range(2)]
    assert sorted(len(keys(cache)) for cache in found) == [0, 1]
    assert contents(pooled(tmp_path, folder / "caches" / "of_one?-*")) == expected
    assert [findings(cache) for cache in found] == [[], []]
    write_lines(folder / "empty.jsonl", [])
    with pytest.raises(InputError, match="expected usable records, found none in"):
        captured(folder, teacher, "none", corpus=text(folder / "empty.jsonl"), only_fold="0/2")


def test_an_audit_of_one_fold(folds: list[Path], teacher: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=str(teacher), dtype=Dtype.float32, attention="sdpa")
    for cache in folds:
        assert findings(cache) == []
        for action in ("summary", "replay"):
            assert audit.run(action, AuditConfig(cache=str(cache), teacher=model, rows=3)) == 0
    other = shutil.copytree(folds[0], tmp_path / "other")
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"only_fold": "0/3"', '"only_fold": "1/3"'))
    assert any("key: expected sequences of fold 1/3" in line for line in findings(other))


def test_a_capture_of_one_fold_goes_on(folder: Path, teacher: Path, folds: list[Path]) -> None:
    """A lost shard is captured again, an orphan adopted: the same bytes."""
    shards = folds[1] / "shards"
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    sizes = {index: info.rows for index, info in enumerate(committed_shards(folds[1], load_manifest(folds[1])))}
    lost, orphan = sorted(sizes, key=lambda index: -sizes[index])[:2]
    for name in (f"{lost:05d}.parquet", f"{lost:05d}.json", f"{orphan:05d}.json"):
        (shards / name).unlink()
    assert captured(folder, teacher, "fold1", only_fold="1/3") == folds[1]
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


def test_sets_of_folds_that_do_not_fit_are_refused(
    folder: Path, teacher: Path, whole: Path, folds: list[Path], tmp_path: Path
) -> None:
    def copied(into: str, *caches: Path) -> Path:
        for cache in caches:
            shutil.copytree(cache, tmp_path / into / cache.name)
        return tmp_path / into / "*"

    other = captured(folder, teacher, "other", only_fold="2/3", k=5)
    of_two = captured(folder, teacher, "two", only_fold="0/2")
    again = shutil.copytree(folds[0], tmp_path / "again")
    cases = [
        (copied("missing", folds[0], folds[2]), "expected a capture of each of 3 folds, found none of 1/3"),
        (folds[2], "expected a capture of each of 3 folds, found none of 0/3, 1/3"),
        (copied("mixed", *folds, whole), "expected '.*' to match one capture, or one of each fold"),
        (copied("ks", *folds, of_two), r"found .*\(0/2\)"),
        (copied("twice", *folds, again), "to match one capture, or one of each fold"),
        (copied("options", *folds[:2], other), "captured with the same corpus and options, found k 8 in"),
    ]
    for address, message in cases:
        with pytest.raises(InputError, match=message):
            pooled(tmp_path / "pools", address)
    assert not (tmp_path / "pools").exists()


def test_folds_of_trees_of_choices_are_no_member(folder: Path, teacher: Path, tmp_path: Path) -> None:
    """The branches of one record's choices are sequences of several folds, each with the student of another one."""
    write_lines(folder / "prompts.jsonl", [{"prompt": " ".join(line.split()[:3])} for line in LINES])
    choices = TextConfig(files=[str(folder / "prompts.jsonl")], targets=Targets.choices, choices=["one two", "one six"])
    for j in range(2):
        captured(folder, teacher, f"tree{j}", corpus=choices, only_fold=f"{j}/2")
    with pytest.raises(InputError, match="expected captures without targets=choices for a cross-fitted student"):
        pooled(tmp_path / "pools", folder / "caches" / "tree?-*")


def test_options_that_do_not_fit_are_refused(folder: Path, teacher: Path) -> None:
    completed = {
        "corpus": TextConfig(files=["x"], targets=Targets.completion),
        "complete": CompletionConfig(how=CompletionMode.greedy),
    }
    with pytest.raises(InputError, match="only_fold=0/3: expected complete.how=none, because the key"):
        check_capture(CaptureConfig(name="x", only_fold="0/3", **completed))
    with pytest.raises(InputError, match="only_fold: expected j/k, fold j"):
        check_capture(CaptureConfig(name="x", only_fold="3/3"))


def test_a_cache_names_its_fold(folds: list[Path]) -> None:
    """Also in the footer, from which an orphan is adopted: where each row stands among all."""
    found = sorted(
        (index, place)
        for cache in folds
        for index, path in enumerate(sorted((cache / "shards").glob("*.parquet")))
        for place in json.loads(pq.read_metadata(path).metadata[b"plan_rows"])
    )
    num_shards = load_manifest(folds[0]).num_shards
    counts = Counter(index for index, _ in found)
    assert found == [(index, place) for index in range(num_shards) for place in range(counts[index])]
