"""A run's trust in the teacher: which options need what, thresholds over whole caches, a score learnt on gold."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cache import manifest as manifests
from pipeline.cache.shards import ShardReader, shard_writer
from pipeline.config.schema import GateBy
from pipeline.config.validate_train import check_train
from pipeline.core.files import RunPaths
from pipeline.core.folds import Fold
from pipeline.core.types import Captured, InputError, Manifest, TokenSequence, TopK
from pipeline.objective.gates import reaches, top_probability, top_token
from pipeline.objective.trust import FEATURES, features
from pipeline.objective.trust_fit import fit_trust
from pipeline.training import driver
from pipeline.training.builders import open_gate
from pipeline.training.trust import check_measures, is_same_teacher, learn_trust, open_trust
from support.commands import composed, merged, mixture_of, train_arguments

Row = tuple[TokenSequence, Captured]


def rows_of(cache: Path) -> list[Row]:
    reader = ShardReader(cache)
    return [reader.row(block, row) for block, num in enumerate(reader.blocks) for row in range(num)]


def copied(cache: Path, folder: Path, change: Any, **of_manifest: Any) -> Path:
    """A cache of the same teacher with changed rows."""
    folder.mkdir(parents=True)
    before = manifests.load_manifest(cache)
    made_of = {**before.made_of, "copy": folder.name}
    manifest = dataclasses.replace(
        before,
        made_of=made_of,
        fingerprint=manifests.fingerprint(made_of),
        num_skipped=None,
        num_shards=1,
        **of_manifest,
    )
    manifests.create_cache(folder, manifest)
    with shard_writer(folder, manifest, 0) as writer:
        for row in change(rows_of(cache)):
            writer.write(*row)
        writer.commit(num_skipped=0)
    return folder


def with_targets(rows: list[Row]) -> list[Row]:
    """Known targets: where the teacher is surer than in the median, it is right but for every seventh; else wrong."""
    median = torch.cat([top_probability(captured.top) for _, captured in rows]).median()
    changed = []
    for number, (sequence, captured) in enumerate(rows):
        is_right_N = (top_probability(captured.top) > median) ^ (number % 7 == 0)
        top_N = top_token(captured.top)
        changed.append(
            (dataclasses.replace(sequence, target_ids_N=torch.where(is_right_N, top_N, top_N + 1)), captured)
        )
    return changed


@pytest.fixture(scope="module")
def gold(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of gold by the teacher of `cache`, which is right where it is sure."""
    return copied(cache, tmp_path_factory.mktemp("gold") / "gold", with_targets)


def arguments(student: Path, data: Path, cache: Path, **changes: Any) -> list[str]:
    return train_arguments(student, data, str(cache), **changes)


# ---------------------------------------------------------------------------------------- thresholds


def test_each_class_keeps_the_fraction_of_its_positions_in_all_caches(
    student: Path, data: Path, cache: Path, gold: Path
) -> None:
    """Two caches; counted one position after another. A plain gate of the same fraction drops whole classes."""
    kept_classes = {}
    for by in ("confidence", "entropy", "margin"):
        changes = {"loss__kd__gate__keep_fraction": 0.4, "loss__kd__gate__by": by, "loss__kd__gate__per_class": True}
        config = merged(arguments(student, data, cache, more_caches=f"[{gold}]", **changes))
        check_train(config)
        gate = open_gate(config.loss.kd, [ShardReader(cache), ShardReader(gold)])
        captured = [one for _, one in [*rows_of(cache), *rows_of(gold)]]
        top, entropy_N = TopK.cat([one.top for one in captured]), torch.cat([one.entropy_N for one in captured])
        assert gate.thresholds is not None
        kept_N = reaches(gate.thresholds, top, entropy_N)
        for one in top_token(top).unique().tolist():
            of_class_N = top_token(top) == one
            num = int(of_class_N.sum())
            # each position stands in both caches, so the last one kept has an equal
            assert max(round(0.4 * num), 1) <= int(kept_N[of_class_N].sum()) <= max(round(0.4 * num), 1) + 1
        kept_classes[by] = len(top_token(top)[kept_N].unique())
    assert set(kept_classes.values()) == {len(top_token(top).unique())}


def test_a_gate_by_margin_keeps_the_fraction(student: Path, data: Path, cache: Path) -> None:
    config = merged(arguments(student, data, cache, loss__kd__gate__keep_fraction=0.3, loss__kd__gate__by="margin"))
    gate = open_gate(config.loss.kd, [ShardReader(cache)])
    top = TopK.cat([captured.top for _, captured in rows_of(cache)])
    assert gate.thresholds is not None
    kept_N = reaches(gate.thresholds, top, torch.zeros(len(top.ids_NK)))
    margin_N = (top.relative_logits_NK[:, 0] - top.relative_logits_NK[:, 1]).float()
    assert int(kept_N.sum()) == pytest.approx(0.3 * len(margin_N), abs=1)
    assert margin_N[kept_N].min() >= margin_N[~kept_N].max()


# ---------------------------------------------------------------------------------------- learnt on gold


def test_trust_is_learnt_from_the_known_targets_of_a_capture(
    student: Path, data: Path, cache: Path, gold: Path
) -> None:
    config = merged(
        arguments(student, data, cache, loss__kd__position_weight__by="learnt", loss__kd__gate__learn_on=gold)
    )
    fit = learn_trust(config)
    rows = rows_of(gold)
    columns = [features(captured.top, captured.entropy_N) for _, captured in rows]
    is_right = [top_token(captured.top) == sequence.target_ids_N for sequence, captured in rows]
    segments = [torch.tensor(s.segment_lengths).cumsum(0) for s, _ in rows]
    records = [
        torch.tensor([s.record_ids[int((ends <= p).sum())] for p in s.target_positions_N.tolist()])
        for (s, _), ends in zip(rows, segments, strict=True)
    ]
    expected = fit_trust(torch.cat(columns), torch.cat(is_right), torch.cat(records), has_entropy=True)
    assert fit == expected
    assert fit.num_positions == sum(len(sequence.target_ids_N) for sequence, _ in rows)
    assert fit.score.weights[FEATURES.index("log_confidence")] > 0


def test_labels_of_the_fold_that_is_left_out_are_not_learnt_from(
    student: Path, data: Path, cache: Path, gold: Path, tmp_path: Path
) -> None:
    """The same score as of a capture without the fold; the gate's thresholds are of the corpus without it."""
    fold = Fold(number=0, of=5)
    rest = copied(gold, tmp_path / "rest", lambda rows: [row for row in rows if not fold.holds(row[0].key)])
    assert 0 < len(rows_of(rest)) < len(rows_of(gold))
    chosen = {"loss__kd__gate__keep_fraction": 0.5, "loss__kd__gate__by": "learnt", "loss__kd__gate__per_class": True}
    left_out = merged(arguments(student, data, cache, **chosen, leave_out="0/5", loss__kd__gate__learn_on=gold))
    fit = learn_trust(left_out)
    assert fit == learn_trust(merged(arguments(student, data, cache, **chosen, loss__kd__gate__learn_on=rest)))
    mixture = mixture_of(left_out)
    gate = open_gate(left_out.loss.kd, mixture.readers, mixture.curriculum, fit.score)
    expected = open_gate(left_out.loss.kd, [ShardReader(rest)], score=fit.score)  # the same sequences
    assert gate.thresholds is not None
    assert expected.thresholds is not None
    assert torch.equal(gate.thresholds.classes_L, expected.thresholds.classes_L)
    assert torch.equal(gate.thresholds.least_L, expected.thresholds.least_L)


def test_of_caches_without_entropies_the_score_reads_none(
    student: Path, data: Path, cache: Path, gold: Path, tmp_path: Path
) -> None:
    def without(rows: list[Row]) -> list[Row]:
        return [(s, dataclasses.replace(c, entropy_N=torch.full_like(c.entropy_N, torch.nan))) for s, c in rows]

    pool = copied(cache, tmp_path / "pool", without, tail="pooled")
    changes = {"loss__kd__gate__keep_fraction": 0.5, "loss__kd__gate__by": "learnt", "loss__kd__gate__learn_on": gold}
    fit = learn_trust(merged(arguments(student, data, pool, **changes)))
    assert fit.score.features == FEATURES[:3]
    gate = open_gate(merged(arguments(student, data, pool, **changes)).loss.kd, [ShardReader(pool)], score=fit.score)
    assert gate.thresholds is not None
    assert gate.thresholds.least > -torch.inf


def test_options_without_what_they_read_are_refused(
    student: Path, data: Path, cache: Path, gold: Path, tmp_path: Path
) -> None:
    other = copied(cache, tmp_path / "other", with_targets)
    path = manifests.manifest_path(other)
    changed = json.loads(path.read_text())
    changed["made_of"]["teacher_weights"] = "another model"
    changed["fingerprint"] = manifests.fingerprint(changed["made_of"])
    path.write_text(json.dumps(changed))
    unknown = copied(cache, tmp_path / "unknown", lambda rows: rows)
    learnt = {"loss__kd__position_weight__by": "learnt"}
    gated = {"loss__kd__gate__by": "learnt", "loss__kd__gate__keep_fraction": 0.5}
    smoothed = {"loss__kd__control": "smoothed"}
    cases: list[tuple[dict[str, Any], str]] = [
        (learnt, "loss.kd.position_weight.by=learnt: expected loss.kd.gate.learn_on or gold_cache"),
        (gated, "loss.kd.gate.by=learnt: expected loss.kd.gate.learn_on or gold_cache"),
        (learnt | {"loss__kd__position_weight__power": 0}, "position_weight.power: expected more than 0"),
        ({"loss__kd__gate__keep_fraction": 0.5, "more_caches": f"[{gold}]"}, "per_class=true, which reads all caches"),
        (smoothed | {"loss__kd__position_weight__by": "margin"}, "expected entropy with loss.kd.control=smoothed"),
        (smoothed | gated | {"loss__kd__gate__learn_on": gold}, "loss.kd.gate.by=learnt: expected entropy with"),
        (learnt | {"loss__kd__gate__learn_on": unknown}, "known targets or more of several records"),
    ]
    for changes, message in cases:
        config = composed("train", *arguments(student, data, cache, runs_dir=tmp_path / "runs", **changes))
        with pytest.raises(InputError, match=re.escape(message)):
            driver.prepare(config)
    config = composed("train", *arguments(student, data, cache, **learnt, loss__kd__gate__learn_on=other))
    with pytest.raises(InputError, match="expected a capture by the teacher of"):
        driver.prepare(config)


def test_trust_in_a_pool_is_learnt_on_a_pool_made_in_the_same_way(cache: Path) -> None:
    """A pool is surer than its members: a score of one of them is none of the pool."""
    manifest: Manifest = manifests.load_manifest(cache)

    def made(**of: Any) -> Manifest:
        made_of = {name: value for name, value in manifest.made_of.items() if name != "teacher_weights"}
        return dataclasses.replace(manifest, made_of={**made_of, **of})

    pool = {"pool": "logarithmic", "weights": [0.5, 0.5], "temperature": 1.0}
    assert is_same_teacher(manifest, manifest)
    assert is_same_teacher(made(), manifest)  # an import: it is not known
    assert is_same_teacher(made(**pool, members=["a"]), made(**pool, members=["b"]))
    assert not is_same_teacher(manifest, made(**pool))
    assert not is_same_teacher(made(**pool), made(**pool | {"temperature": 0.5}))
    assert not is_same_teacher(made(), made(**pool))


def test_an_empty_capture_of_gold_is_refused(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    """As of a fold of a small text."""
    empty = copied(cache, tmp_path / "empty", lambda rows: [])
    learnt = {"loss__kd__position_weight__by": "learnt", "loss__kd__gate__learn_on": empty}
    with pytest.raises(InputError, match="learn_on: expected sequences, found none"):
        driver.prepare(composed("train", *arguments(student, data, cache, runs_dir=tmp_path / "runs", **learnt)))


def test_a_study_may_weight_positions_by_learnt_trust_beside_runs_without_a_teacher(
    student: Path, data: Path, cache: Path
) -> None:
    learnt = {"loss__kd__position_weight__by": "learnt", "gold_fraction": 1.0}
    check_train(merged(arguments(student, data, cache, **learnt)))


def test_measures_need_entropies_or_two_tokens(cache: Path) -> None:
    manifest: Manifest = manifests.load_manifest(cache)
    for measures, changed, k in (
        ({"entropy"}, {"tail": "pooled"}, None),
        ({"margin"}, {"k": 1}, None),
        ({"learnt"}, {}, 1),
        ({"margin"}, {"kind": "sampled", "k": 0}, None),
    ):
        with pytest.raises(InputError, match="expected a cache"):
            check_measures(measures, dataclasses.replace(manifest, **changed), cache, k=k)
        check_measures({"confidence"}, dataclasses.replace(manifest, **changed), cache, k=k)
    check_measures({choice.name for choice in GateBy}, manifest, cache)


def test_the_capture_of_gold_makes_another_run_only_where_trust_is_learnt(
    student: Path, data: Path, cache: Path, gold: Path, tmp_path: Path
) -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        prepared = driver.prepare(composed("train", *arguments(student, data, cache, runs_dir=tmp_path, **changes)))
        assert (prepared.inputs.trust is not None) == ("learn_on" in prepared.identity)
        return prepared.identity

    plain = identity()
    assert identity(loss__kd__gate__learn_on=gold) == plain  # nothing reads it
    learnt = identity(loss__kd__position_weight__by="learnt", loss__kd__gate__learn_on=gold)
    assert learnt["learn_on"] == manifests.load_manifest(gold).fingerprint
    assert learnt["options"]["loss"]["kd"]["position_weight"] == {"by": "learnt", "power": 1.0}
    assert "position_weight" not in plain["options"]["loss"]["kd"]
    # gold_cache is where it is learnt by default
    by_default = identity(loss__kd__position_weight__by="learnt", gold_cache=gold)
    assert by_default["learn_on"] == by_default["gold_cache"] == learnt["learn_on"]


@pytest.mark.slow
def test_a_run_writes_what_it_learnt_and_trains_by_it(
    student: Path, data: Path, cache: Path, gold: Path, tmp_path: Path
) -> None:
    learnt = {"loss__kd__gate__keep_fraction": 0.6, "loss__kd__gate__by": "learnt", "loss__kd__gate__learn_on": gold}
    weighted = {"loss__kd__position_weight__by": "learnt", "loss__kd__position_weight__power": 2.0}
    losses, excluded = [], []
    for name, more in (("gated", {}), ("weighted", weighted)):
        changes = learnt | more | {"steps": 4, "runs_dir": tmp_path / name}
        config = composed("train", *arguments(student, data, cache, **changes))
        driver.run(config)
        (run,) = (tmp_path / name).iterdir()
        found = json.loads((run / "trust.json").read_text())
        assert found["log_loss"] < found["base_log_loss"]
        # what stands in the folder is what its ranks read, also after a stop
        gate, weight = open_trust(config, RunPaths(folder=run), mixture_of(config))
        assert gate.thresholds is not None
        assert gate.thresholds.score == learn_trust(config).score
        assert (weight is None) == (name == "gated")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["kd"] for row in rows])
        excluded.append(sum(row["gated_away_fraction"] for row in rows) / len(rows))
    assert losses[0][0] != losses[1][0]  # the same student at the same positions
    assert 0.2 < excluded[0] < 0.6
    assert excluded[1] < excluded[0]  # what is excluded weighs less
