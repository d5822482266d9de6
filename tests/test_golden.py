"""Values on which existing caches and runs depend: a change would give them another meaning without a word.

A change of fingerprints or of a shard's content needs a new schema version; a change of the order, a line in CHANGELOG.
Everything here is made of integers or of a few float64 operations, so that every machine finds the same values.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.cache import manifest as manifests
from pipeline.cache.shards import shard_writer
from pipeline.config.schema import (
    CaptureConfig,
    CompletionConfig,
    CompletionMode,
    Dtype,
    Kind,
    ModelConfig,
    Targets,
    TextConfig,
)
from pipeline.core.topk import uniform_draws
from pipeline.core.types import Captured, Manifest, TopK
from pipeline.data.packing import Segment, make_sequence
from pipeline.data.sampler import BatchSampler, CacheStream
from support.tiny import manifest_of as planned

HASHES = {"corpus": "c", "teacher_weights": "w", "tokenizer": "t"}


class Tokenizer(SimpleNamespace):
    """What a fingerprint reads of a tokenizer."""

    chat_template, eos_token_id = "{{ messages }}", 1

    def get_vocab(self) -> dict[str, int]:
        return {f"token {number}": number for number in range(100)}


def manifest_of(**changes: object) -> Manifest:
    teacher = ModelConfig(path="x", dtype=Dtype.float32)
    chosen = {"corpus": TextConfig(files=["x"], targets=Targets.all), "window": 16, "k": 4, **changes}
    config = CaptureConfig(name="x", teacher=teacher, **chosen)
    return planned(config, Tokenizer(), 7, HASHES)


COMPLETED = {
    "corpus": TextConfig(files=["x"], targets=Targets.completion),
    "complete": CompletionConfig(how=CompletionMode.greedy, max_new_tokens=5),
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"temperatures": [2.0, 1.0]}, "c11fc0113224aa33"),
        ({"kind": Kind.sampled, "draws": 20}, "73cb113fb61b4727"),
        ({"kind": Kind.hybrid, "draws": 8, "seed": 3}, "b810247ca521f5ea"),
        (COMPLETED, "9bc7456ce939b88a"),
    ],
    ids=["topk", "sampled", "hybrid", "completed"],
)
def test_fingerprints(changes: dict[str, object], expected: str) -> None:
    assert manifest_of(**changes).fingerprint[:16] == expected


def captured_rows(manifest: Manifest) -> list[tuple]:
    """Three sequences whose distributions are made of integers."""
    rows = []
    for number in range(3):
        ids = tuple((7 * number + 3 * i) % 100 for i in range(6))
        one = make_sequence([Segment(record_id=number, ids=ids, targets=tuple((s, ids[s + 1]) for s in range(5)))])
        places = torch.arange(5 * manifest.k).reshape(5, manifest.k)
        top = TopK(
            ids_NK=(places * 11 + number) % 100,
            relative_logits_NK=-(places % manifest.k).half() / 2,
            log_tail_NC=torch.full((5, len(manifest.temperatures)), -1.5),
            temperatures=manifest.temperatures,
        )
        scalars_N = torch.arange(5).half() / 4
        rows.append((one, Captured(top=top, next_log_prob_N=-scalars_N, entropy_N=scalars_N)))
    return rows


def test_the_content_of_a_shard(tmp_path: Path) -> None:
    manifest = manifest_of(temperatures=[1.0, 2.0])
    manifests.create_cache(tmp_path, manifest)
    with shard_writer(tmp_path, manifest, 0) as writer:
        for one, captured in captured_rows(manifest):
            writer.write(one, captured)
        writer.commit(num_skipped=1)
    info = manifests.shard_info(tmp_path, 0)
    assert info is not None
    table = pq.read_table(manifests.shard_file(tmp_path, info))
    columns = repr([(name, str(table.schema.field(name).type), table[name].to_pylist()) for name in table.column_names])
    assert hashlib.sha256(columns.encode()).hexdigest()[:16] == "3e861fa40c381203"
    assert (info.rows, info.targets, info.num_skipped) == (3, 15, 1)
    assert info.retained_mass_histogram == (0, 0, 0, 0, 0, 0, 0, 0, 0, 15)


def test_draws_of_sampled_caches() -> None:
    draws = uniform_draws(bytes(range(16)), 4, draws=5, seed=3)
    assert hashlib.sha256(draws.numpy().tobytes()).hexdigest()[:16] == "b40d93e8f12c2489"


def test_the_order_of_the_data() -> None:
    streams = (
        CacheStream(weight=Fraction(2, 3), parts=((40, 30, 20), (10, 5, 5))),
        CacheStream(weight=Fraction(1, 3), parts=((7, 9),)),
    )
    order = BatchSampler(seed=5, global_batch=8, gold_fraction=Fraction(1, 8), num_gold=6, corpora=streams, max_gold=20)
    slots = [
        (slot.source, slot.cache, slot.part, slot.block, slot.row) for step in range(60) for slot in order.slots(step)
    ]
    assert hashlib.sha256(repr(slots).encode()).hexdigest()[:16] == "87c4b2d06f7fa9ba"
