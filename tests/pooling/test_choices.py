"""Pools of choices of several tokens, against brute force over whole sequences in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config.commands import PoolConfig
from pipeline.config.schema import PoolKind
from pipeline.core.topk import log_probabilities
from pipeline.core.types import Captured, InputError, TokenSequence
from pipeline.data.choice_tree import choice_segments
from pipeline.data.packing import pack
from pipeline.pooling.choices import Node, nodes_of
from pipeline.pooling.convert import run
from pipeline.pooling.fit import fit_linear
from pipeline.pooling.gold import fitted_pool
from pipeline.pooling.members import open_members, rows_of
from pipeline.pooling.rows import Pool, nodes_of_shard, pool_rows
from support.pools import Rows, captured_of, read_rows, write_rows

CHOICES = [(1, 2), (1, 3, 4), (1, 3, 5), (6,), (7, 8, 9)]
INSIDE = sorted({choice[:i] for choice in CHOICES for i in range(len(choice))})
VOCABULARY = 12


def trees(num_records: int, seed: int, *, agreement: float) -> dict[Node, Tensor]:
    """The logits [V] of a member at each node of each record, which float16 stores exactly."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    return {
        (record, path): (
            agreement * torch.randn(VOCABULARY, generator=common) + torch.randn(VOCABULARY, generator=own)
        ).half()
        for record in range(num_records)
        for path in INSIDE
    }


def log_p_of(tree: dict[Node, Tensor], node: Node) -> Tensor:
    """In fp64, as it is stored: relative to the largest logit, in float16."""
    logits_V = tree[node].float()
    return (logits_V - logits_V.max()).half().double().log_softmax(0)


def log_reach(tree: dict[Node, Tensor], node: Node) -> float:
    record, path = node
    return sum(float(log_p_of(tree, (record, path[:i]))[token]) for i, token in enumerate(path))


def sequences_of(num_records: int, *, answers: list[int] | None = None) -> list[TokenSequence]:
    """A record's segments lie in several sequences, the later ones of the tree first."""
    segments = [
        segment
        for record in range(num_records)
        for segment in choice_segments(
            (10, record), CHOICES, answer=None if answers is None else answers[record], record_id=record
        )
    ]
    return list(pack(segments, window=5))[::-1]


def member(
    cache: Path, tree: dict[Node, Tensor], sequences: list[TokenSequence], *, k: int = VOCABULARY, **made_of: str
) -> Path:
    rows: Rows = []
    for sequence in sequences:
        nodes = nodes_of(sequence)
        logits_NV = torch.stack([tree[node].float() for node in nodes])
        logits_NV = (logits_NV - logits_NV.amax(dim=1, keepdim=True)).half()
        reach_N = torch.tensor([log_reach(tree, node) for node in nodes], dtype=torch.float64).exp()
        rows.append((sequence, captured_of(sequence, logits_NV, k=k, reach_N=reach_N)))
    num_records = 1 + max(max(sequence.record_ids) for sequence in sequences)
    return write_rows(
        cache, rows, vocabulary_size=VOCABULARY, k=k, num_records=num_records, targets="choices", **made_of
    )


NUM_RECORDS = 5


@pytest.fixture
def both() -> list[dict[Node, Tensor]]:
    return [trees(NUM_RECORDS, seed, agreement=1.0) for seed in (1, 2)]


def by_node(rows: Rows) -> dict[Node, tuple[float, dict[int, float], float]]:
    """Of each node the probability of reaching it, those of the kept tokens, and of the tail."""
    found: dict[Node, tuple[float, dict[int, float], float]] = {}
    for sequence, captured in rows:
        assert captured.weights_N is not None
        log_p_NK, log_tail_N = log_probabilities(captured.top, temperature=1.0, dtype=torch.float64)
        for n, node in enumerate(nodes_of(sequence)):
            pairs = zip(captured.top.ids_NK[n].tolist(), log_p_NK[n].exp().tolist(), strict=True)
            kept = {token: p for token, p in pairs if p > 0}
            assert node not in found
            found[node] = (float(captured.weights_N[n]), kept, float(log_tail_N[n].exp()))
    return found


def pool(folder: Path, members: list[Path], **options) -> Rows:
    config = PoolConfig(name="pool", caches_dir=str(folder), members=[str(one) for one in members], **options)
    cache = run(config)
    assert isinstance(cache, Path)
    return read_rows(cache)


def test_the_nodes_of_a_record_lie_in_several_sequences() -> None:
    """Else the tests below would not show that those before a node are found."""
    sequences = sequences_of(NUM_RECORDS)
    places = {node: i for i, sequence in enumerate(sequences) for node in nodes_of(sequence)}
    assert sorted(places) == sorted((record, path) for record in range(NUM_RECORDS) for path in INSIDE)
    assert any(places[0, path] < places[0, ()] for path in INSIDE)


def test_the_linear_pool_is_the_mean_over_whole_sequences(tmp_path: Path, both: list[dict[Node, Tensor]]) -> None:
    """Every way to leave the tree is an outcome: its probability is the mean of those of the members."""
    sequences, weights = sequences_of(NUM_RECORDS), (0.3, 0.7)
    caches = [member(tmp_path / f"m{m}", tree, sequences) for m, tree in enumerate(both)]
    found = by_node(pool(tmp_path, caches, kind=PoolKind.linear, weights=list(weights)))
    for node, (reach, kept, _) in found.items():
        assert len(kept) == VOCABULARY
        for token, p in kept.items():
            expected = sum(
                w * float((log_p_of(tree, node)[token] + log_reach(tree, node)).exp())
                for w, tree in zip(weights, both, strict=True)
            )
            assert reach * p == pytest.approx(expected, rel=2e-3)
        assert (reach == 1.0) == (node[1] == ())
    for record in range(NUM_RECORDS):
        leaves = [
            reach * p
            for (r, path), (reach, kept, _) in found.items()
            if r == record
            for token, p in kept.items()
            if (*path, token) not in INSIDE
        ]
        assert sum(leaves) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize(("k", "temperature"), [(VOCABULARY, 1.0), (VOCABULARY, 0.5), (5, 1.0), (5, 0.7)])
def test_the_logarithmic_pool_reaches_a_node_by_its_own_conditionals(
    tmp_path: Path, both: list[dict[Node, Tensor]], k: int, temperature: float
) -> None:
    """Token by token: of a kept token what the pool has there, of another one the product of the members' powers."""
    sequences, weights = sequences_of(NUM_RECORDS), (0.4, 0.6)
    caches = [member(tmp_path / f"m{m}", tree, sequences, k=k) for m, tree in enumerate(both)]
    found = by_node(pool(tmp_path, caches, weights=list(weights), temperature=temperature))
    num_outside = 0
    for (record, path), (reach, _, _) in found.items():
        expected = 1.0
        for depth, token in enumerate(path):
            before = (record, path[:depth])
            log_p_EV = torch.stack([log_p_of(tree, before) for tree in both])
            is_kept_V = torch.zeros(VOCABULARY, dtype=torch.bool)
            is_kept_V[list(found[before][1])] = True
            tails_E = log_p_EV.masked_fill(is_kept_V, -torch.inf).logsumexp(dim=1)
            weights_E = torch.tensor(weights, dtype=torch.float64) / temperature
            log_tail = weights_E @ tails_E if k < VOCABULARY else -torch.inf * torch.ones((), dtype=torch.float64)
            pooled_V = weights_E @ log_p_EV
            log_z = torch.logaddexp(pooled_V[is_kept_V].logsumexp(dim=0), log_tail)
            conditional = float((pooled_V[token] - log_z).exp())
            if token in found[before][1]:
                assert found[before][1][token] == pytest.approx(conditional, rel=2e-3)
            else:
                num_outside += 1
                assert conditional <= found[before][2] * 1.002  # no more than all tokens that are not kept
            expected *= conditional
        assert reach == pytest.approx(expected, rel=1e-4)
    assert (num_outside > 0) == (k < VOCABULARY)


@pytest.mark.parametrize("kind", list(PoolKind))
def test_one_member_is_itself_bit_for_bit(tmp_path: Path, both: list[dict[Node, Tensor]], kind: PoolKind) -> None:
    cache = member(tmp_path / "m", both[0], sequences_of(NUM_RECORDS), k=5)
    for (_, pooled), (_, one) in zip(pool(tmp_path, [cache], kind=kind), read_rows(cache), strict=True):
        for of_pool, of_member in ((pooled, one), (pooled.top, one.top)):
            for field in dataclasses.fields(of_member):
                expected = getattr(of_member, field.name)
                if isinstance(expected, Tensor):
                    assert torch.equal(getattr(of_pool, field.name).nan_to_num(7), expected.nan_to_num(7)), field.name


def test_a_node_that_no_member_reaches_keeps_a_distribution(tmp_path: Path, both: list[dict[Node, Tensor]]) -> None:
    """Of very unlikely tokens the probability becomes 0 in float32."""
    for tree in both:
        for path in INSIDE:
            tree[0, path][7] = -200.0
    sequences = sequences_of(NUM_RECORDS)
    caches = [member(tmp_path / f"m{m}", tree, sequences) for m, tree in enumerate(both)]
    for kind in PoolKind:
        rows = pool(tmp_path, caches, kind=kind)
        found = by_node(rows)
        assert found[0, (7,)][0] == 0.0
        assert sum(found[0, (7,)][1].values()) == pytest.approx(1.0, abs=1e-3)
        assert found[1, (7,)][0] > 0.0


def pooled_flat(members: list[Path], temperature: float) -> list[Captured]:
    config = PoolConfig(name="x", members=[str(one) for one in members])
    opened = open_members(config.members, config.downloads)
    pooled = Pool(kind=PoolKind.logarithmic, weights=(0.5, 0.5), temperature=temperature)
    nodes = nodes_of_shard(pooled, opened, 0)
    return pool_rows(pooled, list(rows_of(opened, 0)), nodes, vocabulary_size=VOCABULARY)


def test_flattening_needs_the_tokens_of_choices_among_the_kept(tmp_path: Path, both: list[dict[Node, Tensor]]) -> None:
    sequences = sequences_of(NUM_RECORDS)
    few, all_ = (
        [member(tmp_path / f"{k}-{m}", tree, sequences, k=k) for m, tree in enumerate(both)] for k in (5, VOCABULARY)
    )
    with pytest.raises(InputError, match="expected the tokens of choices among those that all of them kept"):
        pooled_flat(few, 1.5)
    assert len(pooled_flat(all_, 1.5)) == len(sequences)


def test_a_tree_without_its_root_is_refused(tmp_path: Path, both: list[dict[Node, Tensor]]) -> None:
    sequences = [one for one in sequences_of(NUM_RECORDS) if (0, ()) not in nodes_of(one)]
    caches = [member(tmp_path / f"m{m}", tree, sequences) for m, tree in enumerate(both)]
    with pytest.raises(InputError, match="expected all nodes of the choices of record 0"):
        pool(tmp_path, caches)


def test_a_linear_pool_is_fitted_on_whole_answers(tmp_path: Path) -> None:
    """Not on the answer's tokens one by one: a mean of products is no product of means."""
    num_records = 80
    gold = [trees(num_records, seed, agreement=0.0) for seed in (1, 2)]
    answers = torch.randint(len(CHOICES), (num_records,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = sequences_of(num_records, answers=answers)
    caches = [member(tmp_path / f"m{m}", tree, sequences) for m, tree in enumerate(gold)]
    config = PoolConfig(
        name="x", members=[str(one) for one in caches], fit_on=[str(one) for one in caches], kind=PoolKind.linear
    )
    fit = fitted_pool(config, open_members(config.members, config.downloads)).fit
    assert fit is not None
    log_p_NE = torch.tensor(
        [[log_reach(tree, (record, CHOICES[answer])) for tree in gold] for record, answer in enumerate(answers)],
        dtype=torch.float64,
    )
    expected = fit_linear(log_p_NE, torch.arange(num_records))
    assert fit["weights"] == pytest.approx(expected.weights, abs=1e-4)
    assert fit["standard_errors"] == pytest.approx(expected.standard_errors, abs=2e-4)
    assert (fit["positions"], fit["records"]) == (num_records, num_records)
