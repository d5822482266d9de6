"""A capture with also_ids keeps, beside its k largest logits, exact ones at all ids that another cache kept."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.audit import commands
from pipeline.audit.verify import findings
from pipeline.cache import manifest as manifests
from pipeline.cache.shards import ShardReader, shard_writer
from pipeline.capture import driver, estimate
from pipeline.config.commands import AuditConfig, PoolConfig
from pipeline.config.schema import CaptureConfig, CompletionConfig, CompletionMode, Dtype, Kind, ModelConfig, Targets
from pipeline.config.schema import TextConfig as Text
from pipeline.config.validate import check_capture
from pipeline.core.topk import kept_ids, log_probabilities
from pipeline.core.types import Captured, InputError, TokenSequence
from pipeline.models.loading import load_model
from pipeline.models.tokenizer import vocabulary_size
from pipeline.pooling.convert import run as pool
from support.commands import config_of
from support.damage import copy_cache, rewrite_first_row
from support.tiny import prompts, write_lines

OWN_K, OTHER_K = 4, 6
Rows = list[tuple[TokenSequence, Captured]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caches:
    folder: Path
    other: Path
    """The student's capture, whose ids are kept too."""
    plain: Path
    """The teacher's capture without also_ids."""
    also: Path


def config(model: Path, folder: Path, name: str, **changes: Any) -> CaptureConfig:
    text = Text(files=[str(folder / "corpus.jsonl")], targets=Targets.all)
    return config_of(model, folder / "corpus.jsonl", folder, corpus=text, name=name, batch_sequences=4, **changes)


def capture(*arguments: Any, **changes: Any) -> Path:
    found = driver.run(config(*arguments, **changes))
    assert isinstance(found, Path)
    return found


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, teacher: Path, student: Path) -> Caches:
    folder = tmp_path_factory.mktemp("also")
    write_lines(folder / "corpus.jsonl", prompts(60, labeled=True))
    other = capture(student, folder, "other", k=OTHER_K)
    plain = capture(teacher, folder, "plain", k=OWN_K)
    also = capture(teacher, folder, "also", k=OWN_K, also_ids=str(other))
    return Caches(folder=folder, other=other, plain=plain, also=also)


def rows(cache: Path, **options: Any) -> Rows:
    reader = ShardReader(cache, **options)
    return [reader.row(block, row) for block, size in enumerate(reader.blocks) for row in range(size)]


def shards(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "shards").glob("*.parquet")}


def kept(captured: Captured, n: int) -> set[int]:
    return set(kept_ids(captured.top)[n].tolist()) - {-1}


@torch.no_grad()
def dense_logits(model: Any, sequence: TokenSequence, vocabulary: int) -> Tensor:
    """float64 [N, V]: each segment by a forward of its own."""
    parts = [
        model(input_ids=ids_S[None].long()).logits[0, :, :vocabulary]
        for ids_S in sequence.input_ids_S.split(list(sequence.segment_lengths))
    ]
    return torch.cat(parts)[sequence.target_positions_N]


def test_what_both_keep_equals_the_dense_distribution_in_fp64(caches: Caches, teacher: Path, tokenizer: Any) -> None:
    """Every id of the other cache has its probability, the rest is the tail at each temperature, and the sum is 1."""
    model = load_model(teacher, dtype="float32", device=torch.device("cpu")).double()
    num_added = 0
    for (sequence, captured), (_, other) in zip(rows(caches.also), rows(caches.other), strict=True):
        z_NV = dense_logits(model, sequence, vocabulary_size(tokenizer))
        spread = float((z_NV.amax(dim=1) - z_NV.amin(dim=1)).max())
        for T in (1.0, 2.0):
            log_p_NV = (z_NV / T).log_softmax(dim=1)
            log_p_NK, log_tail_N = log_probabilities(captured.top, temperature=T, dtype=torch.float64)
            total_N = log_p_NK.exp().sum(dim=1) + log_tail_N.exp()
            torch.testing.assert_close(total_N, torch.ones_like(total_N))
            for n in range(len(log_p_NV)):
                own = set(z_NV[n].topk(OWN_K).indices.tolist())
                assert kept(captured, n) == own | kept(other, n)
                num_added += len(kept(other, n) - own)
                ids_K, found_K = captured.top.ids_NK[n].long(), log_p_NK[n]
                is_kept_K = found_K > -torch.inf
                error_K = (found_K - log_p_NV[n, ids_K])[is_kept_K].abs()
                # float16's rounding of a relative logit, doubled by z
                assert float(error_K.max()) < spread / T / 1024 + 1e-4
                rest_V = torch.ones(len(log_p_NV[n]), dtype=torch.bool).scatter(0, ids_K, False)
                assert float(log_tail_N[n]) == pytest.approx(float(log_p_NV[n, rest_V].logsumexp(0)), abs=2e-3)
    assert num_added > 100


def test_its_k_largest_are_the_ordinary_capture(caches: Caches) -> None:
    """Bit for bit, and so are entropy and target; the tail then has the added logits as they are rounded."""
    for (sequence, narrowed), (same, plain) in zip(rows(caches.also, k=OWN_K), rows(caches.plain), strict=True):
        assert sequence.key == same.key
        assert torch.equal(narrowed.top.ids_NK, plain.top.ids_NK)
        assert torch.equal(narrowed.top.relative_logits_NK, plain.top.relative_logits_NK)
        torch.testing.assert_close(narrowed.top.log_tail_NC, plain.top.log_tail_NC, atol=2e-3, rtol=0)
        for name in ("entropy_N", "next_log_prob_N"):
            assert torch.equal(getattr(narrowed, name), getattr(plain, name))


@pytest.mark.parametrize("first", ["other", "also"])
def test_a_pool_keeps_all_ids_of_the_other_cache(caches: Caches, tmp_path: Path, first: str) -> None:
    """In either order; with the ordinary capture instead it loses some."""
    members = [caches.other, caches.also] if first == "other" else [caches.also, caches.other]
    found = pool(PoolConfig(name="pool", caches_dir=str(tmp_path), members=list(map(str, members))))
    assert isinstance(found, Path)
    assert findings(found) == []
    for (_, pooled), (_, other) in zip(rows(found), rows(caches.other), strict=True):
        assert all(kept(pooled, n) == kept(other, n) for n in range(len(pooled.entropy_N)))
    alone = pool(PoolConfig(name="alone", caches_dir=str(tmp_path), members=[str(caches.also)]))
    assert isinstance(alone, Path)
    assert findings(alone) == []
    for (_, copied), (_, also) in zip(rows(alone), rows(caches.also), strict=True):
        assert all(kept(copied, n) == kept(also, n) for n in range(len(copied.entropy_N)))


def test_it_verifies_and_replays_and_a_changed_entry_is_found(
    caches: Caches, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert findings(caches.also) == []
    model = ModelConfig(path=str(teacher), dtype=Dtype.float32, attention="sdpa")
    assert commands.run("replay", AuditConfig(cache=str(caches.also), teacher=model, rows=20)) == 0
    assert commands.run("summary", AuditConfig(cache=str(caches.also))) == 0
    changed = copy_cache(caches.also, tmp_path)
    last = int(rows(caches.also)[0][1].top.ids_NK.shape[1])
    count = len(kept(rows(changed)[0][1], 0))
    assert OWN_K < count <= last
    # the last entry of the first position, which also_ids added
    rewrite_first_row(changed, 0, topk_ids=lambda ids: [*ids[: count - 1], _unused(ids[:count]), *ids[count:]])
    assert commands.run("replay", AuditConfig(cache=str(changed), teacher=model, rows=200)) == 1
    assert "NOT CONSISTENT in kept" in capsys.readouterr().out


def _unused(ids: list[int]) -> int:
    return next(token for token in range(100, 300) if token not in ids)


def test_it_goes_on_where_it_was(caches: Caches, teacher: Path, tmp_path: Path) -> None:
    """A lost shard, captured again alone, has the same bytes; and the other cache is part of the fingerprint."""
    manifest = manifests.load_manifest(caches.also)
    fingerprint = manifests.load_manifest(caches.other).fingerprint
    assert manifest.made_of["also_ids"] == {"fingerprints": [fingerprint], "most_kept": OTHER_K}
    assert "also_ids" not in manifests.load_manifest(caches.plain).made_of
    before = shards(caches.also)
    for name in ("00001.parquet", "00001.json"):
        (caches.also / "shards" / name).unlink()
    assert capture(teacher, caches.folder, "also", k=OWN_K, also_ids=str(caches.other)) == caches.also
    assert shards(caches.also) == before


@pytest.mark.slow
def test_two_workers_write_the_same(caches: Caches, teacher: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "cache")
    found = capture(teacher, caches.folder, "w", k=OWN_K, also_ids=str(caches.other), num_workers=2, cache=place)
    for (_, one), (_, two) in zip(rows(found), rows(caches.also), strict=True):
        assert torch.equal(kept_ids(one.top), kept_ids(two.top))
        torch.testing.assert_close(one.top.log_tail_NC, two.top.log_tail_NC, atol=1e-3, rtol=0)


def part_of(cache: Path, folder: Path, part: int) -> Path:
    """A cache of the sequences whose keys are even or odd, in reversed order: a join must not rely on an order."""
    manifest = manifests.load_manifest(cache)
    made_of = {**manifest.made_of, "part": part}
    manifest = dataclasses.replace(manifest, made_of=made_of, fingerprint=manifests.fingerprint(made_of))
    place = folder / f"part-{part}"
    manifests.create_cache(place, manifest)
    reader = ShardReader(cache)
    for shard in range(manifest.num_shards):
        with shard_writer(place, manifest, shard) as writer:
            for block, row in reversed(reader.places(shard).values()):
                if reader.row(block, row)[0].key[7] % 2 == part:
                    writer.write(*reader.row(block, row))
            writer.commit(num_skipped=0)
    return place


def test_captures_of_the_parts_of_a_corpus_are_joined_by_key(caches: Caches, teacher: Path, tmp_path: Path) -> None:
    for part in (0, 1):
        part_of(caches.other, tmp_path, part)
    found = capture(teacher, caches.folder, "parts", k=OWN_K, also_ids=f"{tmp_path}/part-*")
    for (_, one), (_, two) in zip(rows(found), rows(caches.also), strict=True):
        assert torch.equal(kept_ids(one.top), kept_ids(two.top))
        assert torch.equal(one.top.log_tail_NC, two.top.log_tail_NC)
    with pytest.raises(InputError, match=r"once in .*found it 0 times"):
        capture(teacher, caches.folder, "lacking", k=OWN_K, also_ids=f"{tmp_path}/part-0")
    shutil.copytree(caches.other, tmp_path / "part-2")
    with pytest.raises(InputError, match=r"once in .*found it 2 times"):
        capture(teacher, caches.folder, "twice", k=OWN_K, also_ids=f"{tmp_path}/part-*")


def test_what_cannot_be_joined_is_refused(caches: Caches, teacher: Path, tmp_path: Path) -> None:
    other = str(caches.other)
    complete = CompletionConfig(how=CompletionMode.greedy)
    for changes in ({"kind": Kind.sampled, "temperatures": [1.0]}, {"kind": Kind.hybrid, "temperatures": [1.0]}):
        with pytest.raises(InputError, match=r"also_ids: expected kind=topk"):
            check_capture(config(teacher, caches.folder, "x", also_ids=other, **changes))
    completing = config(teacher, caches.folder, "x", also_ids=other, complete=complete)
    completing = dataclasses.replace(completing, corpus=Text(files=["x"], targets=Targets.completion))
    with pytest.raises(InputError, match=r"also_ids: expected .*complete.how=none"):
        check_capture(completing)
    for changes, found in (
        ({"records_per_shard": 30}, "records_per_shard 25"),
        ({"window": 40}, "window 48"),
        ({"corpus": Text(files=[str(caches.folder / "corpus.jsonl")], take=50)}, "num_records 60"),
    ):
        wrong = dataclasses.replace(config(teacher, caches.folder, "x", also_ids=other), **changes)
        with pytest.raises(InputError, match=f"found {found}"):
            driver.run(wrong)
    text = Text(files=[str(caches.folder / "corpus.jsonl")], targets=Targets.completion)  # other targets: other keys
    wrong = dataclasses.replace(config(teacher, caches.folder, "y", also_ids=other), corpus=text)
    with pytest.raises(InputError, match=r"also_ids: expected the sequence of record 0"):
        driver.run(wrong)
    incomplete = copy_cache(caches.other, tmp_path)
    (incomplete / "shards" / "00000.json").unlink()
    with pytest.raises(InputError, match=r"committed shards, found 2"):
        capture(teacher, caches.folder, "z", k=OWN_K, also_ids=str(incomplete))


def test_a_plan_measures_as_many_entries_as_it_can_keep(
    caches: Caches, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert estimate.run(config(teacher, caches.folder, "also", k=OWN_K, also_ids=str(caches.other))) == 0
    printed = capsys.readouterr().out
    assert "also_ids: measured with the largest number of entries that it can keep, as k=10" in printed
    assert "with kind=topk k=10." in printed


def test_no_entry_is_stored_twice(caches: Caches) -> None:
    for _, captured in rows(caches.also):
        num_entries_N = (kept_ids(captured.top) >= 0).sum(dim=1).tolist()
        assert num_entries_N == [len(kept(captured, n)) for n in range(len(num_entries_N))]
        assert min(num_entries_N) >= OTHER_K
        assert max(num_entries_N) <= OWN_K + OTHER_K
