"""`fit_on` of scripts/pool.py: weights from captures of gold, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.cache.manifest import load_manifest
from pipeline.config.commands import PoolConfig
from pipeline.config.schema import PoolKind
from pipeline.core.topk import log_probabilities
from pipeline.core.types import UNKNOWN_TARGET, InputError
from pipeline.data.packing import Segment, make_sequence
from pipeline.pooling.convert import run
from pipeline.pooling.fit import fit_linear
from pipeline.pooling.gold import MAX_ERROR, MIN_RECORDS, check_fit
from support.pools import Rows, captured_of, read_rows, write_rows

VOCABULARY, K = 24, 14
NUM_RECORDS, PER_RECORD, AT_ONCE = 150, 4, 10  # AT_ONCE: records of a sequence


def logits_of(seeds: tuple[int, ...], num_records: int) -> Tensor:
    """Of members that agree a little: [E, records, positions, V], as float16 stores them."""
    shape = (num_records, PER_RECORD, VOCABULARY)
    common = 3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(99))
    own = [1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    logits = common + torch.stack(own)
    return (logits - logits.amax(dim=3, keepdim=True)).half().float()


def targets_of(logits: Tensor, weights: tuple[float, ...], *, is_linear: bool = False) -> Tensor:
    """Drawn from the pool with these weights: [records, positions]."""
    weights_E = torch.tensor(weights)[:, None, None, None]
    product, mean = (weights_E * logits).sum(dim=0).softmax(dim=2), (weights_E * logits.softmax(dim=3)).sum(dim=0)
    p = mean if is_linear else product
    flat = p.flatten(0, 1).multinomial(1, generator=torch.Generator().manual_seed(5))
    return flat.view(p.shape[:2])


def write_member(cache: Path, logits: Tensor, targets: Tensor, *, begin: int = 0, **made_of: Any) -> Path:
    """One member's logits [records, positions, V] at made-up texts, each of which begins with a token of its own."""
    rows: Rows = []
    for first in range(0, len(logits), AT_ONCE):
        records = range(first, min(first + AT_ONCE, len(logits)))
        sequence = make_sequence(
            [
                Segment(
                    record_id=record,
                    ids=((record + begin) % VOCABULARY, *range(PER_RECORD)),
                    targets=tuple(enumerate(targets[record].tolist())),
                )
                for record in records
            ]
        )
        rows.append((sequence, captured_of(sequence, torch.cat([logits[record] for record in records]), k=K)))
    return write_rows(cache, rows, vocabulary_size=VOCABULARY, k=K, num_records=len(logits), **made_of)


def write_all(folder: Path, logits: Tensor, targets: Tensor, **made_of: Any) -> list[str]:
    return [
        str(write_member(folder / f"m{m}", one, targets, **({"teacher_weights": f"model {m}"} | made_of)))
        for m, one in enumerate(logits)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two members' captures of a text without known targets."""
    logits = logits_of((1, 2), 6)
    unknown = torch.full(logits.shape[1:3], UNKNOWN_TARGET)
    return write_all(tmp_path_factory.mktemp("corpus"), logits, unknown)


PLANTED = (0.9, 0.5)


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    logits = logits_of((11, 12), NUM_RECORDS)
    return write_all(tmp_path_factory.mktemp("gold"), logits, targets_of(logits, PLANTED))


def pool(folder: Path, members: list[str], **options: Any) -> Path:
    found = run(PoolConfig(name="pool", caches_dir=str(folder), members=members, **options))
    assert isinstance(found, Path)
    return found


def mean_log_likelihood(cache: Path) -> float:
    """Of the targets as the cache itself has them: one that it does not keep is the tail."""
    values = []
    for sequence, captured in read_rows(cache):
        log_p_NK, log_tail_N = log_probabilities(captured.top, temperature=1.0, dtype=torch.float64)
        is_target_NK = (captured.top.ids_NK == sequence.target_ids_N[:, None]) & (log_p_NK > -torch.inf)
        kept_N = torch.where(is_target_NK, log_p_NK, -torch.inf).amax(dim=1)
        values.append(torch.where(is_target_NK.any(dim=1), kept_N, log_tail_N))
    return float(torch.cat(values).mean())


def test_the_pool_has_the_weights_with_which_gold_was_drawn(corpus: list[str], gold: list[str], tmp_path: Path) -> None:
    """Their sum is the inverse of its temperature; all is in the manifest."""
    made_of = load_manifest(pool(tmp_path, corpus, fit_on=gold)).made_of
    fit = made_of["fit"]
    for found, error, planted in zip(fit["weights"], fit["standard_errors"], PLANTED, strict=True):
        assert abs(found - planted) < 3 * error
        assert 0 < error < MAX_ERROR
    assert 1 / made_of["temperature"] == pytest.approx(sum(fit["weights"]))
    assert [w / made_of["temperature"] for w in made_of["weights"]] == pytest.approx(fit["weights"])
    assert sum(made_of["weights"]) == pytest.approx(1.0)
    assert fit["gold"] == [load_manifest(Path(one)).fingerprint for one in gold]
    assert (fit["positions"], fit["records"]) == (NUM_RECORDS * PER_RECORD, NUM_RECORDS)
    assert fit["at_border"] == [False, False]


@pytest.mark.parametrize("kind", list(PoolKind))
def test_no_other_weights_give_gold_a_larger_likelihood(gold: list[str], tmp_path: Path, kind: PoolKind) -> None:
    """As the pool of gold itself has it, with the weights given by hand."""
    fitted = load_manifest(pool(tmp_path, gold, fit_on=gold, kind=kind)).made_of
    first, second = fitted["fit"]["weights"]
    changes = [(0.0, 0.0), (0.15, -0.15), (-0.15, 0.15)]
    if kind is PoolKind.logarithmic:  # its sum is free
        changes += [(0.15, 0.1), (-0.15, -0.1), (0.15, 0.0)]
    found = []
    for change in changes:
        a, b = first + change[0], second + change[1]
        weights = [a / (a + b), b / (a + b)]
        temperature = 1 / (a + b) if kind is PoolKind.logarithmic else 1.0
        found.append(mean_log_likelihood(pool(tmp_path, gold, weights=weights, temperature=temperature, kind=kind)))
    assert found.index(max(found)) == 0, found
    assert found[0] == pytest.approx(mean_log_likelihood(pool(tmp_path, gold, fit_on=gold, kind=kind)), abs=1e-6)


def test_the_table_has_each_member_and_the_likelihoods(
    corpus: list[str], gold: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = pool(tmp_path, corpus, fit_on=gold)
    lines = capsys.readouterr().err.partition("weights fitted on gold\n")[2].splitlines()[1:]
    for line, address, weight, member in zip(
        lines, corpus, load_manifest(cache).made_of["fit"]["weights"], gold, strict=False
    ):
        name, *values = line.split()
        assert name == address
        assert float(values[0]) == pytest.approx(weight, abs=6e-4)
        # that of all outcomes that both kept; alone a member keeps more
        assert float(values[2]) >= mean_log_likelihood(Path(member)) - 1e-3
    equal, fitted = (float(line.split()[-1]) for line in lines[2:4])
    assert equal < fitted
    assert fitted == pytest.approx(mean_log_likelihood(pool(tmp_path, gold, fit_on=gold)), abs=2e-4)
    assert lines[4] == f"{NUM_RECORDS * PER_RECORD} positions of {NUM_RECORDS} records"


def test_members_that_are_too_sure_are_flattened(tmp_path: Path) -> None:
    """Weights of a sum below 1: the temperature is above 1, though no member has captured it."""
    logits = logits_of((11, 12), NUM_RECORDS)
    members = write_all(tmp_path / "gold", logits, targets_of(logits, (0.35, 0.25)))
    cache = pool(tmp_path, members, fit_on=members)
    manifest = load_manifest(cache)
    assert manifest.made_of["temperature"] > 1.2
    assert manifest.temperatures == (1.0,)
    log_p_NK, log_tail_N = log_probabilities(read_rows(cache)[0][1].top, temperature=1.0)
    torch.testing.assert_close(log_p_NK.exp().sum(dim=1) + log_tail_N.exp(), torch.ones(len(log_tail_N)))


def test_one_member_gets_the_temperature_of_gold(tmp_path: Path) -> None:
    logits = logits_of((11,), NUM_RECORDS)
    members = write_all(tmp_path / "gold", logits, targets_of(logits, (0.6,)))
    made_of = load_manifest(pool(tmp_path, members, fit_on=members)).made_of
    (error,) = made_of["fit"]["standard_errors"]
    assert made_of["weights"] == [1.0]
    assert abs(1 / made_of["temperature"] - 0.6) < 3 * error < 0.3


def test_positions_without_a_known_target_are_left_out(tmp_path: Path) -> None:
    logits = logits_of((11, 12), NUM_RECORDS)
    targets = targets_of(logits, PLANTED)
    complete = write_all(tmp_path / "one", logits[:, :, :2], targets[:, :2].clone())
    partly = targets.clone()
    partly[:, 2:] = UNKNOWN_TARGET
    found = [
        load_manifest(pool(tmp_path, members, fit_on=members)).made_of["fit"]
        for members in (complete, write_all(tmp_path / "two", logits, partly))
    ]
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["standard_errors"] == found[1]["standard_errors"]
    assert found[1]["positions"] == 2 * NUM_RECORDS


def test_a_pool_without_fit_on_is_made_of_what_it_was_before(corpus: list[str], tmp_path: Path) -> None:
    made_of = load_manifest(pool(tmp_path, corpus)).made_of
    assert list(made_of) == ["schema_version", "pool", "members", "weights", "temperature", "tokenizer"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [0.5, 0.5]}, "fit_on: expected weights=null"),
        ({"temperature": 0.5}, "fit_on: expected temperature=1"),
        ({"fit_on": ["one"]}, "fit_on: expected 2 captures of gold"),
        ({"members": ["one"], "fit_on": ["one"], "kind": PoolKind.linear}, "two or more members in a linear pool"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    """Before a cache is opened."""
    chosen: dict[str, Any] = {"members": ["one", "two"], "fit_on": ["three", "four"]} | options
    with pytest.raises(InputError, match=message):
        run(PoolConfig(name="pool", caches_dir=str(tmp_path), **chosen))


def refused(corpus: list[str], fit_on: list[str], folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message):
        pool(folder / "pools", corpus, fit_on=fit_on, **options)
    assert not (folder / "pools").exists()


def test_other_models_and_other_texts_are_refused(corpus: list[str], gold: list[str], tmp_path: Path) -> None:
    refused(corpus, gold[::-1], tmp_path, "by the members' models in the order of members, found another model")
    refused(corpus, corpus, tmp_path, "fit_on: expected known targets, found none")
    logits = logits_of((11, 12), NUM_RECORDS)
    targets = targets_of(logits, PLANTED)
    tokenized = write_all(tmp_path / "other", logits, targets, tokenizer="another")
    refused(corpus, tokenized, tmp_path, "fit_on: expected the members' tokenizer made up, found another")
    turned = write_member(tmp_path / "turned", logits[1], targets, begin=1, teacher_weights="model 1")
    refused(corpus, [gold[0], str(turned)], tmp_path, "fit_on: expected the same sequences in the same order")


@pytest.mark.parametrize("kind", list(PoolKind))
def test_gold_that_does_not_determine_the_weights_is_refused(tmp_path: Path, kind: PoolKind) -> None:
    logits = logits_of((11, 12), MIN_RECORDS)
    targets = targets_of(logits, PLANTED)
    few = write_all(tmp_path / "few", logits[:, :-1], targets[:-1])
    refused(few, few, tmp_path, f"at least {MIN_RECORDS} records of gold, .* found {MIN_RECORDS - 1}", kind=kind)
    close = logits[0] + 0.02 * logits[1]
    alike = write_all(tmp_path / "alike", torch.stack([logits[0], close]), targets)
    refused(alike, alike, tmp_path, "errors of at most 0.25, found .* equal weights= by hand", kind=kind)


def test_a_temperature_that_gold_does_not_show_is_refused() -> None:
    """Within a factor of 2 it is known well enough; the shares have a bound of their own."""
    found = fit_linear(torch.randn(60, 2, generator=torch.Generator().manual_seed(1)), torch.arange(60))
    known = dataclasses.replace(found, share_errors=(0.2, 0.2), sum_error=0.35)
    check_fit(known)
    with pytest.raises(InputError, match=r"at most 0.35, found 0.40 .* how sharp the pool should be"):
        check_fit(dataclasses.replace(known, sum_error=0.4))
    with pytest.raises(InputError, match=r"shares .* at most 0.25, found 0.26, 0.26 .* which member is right"):
        check_fit(dataclasses.replace(known, share_errors=(0.26, 0.26)))
