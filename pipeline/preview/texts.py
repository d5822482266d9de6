"""What a preview reads: corpus with the teacher's distributions, gold and dev, as sequences with one position a record.

The outcomes of a position are few: the tokens that hold nearly all of the teacher's probability, and last one for all
other tokens together. In this package C counts the outcomes with that last one, and D held-out records.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cache.downloads import Downloads
from pipeline.cache.shards import ShardReader
from pipeline.config.commands import PreviewConfig
from pipeline.config.schema import TextConfig
from pipeline.config.study import Study
from pipeline.core.object_store import Location
from pipeline.core.topk import log_probabilities
from pipeline.core.types import UNKNOWN_TARGET, Captured, InputError, TokenSequence, TopK
from pipeline.data.packing import Segment, pack
from pipeline.data.text_files import open_text
from pipeline.data.tokenize import load_labeled_sequences, text_hash
from pipeline.evaluation.requests import EvaluationSet, LikelihoodRequest, held_out_hash, read_evaluation_set

OUTCOME_MASS = 0.999  # of the teacher's probability, on average over positions, that the outcomes have to hold
MAX_OUTCOMES = 256
LOG_FLOOR = math.log(1e-12)  # of an outcome that the cache does not keep at a position
SCOPE = "a preview reads records with one supervised position each and few outcomes: targets=next, choices of one token"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """A sample of a cache: N records."""

    sequences: Sequence[TokenSequence]
    top: TopK
    """The teacher at the N supervised positions."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """A held-out text of D records, in the order of its positions in `sequences`."""

    sequences: Sequence[TokenSequence]
    choice_ids: Sequence[tuple[int, ...]]
    """Of each record the token of each choice."""
    answers: Sequence[int]
    """Of each record the index of the correct choice."""


# ------------------------------------------------------------------------------------------- reading


def read_corpus(config: PreviewConfig, cache: Location) -> Corpus:
    """Evenly spaced sequences of a cache with together about `max_records` records."""
    downloads = Downloads(folder=Path(config.downloads.dir), limit_bytes=config.downloads.bytes)
    reader = ShardReader(cache, downloads=downloads)
    size = sum(reader.blocks)
    count = min(size, max(math.ceil(config.max_records / reader.mean_targets), 1))
    rows = [reader.at(place * size // count) for place in range(count)]
    captured = Captured.cat([one for _, one in rows])
    if "complete" in reader.manifest.made_of or not (captured.weights_or_ones() == 1).all():
        raise InputError(f"{cache}: {SCOPE}; found completions, or choices of several tokens; train to compare recipes")
    sequences = [sequence for sequence, _ in rows]
    check_one_position(sequences, str(cache))
    return Corpus(sequences=sequences, top=captured.top)


def read_gold(config: TextConfig, tokenizer: Any, *, window: int) -> list[TokenSequence]:
    """The gold set as training packs it."""
    sequences = load_labeled_sequences(open_text(config, "gold"), tokenizer, window=window)
    check_one_position(sequences, "gold")
    return sequences


def read_dev(config: TextConfig, tokenizer: Any, *, folder: Path, window: int) -> HeldOut:
    """The held-out text with the choices as scoring reads them; `folder` is the student's."""
    held_out = read_evaluation_set(config, "dev", tokenizer, folder=folder, max_new_tokens=0)
    by_record = _choices(held_out)
    parts = [
        Segment(record_id=row, ids=requests[0].ids, targets=((len(requests[0].ids) - 1, UNKNOWN_TARGET),))
        for row, requests in enumerate(by_record)
    ]
    sequences = list(pack(parts, window=max(window, max(len(part.ids) for part in parts))))
    order = [row for sequence in sequences for row in sequence.record_ids]
    choice_ids = [tuple(request.targets[0][1] for request in requests) for requests in by_record]
    answers = [record.answer for record in held_out.records if record.answer is not None]
    return HeldOut(
        sequences=sequences,
        choice_ids=[choice_ids[row] for row in order],
        answers=[answers[row] for row in order],
    )


def _choices(held_out: EvaluationSet) -> list[list[LikelihoodRequest]]:
    """Of each record the requests of its choices; InputError unless each is one token and the answer is known."""
    found: dict[int, list[LikelihoodRequest]] = {record.record_id: [] for record in held_out.records}
    for request in held_out.likelihoods:
        if request.choice is not None:
            found[request.record_id].append(request)
    for record in held_out.records:
        requests = found[record.record_id]
        if not requests or record.answer is None or any(len(request.targets) > 1 for request in requests):
            raise InputError(
                f"{record.where}: {SCOPE}; expected choices of one token and the answer, found other ones; give dev "
                "such (end_token=false, because an end token is one more), or train to compare recipes"
            )
    return list(found.values())


def check_one_position(sequences: Sequence[TokenSequence], what: str) -> None:
    """InputError unless each record of packed sequences has one supervised position."""
    for sequence in sequences:
        ends = torch.tensor(list(itertools.accumulate(sequence.segment_lengths)))
        segments_N = torch.searchsorted(ends, sequence.target_positions_N, right=True)
        if segments_N.tolist() != list(range(len(ends))):
            raise InputError(
                f"{what}: {SCOPE}; found {len(segments_N)} supervised positions in {len(ends)} records; use "
                "targets=next for the corpus and answers of one token with end_token=false, or train to compare recipes"
            )


# ------------------------------------------------------------------------------------------ outcomes


def choose_outcomes(top: TopK, required: Sequence[int], *, vocabulary_size: int) -> Tensor:
    """int64, ascending: the fewest tokens that hold OUTCOME_MASS of the teacher's probability, and those `required`.

    InputError where these are more than MAX_OUTCOMES, or where the kept entries do not hold so much.
    """
    log_p_NK, _ = log_probabilities(top, temperature=1.0, dtype=torch.float64)
    mass_V = torch.zeros(vocabulary_size, dtype=torch.float64)
    mass_V.index_add_(0, top.ids_NK.flatten().long(), log_p_NK.exp().flatten())
    sorted_V, ids_V = mass_V.sort(descending=True, stable=True)
    total_V = sorted_V.cumsum(0) / len(top.ids_NK)
    count = int((total_V < OUTCOME_MASS).sum()) + 1
    ids = sorted({*ids_V[:count].tolist(), *required})
    if count > vocabulary_size or len(ids) > MAX_OUTCOMES:
        raise InputError(
            f"cache: {SCOPE}; expected at most {MAX_OUTCOMES} tokens with {OUTCOME_MASS:.1%} of the teacher's "
            f"probability, found {total_V[MAX_OUTCOMES - 1 : MAX_OUTCOMES].sum():.1%} on the {MAX_OUTCOMES} likeliest; "
            "train to compare recipes"
        )
    return torch.tensor(ids)


def outcome_log_probs(top: TopK, outcome_ids: Tensor) -> Tensor:
    """float64 [N, C], nats: the teacher's log-probability of each outcome, and in the last column of all other tokens.

    A token that is not kept at a position counts among the others there, and has the least probability itself.
    """
    log_p_NK, _ = log_probabilities(top, temperature=1.0, dtype=torch.float64)
    places_NK = torch.searchsorted(outcome_ids, top.ids_NK.long().contiguous()).clamp(max=len(outcome_ids) - 1)
    is_outcome_NK = (outcome_ids[places_NK] == top.ids_NK) & (top.relative_logits_NK > -torch.inf)
    columns_NK = torch.where(is_outcome_NK, places_NK, len(outcome_ids))
    p_NC = torch.zeros(len(log_p_NK), len(outcome_ids) + 1, dtype=torch.float64)
    p_NC.scatter_add_(1, columns_NK, torch.where(is_outcome_NK, log_p_NK.exp(), 0.0))
    p_NC[:, -1] = (1 - p_NC[:, :-1].sum(dim=1)).clamp(min=0)
    return p_NC.log().clamp(min=LOG_FLOOR).log_softmax(dim=1)


def columns_of(ids: Sequence[int], outcome_ids: Tensor) -> Tensor:
    """int64: the column of each token among the outcomes, which have to contain it."""
    columns = torch.searchsorted(outcome_ids, torch.tensor(ids))
    assert (outcome_ids[columns] == torch.tensor(ids)).all()
    return columns


def sequence_of_records(sequences: Sequence[TokenSequence]) -> list[bytes]:
    """The key of its sequence for each record, in order."""
    return [sequence.key for sequence in sequences for _ in sequence.segment_lengths]


# ------------------------------------------------------------------------------------- finished runs


def gold_only_on_dev(study: Study) -> float | None:
    """The best accuracy on dev of the study's gold_only runs, of gold and dev as they are now; None without.

    A label curve has runs of the same name, which learn the ceiling's labels: these tell nothing about gold.
    """
    if study.file.dev is None:
        return None
    gold, text = text_hash(open_text(study.file.gold, "gold")), held_out_hash(study.file.dev, "dev")
    found = []
    for result in Path(study.file.runs_dir).glob("gold_only-*/result.json"):
        dev = json.loads(result.read_text()).get("dev")
        learnt = json.loads((result.parent / "identity.json").read_text()).get("gold")
        if dev is not None and dev["accuracy"] is not None and (learnt, dev["text"]) == (gold, text):
            found.append(dev["accuracy"])
    return max(found, default=None)
