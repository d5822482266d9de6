"""How far a run trusts the teacher: its gate, its position weights, and the score that is learnt on gold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cache import manifest as manifests
from pipeline.cache.downloads import Downloads
from pipeline.cache.shards import ShardReader
from pipeline.config.schema import GateBy, TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.folds import Fold, parse_fold
from pipeline.core.object_store import Location, one_location
from pipeline.core.progress import log
from pipeline.core.types import Captured, InputError, Manifest, TokenSequence
from pipeline.data.mixture import Mixture
from pipeline.models.tokenizer import check_same_tokenizer
from pipeline.objective.gates import Gate, top_token
from pipeline.objective.trust import PositionWeight, features
from pipeline.objective.trust_fit import TrustFit, fit_trust
from pipeline.training.builders import open_gate, open_position_weight
from pipeline.training.inputs import load_trust
from pipeline.training.options_read import caches_read, gates_teacher, trust_source, weights_positions
from pipeline.training.streams import check_rows

WHAT = "loss.kd.gate.learn_on"


def open_trust(config: TrainConfig, paths: RunPaths, mixture: Mixture) -> tuple[Gate, PositionWeight | None]:
    """The gate and the position weights of a run; the learnt score is read from its folder."""
    score = None if trust_source(config) is None else load_trust(paths)
    gate = Gate()
    if gates_teacher(config):
        gate = open_gate(config.loss.kd, mixture.readers, mixture.curriculum, score)
    return gate, open_position_weight(config.loss.kd, score) if weights_positions(config) else None


def learn_trust(config: TrainConfig) -> TrustFit:
    """The score of a run, a pure function of the capture of gold; InputError where that tells nothing."""
    reader = ShardReader(
        _location(config), downloads=Downloads(folder=Path(config.downloads.dir), limit_bytes=config.downloads.bytes)
    )
    check_rows(reader, WHAT)
    fold = None if config.leave_out is None else parse_fold(config.leave_out, "leave_out")
    blocks = ([reader.row(block, row) for row in range(num)] for block, num in enumerate(reader.blocks))
    found = [_of_block(rows, fold) for rows in blocks]
    features_NF, is_right_N, records_N = (torch.cat(column) for column in zip(*found, strict=True))
    manifests_read = [manifests.load_manifest(one_location(address, what)) for what, address in caches_read(config)]
    has_entropy = all(manifest.tail == "exact" for manifest in (reader.manifest, *manifests_read))
    fit = fit_trust(features_NF, is_right_N, records_N, has_entropy=has_entropy)
    weights = zip(
        fit.score.features, fit.score.weights, fit.standard_errors, strict=False
    )  # the last error is the bias's
    log.info(
        "trust learnt on %d known targets, %d of them wrong: %s; cross-validated log-loss %.4f nats, base rate %.4f",
        *(fit.num_positions, fit.num_wrong),
        ", ".join(f"{name} {weight:+.3f} (standard error {error:.3f})" for name, weight, error in weights),
        *(fit.log_loss, fit.base_log_loss),
    )
    return fit


def _of_block(rows: Sequence[tuple[TokenSequence, Captured]], fold: Fold | None) -> tuple[Tensor, Tensor, Tensor]:
    """Features, whether the top token is right, and the record, at the known targets of some sequences.

    `fold`: the one that the run leaves out. Its labels do not reach the student through the score either, where the
    capture has the targets of the run's gold: with others its sequences have other keys, and so other folds.
    """
    captured = Captured.cat([one for _, one in rows])
    is_left_N = torch.tensor([fold is None or not fold.holds(sequence.key) for sequence, _ in rows])
    is_left_N = is_left_N.repeat_interleave(torch.tensor([len(sequence.target_ids_N) for sequence, _ in rows]))
    target_ids_N = torch.cat([sequence.target_ids_N for sequence, _ in rows])
    records_N = torch.cat([_records(sequence) for sequence, _ in rows])
    known_N = (target_ids_N >= 0) & is_left_N
    captured, target_ids_N = captured.select(known_N), target_ids_N[known_N]
    return features(captured.top, captured.entropy_N), top_token(captured.top) == target_ids_N, records_N[known_N]


def _records(sequence: TokenSequence) -> Tensor:
    """int64 [N]: the record of each supervised position."""
    ends = torch.tensor(sequence.segment_lengths).cumsum(0)
    # segments of 3 and 2 tokens end at 3 and 5: position 3 is in segment 1
    segment_N = torch.searchsorted(ends, sequence.target_positions_N.long(), right=True)
    return torch.tensor(sequence.record_ids)[segment_N]


def _location(config: TrainConfig) -> Location:
    source = trust_source(config)
    assert source is not None
    return one_location(source, WHAT)


# ------------------------------------------------------------------------------------ checks


def check_source(config: TrainConfig, folder: Path, tokenizer: Any) -> str | None:
    """The fingerprint of the capture of gold that trust is learnt on, None without; InputError where it cannot be used.

    `folder` and `tokenizer` are the student's.
    """
    if trust_source(config) is None:
        return None
    cache = _location(config)
    manifest = manifests.load_manifest(cache)
    manifests.committed_shards(cache, manifest)
    check_same_tokenizer(manifest, tokenizer, cache=str(cache), student=str(folder))
    check_measures({GateBy.learnt.name}, manifest, cache)
    for what, address in caches_read(config):
        if not is_same_teacher(manifest, manifests.load_manifest(one_location(address, what))):
            raise InputError(
                f"{WHAT}: expected a capture by the teacher of {address}, found one by another model ({cache}); "
                "capture gold with that teacher; where that is a pool, pool captures of gold by its members in the "
                "same way (scripts/pool.py)"
            )
    return manifest.fingerprint


def is_same_teacher(gold: Manifest, corpus: Manifest) -> bool:
    """Whether two caches hold distributions of one teacher, as far as they tell; of pools: made in the same way."""
    if "pool" in gold.made_of or "pool" in corpus.made_of:
        return all(gold.made_of.get(name) == corpus.made_of.get(name) for name in ("pool", "weights", "temperature"))
    own, other = (manifest.made_of.get("teacher_weights") for manifest in (gold, corpus))
    return own == other or None in (own, other)


def check_measures(measures: set[str], manifest: Manifest, cache: Location, *, k: int | None = None) -> None:
    """InputError where a measure of trust needs what a cache does not have: entropies, or two likeliest tokens.

    `k`: so many entries are read of it.
    """
    if GateBy.entropy.name in measures and manifest.tail != "exact":
        raise InputError(
            "loss.kd.gate.by, loss.kd.position_weight.by: expected a cache with the teacher's entropy, found one with "
            f"tail {manifest.tail} ({cache}), an import or a pool, which have none; use by=confidence or by=margin"
        )
    if not measures & {GateBy.margin.name, GateBy.learnt.name}:
        return
    kept = manifest.k if k is None else k
    if kept < 2:
        raise InputError(
            f"loss.kd.gate.by, loss.kd.position_weight.by: expected a cache that keeps the teacher's two most likely "
            f"tokens or more, found {manifest.kind} with k={kept} ({cache}); use by=confidence, or capture again"
        )
