"""Shards of choices: weights and depths survive them, stay with their positions, and weight a mean entropy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.cache import manifest as manifests
from pipeline.cache.schema import decode_sequences, encode_sequences
from pipeline.cache.shards import ShardReader, shard_writer, shuffle_positions
from pipeline.config.schema import Targets, TextConfig
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import Captured, Manifest, TokenSequence
from pipeline.data.choice_tree import choice_segments
from pipeline.data.packing import Segment, make_sequence
from support.commands import config_of
from support.tiny import make_tokenizer
from support.tiny import manifest_of as planned

CHOICES = ([1, 2], [1, 3], [4, 5, 6])
Row = tuple[TokenSequence, Captured]


def row_of(number: int, *, weighted: bool = True) -> Row:
    """A record's tree (depths 0 1 | 1 2) with distributions and weights by chance."""
    sequence = make_sequence(list(choice_segments([8, 9, number], CHOICES, answer=1, record_id=number)))
    generator = torch.Generator().manual_seed(number)
    top, _, entropy_N = top_k_and_entropy(torch.randn(4, 50, generator=generator), k=3, temperatures=(1.0,))
    weights_N = torch.rand(4, generator=generator) * (sequence.depths_or_zeros() > 0) + (
        sequence.depths_or_zeros() == 0
    )
    captured = Captured(
        top=top,
        next_log_prob_N=torch.full((4,), -1.0).half(),
        entropy_N=entropy_N.half(),
        weights_N=weights_N if weighted else None,
    )
    return sequence, captured


def manifest_of(targets: Targets) -> Manifest:
    text = TextConfig(files=["x"], targets=targets)
    config = config_of(Path("x"), Path("x"), Path("x"), corpus=text, k=3, temperatures=[1.0])
    return planned(config, make_tokenizer(), 3, {})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    manifest = manifest_of(Targets.choices)
    manifests.create_cache(tmp_path, manifest)
    with shard_writer(tmp_path, manifest, 0) as writer:
        for number in range(3):
            writer.write(*row_of(number))
        writer.commit(num_skipped=0)
    return tmp_path


def test_weights_and_depths_are_columns_of_a_cache_of_choices(cache: Path) -> None:
    reader = ShardReader(cache, k=2)
    for number in range(3):
        (sequence, captured), (_, written) = reader.row(0, number), row_of(number)
        assert sequence.depths_or_zeros().tolist() == [0, 1, 1, 2]
        assert captured.weights_N is not None
        assert written.weights_N is not None
        assert torch.equal(captured.weights_N, written.weights_N)


def test_tokenized_sequences_keep_their_depths() -> None:
    plain = make_sequence([Segment(record_id=0, ids=(1, 2, 3), targets=((0, 2), (1, 3)))])
    found = decode_sequences(encode_sequences([plain, row_of(1)[0]]))
    assert [one.depths_or_zeros().tolist() for one in found] == [[0, 0], [0, 1, 1, 2]]


def test_the_mean_entropy_of_a_row_is_weighted(cache: Path) -> None:
    (means_R,) = ShardReader(cache).mean_entropies()
    for number in range(3):
        captured = row_of(number)[1]
        expected = torch.nn.functional.normalize(captured.weights_or_ones(), p=1, dim=0) @ captured.entropy_N.float()
        assert float(means_R[number]) == pytest.approx(float(expected), rel=1e-6)
        assert abs(float(expected) - float(captured.entropy_N.float().mean())) > 1e-4


def test_shuffling_moves_distributions_and_leaves_weights() -> None:
    rows = [row_of(number) for number in range(3)]
    shuffled = shuffle_positions(rows, seed=[1, 2])
    for (_, before), (_, after) in zip(rows, shuffled, strict=True):
        assert torch.equal(before.weights_or_ones(), after.weights_or_ones())
        assert (before.top.log_tail_NC != after.top.log_tail_NC).all()


def test_missing_weights_are_one_where_others_have_some() -> None:
    (_, one), (_, other) = row_of(0), row_of(1, weighted=False)
    together = Captured.cat([one, other])
    assert together.weights_or_ones().tolist() == [*one.weights_or_ones().tolist(), 1, 1, 1, 1]
    assert Captured.cat([other, other]).weights_N is None
    assert [part.weights_or_ones().sum() for part in together.split([4, 4])] == [one.weights_or_ones().sum(), 4]
