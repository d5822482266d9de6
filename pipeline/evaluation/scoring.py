"""A model on held-out text: log-likelihoods, generated answers, and from them the prediction of each record."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import polars as pl
import torch

from pipeline.config.commands import EvaluateConfig
from pipeline.config.validate import at_least
from pipeline.core.files import check_writable, write_json
from pipeline.core.progress import Progress, log, start_logging
from pipeline.core.runtime import Ranks, compute_device
from pipeline.core.types import TokenSequence
from pipeline.core.watchdog import made_progress
from pipeline.data.packing import Segment, collate_inputs, pack
from pipeline.evaluation.few_shot import open_examples
from pipeline.evaluation.predictions import Scores, predictions_table, scores_of, teacher_choices, with_teacher
from pipeline.evaluation.requests import (
    EvaluationSet,
    LikelihoodRequest,
    check_generation_requests,
    decode_answer,
    read_evaluation_set,
)
from pipeline.models.forward import HEAD_POSITIONS, Model, hidden_states
from pipeline.models.generation import batches_by_length, generate
from pipeline.models.head_float32 import logits_float32
from pipeline.models.loading import open_model
from pipeline.models.prepack import prepack
from pipeline.models.tokenizer import open_tokenizer, vocabulary_size

B = TypeVar("B")

SHORTEST_WINDOW = 128  # tokens; a wider window would only add attention between segments that is masked away


def run(config: EvaluateConfig) -> Scores:
    """Score a model folder; print, and write scores.json and predictions.parquet if asked."""
    start_logging()
    folder, tokenizer = open_tokenizer(config.model)
    at_least(0, few_shot=config.scoring.few_shot)
    held_out = read_evaluation_set(
        config.text,
        "text",
        tokenizer,
        folder=folder,
        max_new_tokens=config.scoring.max_new_tokens,
        examples=open_examples(config.scoring, None, tokenizer),
    )
    check_generation_requests([held_out])
    if config.scoring.teacher_predictions is not None:
        teacher_choices(held_out, config.scoring.teacher_predictions)
    if config.out is not None:
        check_writable(Path(config.out), "out")
    model = prepack(open_model(config.model, compute_device()))
    scores, predictions = score(
        model,
        held_out,
        batch_tokens=config.scoring.batch_tokens,
        teacher_predictions=config.scoring.teacher_predictions,
        log_every_seconds=config.log_every_seconds,
    )
    for name, value in dataclasses.asdict(scores).items():
        print(f"{name:20} {value if value is not None else '-'}")
    if config.out is not None:
        out = Path(config.out)
        predictions.write_parquet(out / "predictions.parquet")
        write_json(out / "scores.json", dataclasses.asdict(scores))
        log.info("wrote %s and predictions.parquet beside it", out / "scores.json")
    return scores


def score(
    model: Model,
    held_out: EvaluationSet,
    *,
    batch_tokens: int,
    teacher_predictions: str | None,
    log_every_seconds: float,
    ranks: Ranks | None = None,
) -> tuple[Scores, pl.DataFrame]:
    """Scores over all records, and one row a record: what was predicted and every log-likelihood.

    With `ranks` each of them scores its part of the batches, and all get the same result. The batches do not depend on
    the number of ranks, so neither do the scores.
    """
    model.eval()
    ranks = ranks or Ranks(rank=0, world_size=1, device=model.device)
    log_probs = _log_probs(model, held_out, batch_tokens, log_every_seconds, ranks)
    generated = _generate_answers(model, held_out, batch_tokens, log_every_seconds, ranks)
    predictions = predictions_table(held_out, log_probs, generated)
    if teacher_predictions is not None:
        predictions = with_teacher(predictions, teacher_choices(held_out, teacher_predictions))
    scores = scores_of(predictions)
    if scores.num_ties:
        log.info("%d records have several choices that are equally likely: each counts in part", scores.num_ties)
    return scores, predictions


def _shared_segments(requests: Sequence[LikelihoodRequest]) -> tuple[list[Segment], list[tuple[int, int]]]:
    """Segments to forward, and for each request its (segment, place of its first target in that segment).

    A request whose tokens begin another request of the same record is read off that one's positions: eleven choices of
    one token each cost one forward of the prompt.
    """
    ids: list[tuple[int, ...]] = []
    targets: list[list[tuple[int, int]]] = []
    places: dict[int, tuple[int, int]] = {}
    first_of_record, record_id = 0, None
    # the longest request of a record first, so that shorter ones find it; then by the tokens, because the place in a
    # batch may change the last bits of a score, and the order of the choices must not
    order = sorted((request.record_id, -len(request.ids), request.ids, i) for i, request in enumerate(requests))
    for *_, i in order:
        request = requests[i]
        if request.record_id != record_id:
            first_of_record, record_id = len(ids), request.record_id
        longer = (j for j in range(first_of_record, len(ids)) if ids[j][: len(request.ids)] == request.ids)
        segment = next(longer, None)
        if segment is None:
            segment = len(ids)
            ids.append(request.ids)
            targets.append([])
        places[i] = (segment, len(targets[segment]))
        targets[segment].extend(request.targets)
    segments = [
        Segment(record_id=j, ids=tokens, targets=tuple(pairs))
        for j, (tokens, pairs) in enumerate(zip(ids, targets, strict=True))
    ]
    return segments, [places[i] for i in range(len(requests))]


def _turns(batches: Sequence[B], ranks: Ranks) -> Iterator[tuple[Sequence[B], B, bool]]:
    """Whole batches dealt to the ranks: those of a turn, the one of this rank, and whether it is this rank's own.

    Where a turn has fewer batches than there are ranks, the others repeat its last one: at ZeRO 3 all ranks have to
    make the same forwards, because each holds a part of every layer.
    """
    for first in range(0, len(batches), ranks.world_size):
        ranks.leave_if_asked()
        turn = batches[first : first + ranks.world_size]
        yield turn, turn[min(ranks.rank, len(turn) - 1)], ranks.rank < len(turn)
        made_progress()


@torch.inference_mode()
def _log_probs(
    model: Model, held_out: EvaluationSet, batch_tokens: int, log_every_seconds: float, ranks: Ranks
) -> list[list[float]]:
    """Log-probability (nats) of every target of every request, on each rank."""
    segments, places = _shared_segments(held_out.likelihoods)
    window = max(SHORTEST_WINDOW, max(len(segment.ids) for segment in segments))
    sequences, size = list(pack(segments, window=window)), max(batch_tokens // window, 1)
    batches = [sequences[start : start + size] for start in range(0, len(sequences), size)]
    num_targets = [sum(len(sequence.target_ids_N) for sequence in batch) for batch in batches]
    # each rank fills in its own batches, so that the sum over ranks is exact
    values_N = torch.zeros(sum(num_targets), dtype=torch.float64, device=ranks.device)
    parts = list(zip(batches, values_N.split(num_targets), strict=True))
    progress = Progress(
        "score",
        total=len(sequences),
        unit=" sequences",
        log_every_seconds=log_every_seconds,
        quiet=ranks.rank > 0,
    )
    for turn, (batch, part_N), is_own in _turns(parts, ranks):
        num_heads = max(_num_heads(batch) for batch, _ in turn)
        found_N = _batch_log_probs(model, batch, vocabulary_size(held_out.tokenizer), num_heads, ranks.device)
        if is_own:
            part_N.copy_(found_N)
        progress.advance(sum(len(batch) for batch, _ in turn))
    progress.close()
    values = iter(ranks.all_reduce(values_N).tolist())
    order = (segment for sequence in sequences for segment in sequence.record_ids)
    found = {segment: list(itertools.islice(values, len(segments[segment].targets))) for segment in order}
    return [
        found[segment][first : first + len(request.targets)]
        for request, (segment, first) in zip(held_out.likelihoods, places, strict=True)
    ]


def _num_heads(batch: Sequence[TokenSequence]) -> int:
    """How often the head is applied to a batch: it takes a limited number of positions at once."""
    return math.ceil(sum(len(sequence.target_positions_N.unique()) for sequence in batch) / HEAD_POSITIONS)


def _batch_log_probs(
    model: Model, batch: Sequence[TokenSequence], vocabulary_size: int, num_heads: int, device: torch.device
) -> torch.Tensor:
    """Log-probability of each target; a position with several goes through the head once.

    The head is applied `num_heads` times, in the end to no position: at ZeRO 3 as often as on the other ranks.
    """
    input_ids_BS, position_ids_BS, flat_N = collate_inputs(batch)
    tokens_N = torch.cat([sequence.target_ids_N for sequence in batch]).to(device)
    hidden_PH = hidden_states(model, input_ids_BS.to(device), position_ids_BS).flatten(0, 1)
    positions_M, inverse_N = flat_N.to(device).unique(return_inverse=True)
    values_N = torch.empty(len(flat_N), dtype=torch.float64, device=device)
    for start in range(0, num_heads * HEAD_POSITIONS, HEAD_POSITIONS):
        chosen_M = positions_M[start : start + HEAD_POSITIONS]
        logits_MV = logits_float32(model, hidden_PH[chosen_M], vocabulary_size)
        log_sum_M = logits_MV.logsumexp(dim=1)
        here_N = (inverse_N >= start) & (inverse_N < start + HEAD_POSITIONS)
        rows_N = inverse_N[here_N] - start
        # in float64, because in float32 the difference would round logits to ties again
        values_N[here_N] = logits_MV[rows_N, tokens_N[here_N]].double() - log_sum_M[rows_N].double()
    return values_N


@torch.inference_mode()
def _generate_answers(
    model: Model, held_out: EvaluationSet, batch_tokens: int, log_every_seconds: float, ranks: Ranks
) -> dict[int, tuple[str, bool]]:
    """By record id: the greedily generated text, and whether it equals the expected completion; on each rank."""
    requests, longest = held_out.generations, held_out.max_new_tokens
    # each rank fills in its own batches; ids from 1, because 0 stands after an answer's end
    ids_from_1_RT = torch.zeros(len(requests), longest, dtype=torch.int64, device=ranks.device)
    progress = Progress(
        "answer",
        total=len(requests),
        unit=" records",
        log_every_seconds=log_every_seconds,
        quiet=ranks.rank > 0,
    )

    def goes_on(is_unfinished: bool) -> bool:
        made_progress()
        return ranks.any(is_unfinished)

    lengths = [len(request.ids) for request in requests]
    batches = list(batches_by_length(lengths, batch_tokens=batch_tokens, max_new_tokens=longest))
    for turn, rows, is_own in _turns(batches, ranks):
        batch = [requests[row] for row in rows]
        generated = generate(
            model,
            [torch.tensor(request.ids) for request in batch],
            lambda _, logits_BV: logits_BV.argmax(dim=1),
            max_new_tokens=[longest] * len(batch),
            end_ids=[request.end_ids for request in batch],
            vocabulary_size=vocabulary_size(held_out.tokenizer),
            goes_on=goes_on,
        )
        for row, ids in zip(rows, generated if is_own else (), strict=is_own):
            ids_from_1_RT[row, : len(ids)] = 1 + torch.tensor(ids)
        progress.advance(sum(map(len, turn)))
    progress.close()
    answers = {}
    for request, ids_from_1 in zip(requests, ranks.all_reduce(ids_from_1_RT).tolist(), strict=True):
        answer = decode_answer(held_out.tokenizer, [i - 1 for i in ids_from_1 if i > 0])
        answers[request.record_id] = (answer, answer == request.expected)
    return answers
