"""scripts/pool.py: two captures of one corpus become one cache, which verifies and trains."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cache.manifest import load_manifest
from pipeline.cache.shards import ShardReader
from pipeline.config.commands import PoolConfig
from pipeline.config.schema import PoolKind
from pipeline.core.topk import log_probabilities
from pipeline.core.types import Captured, InputError, TokenSequence
from pipeline.pooling.convert import run
from support.commands import capture_arguments, losses_of, script, train_arguments


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, teacher: Path, student: Path, data: Path) -> tuple[Path, Path]:
    """The captures of two models with random weights: with few entries, many positions had no token in common."""
    folder = tmp_path_factory.mktemp("both")
    for name, model, k in (("one", teacher, 60), ("two", student, 70)):
        script("capture", *capture_arguments(model, data, name=name, k=k), cwd=folder)
    one, two = (next((folder / "caches").glob(f"{name}-*")) for name in ("one", "two"))
    return one, two


def pool(folder: Path, *members: Path, **options) -> Path:
    config = PoolConfig(name="pool", caches_dir=str(folder), members=[str(member) for member in members], **options)
    found = run(config)
    assert isinstance(found, Path)
    return found


def rows(cache: Path) -> list[tuple[TokenSequence, Captured]]:
    reader = ShardReader(cache)
    return [reader.row(block, row) for block, size in enumerate(reader.blocks) for row in range(size)]


def shards(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "shards").glob("*.parquet")}


def by_token(captured: Captured, n: int) -> dict[int, float]:
    """The kept tokens of a position with their probabilities."""
    log_p_NK, _ = log_probabilities(captured.top, temperature=1.0)
    pairs = zip(captured.top.ids_NK[n].tolist(), log_p_NK[n].exp().tolist(), strict=True)
    return {token: p for token, p in pairs if p > 0}  # padding has none


def test_one_member_is_copied_bit_for_bit(cache: Path, tmp_path: Path) -> None:
    """The columns; the footers name the caches."""
    contents = [
        {path.name: repr(pq.read_table(path).to_pylist()) for path in (folder / "shards").glob("*.parquet")}
        for folder in (pool(tmp_path, cache), cache)
    ]
    assert contents[0] == contents[1]  # as text, in which a NaN equals a NaN


@pytest.mark.parametrize("kind", PoolKind)
@pytest.mark.parametrize("place", [0, 1])
def test_a_member_of_weight_0_takes_nothing_away(
    kind: PoolKind, place: int, both: tuple[Path, Path], tmp_path: Path
) -> None:
    """The pool is the other member bit for bit, with all that this one kept; the manifest names both."""
    found = pool(tmp_path, *both, kind=kind, weights=[1.0 - place, float(place)])
    contents = [
        {path.name: repr(pq.read_table(path).to_pylist()) for path in (folder / "shards").glob("*.parquet")}
        for folder in (found, both[place])
    ]
    assert contents[0] == contents[1]
    manifest, expected = load_manifest(found), load_manifest(both[place])
    assert manifest.made_of["members"] == [load_manifest(member).fingerprint for member in both]
    assert (manifest.k, manifest.temperatures, manifest.tail) == (expected.k, expected.temperatures, expected.tail)


def test_the_mean_of_two_members(both: tuple[Path, Path], tmp_path: Path) -> None:
    """At each position the kept probabilities are the weighted means of the members', who both kept the token."""
    found = pool(tmp_path, *both, kind=PoolKind.linear, weights=[0.25, 0.75])
    num_checked = 0
    for (sequence, pooled), (_, one), (_, two) in zip(rows(found), rows(both[0]), rows(both[1]), strict=True):
        p_NK, tail_N = (value.exp() for value in log_probabilities(pooled.top, temperature=1.0))
        torch.testing.assert_close(p_NK.sum(dim=1) + tail_N, torch.ones(len(p_NK)))
        for n in range(len(sequence.target_ids_N)):
            of_one, of_two, of_pool = (by_token(captured, n) for captured in (one, two, pooled))
            assert of_pool.keys() == of_one.keys() & of_two.keys()
            for token, value in of_pool.items():
                assert value == pytest.approx(0.25 * of_one[token] + 0.75 * of_two[token], rel=2e-3)
                num_checked += 1
    assert num_checked > 100


def test_a_pool_verifies_and_trains_and_names_what_it_is_made_of(
    both: tuple[Path, Path], student: Path, data: Path, tmp_path: Path
) -> None:
    found = pool(tmp_path, *both, temperature=0.5)
    manifest = load_manifest(found)
    assert manifest.made_of["members"] == [load_manifest(member).fingerprint for member in both]
    assert (manifest.made_of["weights"], manifest.tail) == ([0.5, 0.5], "pooled")
    assert manifest.temperatures == (1.0, 2.0)  # the pool at 2 is what the members are at 1
    assert pool(tmp_path, *reversed(both), temperature=0.5) != found
    before = {path: path.stat().st_mtime_ns for path in found.rglob("*")}
    assert pool(tmp_path, *both, temperature=0.5) == found
    assert {path: path.stat().st_mtime_ns for path in found.rglob("*")} == before  # nothing is left to do
    script("audit", "verify", f"cache={found}", cwd=tmp_path)
    script("train", *train_arguments(student, data, str(found), steps=4), cwd=tmp_path)
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert len(losses_of(run_folder)) == 4
    assert json.loads((run_folder / "identity.json").read_text())


def test_only_a_later_round_is_named_in_the_manifest(both: tuple[Path, Path], tmp_path: Path) -> None:
    """A pool made before there were rounds keeps its fingerprint."""
    first, second = (load_manifest(pool(tmp_path, *both, round=number)).made_of for number in (1, 2))
    assert second == {**first, "round": 2}


def test_a_shard_that_is_missing_is_made_again_and_is_the_same(both: tuple[Path, Path], tmp_path: Path) -> None:
    found = pool(tmp_path, *both)
    before = shards(found)
    for name in ("00001.parquet", "00001.json"):
        (found / "shards" / name).unlink()
    pool(tmp_path, *both)
    assert shards(found) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "weights: expected 2 weights of 0 or more"),
        ({"weights": [0.5, 0.6]}, "whose sum is 1, found"),
        ({"temperature": 3.0}, "temperature: expected at most 1, or one that all members have captured, found 3.0"),
        ({"weights": [1.5, -0.5]}, "weights: expected 2 weights of 0 or more"),
        ({"temperature": 0.5, "kind": PoolKind.linear}, "temperature: expected 1 in a linear pool, found 0.5"),
        ({"temperature": 0.0}, "temperature: expected more than 0"),
    ],
)
def test_contradictions_are_refused(both: tuple[Path, Path], tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pool(tmp_path, *both, **options)
    assert not list(tmp_path.iterdir())


def test_captures_of_other_texts_are_refused(teacher: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    lines = (data / "corpus.jsonl").read_text().splitlines()
    (tmp_path / "corpus.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    arguments = capture_arguments(teacher, data, name="turned", corpus__files=f"[{tmp_path}/corpus.jsonl]")
    script("capture", *arguments, cwd=tmp_path)
    (turned,) = (tmp_path / "caches").glob("turned-*")
    with pytest.raises(InputError, match="expected the same sequences in the same order, found another row"):
        pool(tmp_path / "pools", cache, turned)
