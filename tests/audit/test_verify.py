"""verify: no wrong byte and no wrong value is missed, and each finding names its place."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.audit.verify import findings, load_manifest
from pipeline.cache.manifest import describe_shard
from pipeline.cache.shards import ShardReader
from pipeline.core.types import InputError
from support.damage import ChangeOfList, change_json, copy_cache, rewrite_first_row, without_parts


def test_a_complete_cache_has_no_finding(cache: Path, labeled_copy: Path) -> None:
    assert findings(cache) == []
    assert findings(labeled_copy) == []


def with_flipped_byte(data: bytes, generator: random.Random) -> bytes:
    at = generator.randrange(len(data))
    return data[:at] + bytes([data[at] ^ generator.randrange(1, 256)]) + data[at + 1 :]


def test_any_flipped_byte_of_a_shard_is_found_and_never_read(labeled_copy: Path) -> None:
    generator, num_blocks = random.Random(0), 0
    for shard in sorted((labeled_copy / "shards").glob("*.parquet")):
        intact = shard.read_bytes()
        for _ in range(17):
            shard.write_bytes(with_flipped_byte(intact, generator))
            assert any(line.startswith(str(shard)) for line in findings(labeled_copy))
            with pytest.raises(InputError, match="damaged"):
                ShardReader(labeled_copy).row(num_blocks, 0)
        shard.write_bytes(intact)
        num_blocks += len(describe_shard(shard, 0).row_groups)
    assert findings(labeled_copy) == []


def test_a_cache_without_hashes_of_row_groups_is_verified_by_those_of_its_shards(labeled_copy: Path) -> None:
    assert findings(without_parts(labeled_copy)) == []
    shard, *_ = sorted((labeled_copy / "shards").glob("*.parquet"))
    shard.write_bytes(with_flipped_byte(shard.read_bytes(), random.Random(0)))
    assert any(line.startswith(f"{shard}: expected sha256") for line in findings(labeled_copy))
    with pytest.raises(InputError, match="expected sha256 .* damaged"):
        ShardReader(labeled_copy).row(0, 0)


def is_found_or_refused(cache: Path) -> bool:
    try:
        return bool(findings(cache))
    except InputError as error:
        return "cannot be read" in str(error)


@pytest.mark.parametrize("name", ["manifest.json", "shards/00001.json"])
def test_any_flipped_byte_of_a_json_is_found(labeled_copy: Path, name: str) -> None:
    intact = (labeled_copy / name).read_bytes()
    for at in random.Random(0).sample(range(len(intact)), 60):
        byte = intact[at] ^ (1 if at % 2 else 2)  # most digits stay digits: the change that is hardest to find
        (labeled_copy / name).write_bytes(intact[:at] + bytes([byte]) + intact[at + 1 :])
        assert is_found_or_refused(labeled_copy), intact[max(at - 20, 0) : at + 20]
    (labeled_copy / name).write_bytes(intact)
    assert findings(labeled_copy) == []


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda c: (c / "shards/00001.parquet").write_bytes(b"PAR1"), "00001.parquet: expected a complete"),
    "no shard": (lambda c: (c / "shards/00001.parquet").unlink(), "00001.parquet: expected a planned shard"),
    "no info": (lambda c: (c / "shards/00001.json").unlink(), "00001.json: expected the ShardInfo"),
    "foreign": (lambda c: (c / "shards/notes.parquet").touch(), "notes.parquet: expected only files of planned shards"),
    "not planned": (
        lambda c: shutil.copy(c / "shards/00001.parquet", c / "shards/00003.parquet"),
        "00003.parquet: expected only files of planned shards",
    ),
    "lease": (lambda c: (c / "shards/.00001.lease").touch(), ".00001.lease: expected no lease"),
    "beside": (lambda c: (c / "notes.txt").touch(), "notes.txt: expected only files of planned shards"),
    "k": (lambda c: change_json(c / "manifest.json", k=9), "manifest.json: k: expected 8"),
    "made of": (
        lambda c: change_json(c / "manifest.json", made_of={**load_manifest(c).made_of, "corpus": "0"}),
        "manifest.json: fingerprint: expected",
    ),
    "fewer records": (lambda c: change_json(c / "manifest.json", num_records=59), "record_ids: expected 50 to 58"),
    "more records": (lambda c: change_json(c / "manifest.json", num_records=90), "00003.parquet: expected a planned"),
    "skipped": (lambda c: change_json(c / "manifest.json", num_skipped=1), "num_skipped: expected 0"),
    "vocabulary": (
        lambda c: change_json(c / "manifest.json", vocabulary_size=301),
        "vocabulary_size: expected 301",
    ),
    "unfinished": (lambda c: change_json(c / "manifest.json", num_skipped=None), "not finished"),
    "rows": (lambda c: change_json(c / "shards/00001.json", rows=1), "00001.json: rows: expected"),
    "histogram": (
        lambda c: change_json(c / "shards/00001.json", retained_mass_histogram=[0] * 10),
        "00001.json: retained_mass_histogram: expected",
    ),
    "another shard": (
        lambda c: [shutil.copy(c / f"shards/00000.{end}", c / f"shards/00001.{end}") for end in ("parquet", "json")],
        "00001.json: index: expected 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_where_it_is(cache_copy: Path, damage: str) -> None:
    do_damage, expected = DAMAGE[damage]
    do_damage(cache_copy)
    lines = findings(cache_copy)
    assert any(expected in line for line in lines), lines
    assert len(set(lines)) == len(lines)


def test_every_damage_is_listed_not_only_the_first(cache_copy: Path) -> None:
    damages = ("truncated", "foreign", "skipped")
    for damage in damages:
        DAMAGE[damage][0](cache_copy)
    lines = findings(cache_copy)
    for damage in damages:
        assert any(DAMAGE[damage][1] in line for line in lines), damage


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"k": 1}', "\udcff"])
def test_a_manifest_that_cannot_be_read_is_refused(cache_copy: Path, text: str) -> None:
    (cache_copy / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="expected a manifest, found one that cannot be read"):
        findings(cache_copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [("k", 0), ("k", "8"), ("kind", "top"), ("temperatures", []), ("vocabulary_size", 0), ("records_per_shard", 0)],
)
def test_a_manifest_with_an_impossible_value_is_refused(cache_copy: Path, field: str, value: object) -> None:
    change_json(cache_copy / "manifest.json", **{field: value})
    with pytest.raises(InputError, match=f"impossible value of {field}"):
        findings(cache_copy)


def with_first(value: object) -> ChangeOfList:
    return lambda values: [value, *values[1:]]


HALF = np.float16
WRONG_VALUES: dict[str, tuple[dict[str, ChangeOfList], str]] = {
    "input id": ({"input_ids": with_first(300)}, "input_ids: expected ids from 0 to 299"),
    "kept id": ({"topk_ids": with_first(300)}, "topk_ids: expected ids from 0 to 299"),
    "kept twice": ({"topk_ids": lambda ids: [ids[1], *ids[1:]]}, "topk_ids: expected different ids"),
    "positions fall": ({"target_positions": lambda p: p[::-1]}, "target_positions: expected ascending"),
    "position outside": ({"target_positions": lambda p: [*p[:-1], 500]}, "inside the sequence"),
    "a token": ({"input_ids": with_first(7)}, "key: expected the hash"),
    "a target": ({"target_ids": lambda t: [(t[0] + 1) % 300, *t[1:]]}, "expected the token that follows"),
    "first logit": ({"relative_logits": with_first(HALF(-1))}, "relative_logits: expected 0 first"),
    "NaN": ({"relative_logits": lambda z: [z[0], HALF("nan"), *z[2:]]}, "numbers that do not increase"),
    "rising": ({"relative_logits": lambda z: [z[0], HALF(0.5), *z[2:]]}, "numbers that do not increase"),
    "log_tail": ({"log_tail": with_first(float("nan"))}, "log_tail: expected finite"),
    "entropy": ({"entropy": with_first(HALF(9))}, "entropy: expected 0 to 5.70"),
    "positive": ({"next_log_prob": with_first(HALF(0.5))}, "next_log_prob: expected 0 or less"),
    "too likely": ({"next_log_prob": with_first(HALF(-0.001))}, "next_log_prob: expected agreement with the kept"),
    "other record": ({"record_ids": with_first(0)}, "record_ids: expected 25 to 49"),
    "same record": ({"record_ids": lambda r: [r[-1]] * len(r)}, "records: expected all 25"),
    "segments": ({"segment_lengths": lambda s: [s[0] + 1, *s[1:]]}, "segment_lengths: expected their sum"),
    "fewer entries": ({"topk_ids": lambda ids: ids[:-1]}, "topk_ids: expected one value per kept entry"),
    "fewer entropies": ({"entropy": lambda e: e[:-1]}, "entropy: expected one value per target position"),
    "other mass": ({"relative_logits": lambda z: [HALF(0)] * len(z)}, "retained_mass_histogram: expected"),
    "empty segment": (
        {"segment_lengths": lambda s: [*s, 0], "record_ids": lambda r: [*r, 30]},
        "segment_lengths: expected 1 or more",
    ),
}
ONLY_OF_TOPK = {"log_tail", "too likely", "other mass"}


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_a_wrong_value_with_the_right_hashes_is_found(labeled_copy: Path, wrong: str) -> None:
    changes, expected = WRONG_VALUES[wrong]
    if "hybrid" in labeled_copy.name and wrong in ONLY_OF_TOPK:
        changes, expected = {"log_tail": with_first(-3.0)}, "log_tail: expected -inf"
    rewrite_first_row(labeled_copy, 1, **changes)
    lines = findings(labeled_copy)
    assert any(expected in line and "00001.parquet" in line for line in lines), lines
    assert all("sha256" not in line and "00001" in line for line in lines)


def test_a_rewritten_shard_with_nothing_wrong_passes(labeled_copy: Path) -> None:
    rewrite_first_row(labeled_copy, 1)
    assert findings(labeled_copy) == []


def test_kept_counts_are_checked(labeled_caches: dict[str, Path], tmp_path: Path) -> None:
    copy = copy_cache(labeled_caches["hybrid"], tmp_path)
    rewrite_first_row(copy, 0, kept_counts=lambda counts: [counts[0] + 1, counts[1] - 1, *counts[2:]])
    assert findings(copy)
    rewrite_first_row(copy, 0, kept_counts=lambda counts: [0, counts[0] + counts[1] - 1, *counts[2:]])
    assert any("kept_counts: expected 1 to 16" in line for line in findings(copy))


def test_a_shard_of_another_cache_is_found(labeled_caches: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    copy = copy_cache(labeled_caches["topk"], tmp_path)
    for path in (cache / "shards").glob("00001.*"):
        shutil.copy(path, copy / "shards")
    assert any("00001.parquet: fingerprint: expected" in line for line in findings(copy))
