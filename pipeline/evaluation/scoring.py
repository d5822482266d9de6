"""A model on held-out text: log-likelihoods, generated answers, and from them the prediction of each record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import torch

from pipeline.config.schema import EvaluateConfig
from pipeline.config.validate import at_least
from pipeline.core.files import check_writable, write_json
from pipeline.core.progress import Progress, log, start_logging
from pipeline.core.runtime import Ranks, compute_device
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

    With `ranks` all of them take part with one student, and generate the first rank's tokens.
    """
    model.eval()
    size = vocabulary_size(held_out.tokenizer)
    log_probs = _log_probs(model, held_out.likelihoods, size, batch_tokens, log_every_seconds)
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


@torch.inference_mode()
def _log_probs(
    model: Model,
    requests: Sequence[LikelihoodRequest],
    vocabulary_size: int,
    batch_tokens: int,
    log_every_seconds: float,
) -> list[list[float]]:
    """Log-probability (nats) of every target of every request."""
    segments, places = _shared_segments(requests)
    window = max(SHORTEST_WINDOW, max(len(segment.ids) for segment in segments))
    device = next(model.parameters()).device
    found: dict[int, list[float]] = {}
    sequences = list(pack(segments, window=window))
    progress = Progress("score", total=len(sequences), unit=" sequences", log_every_seconds=log_every_seconds)
    size = max(batch_tokens // window, 1)
    for start in range(0, len(sequences), size):
        batch = sequences[start : start + size]
        input_ids_BS, position_ids_BS, flat_N = collate_inputs(batch)
        tokens_N = torch.cat([sequence.target_ids_N for sequence in batch]).to(device)
        hidden_BSH = hidden_states(model, input_ids_BS.to(device), position_ids_BS.to(device))
        values = _target_log_probs(model, hidden_BSH.flatten(0, 1), flat_N.to(device), tokens_N, vocabulary_size)
        for sequence in batch:
            for segment in sequence.record_ids:
                count = len(segments[segment].targets)
                found[segment], values = values[:count], values[count:]
        progress.advance(len(batch))
    progress.close()
    return [
        found[segment][first : first + len(request.targets)]
        for request, (segment, first) in zip(requests, places, strict=True)
    ]


def _target_log_probs(
    model: Model, hidden_PH: torch.Tensor, flat_N: torch.Tensor, tokens_N: torch.Tensor, vocabulary_size: int
) -> list[float]:
    """Log-probability of each (position, token); a position with several tokens goes through the head once."""
    positions_M, inverse_N = flat_N.unique(return_inverse=True)
    values_N = torch.empty(len(flat_N), dtype=torch.float64, device=flat_N.device)
    for start in range(0, len(positions_M), HEAD_POSITIONS):
        chosen_M = positions_M[start : start + HEAD_POSITIONS]
        logits_MV = logits_float32(model, hidden_PH[chosen_M], vocabulary_size)
        log_sum_M = logits_MV.logsumexp(dim=1)
        here_N = (inverse_N >= start) & (inverse_N < start + HEAD_POSITIONS)
        rows_N = inverse_N[here_N] - start
        # in float64, because in float32 the difference would round logits to ties again
        values_N[here_N] = logits_MV[rows_N, tokens_N[here_N]].double() - log_sum_M[rows_N].double()
    return values_N.tolist()


@torch.inference_mode()
def _generate_answers(
    model: Model, held_out: EvaluationSet, batch_tokens: int, log_every_seconds: float, ranks: Ranks | None
) -> dict[int, tuple[str, bool]]:
    """By record id: the greedily generated text, and whether it equals the expected completion."""
    requests, answers = held_out.generations, dict[int, tuple[str, bool]]()
    progress = Progress("answer", total=len(requests), unit=" records", log_every_seconds=log_every_seconds)

    def choose(_: int, logits_BV: torch.Tensor) -> torch.Tensor:
        top_B = logits_BV.argmax(dim=1)
        # at ZeRO 3 a rank that ends earlier, because it breaks a tie otherwise, would leave the others waiting
        return top_B if ranks is None else ranks.broadcast(top_B)

    lengths = [len(request.ids) for request in requests]
    for rows in batches_by_length(lengths, batch_tokens=batch_tokens, max_new_tokens=held_out.max_new_tokens):
        batch = [requests[row] for row in rows]
        generated = generate(
            model,
            [torch.tensor(request.ids) for request in batch],
            choose,
            max_new_tokens=[held_out.max_new_tokens] * len(batch),
            end_ids=[request.end_ids for request in batch],
            vocabulary_size=vocabulary_size(held_out.tokenizer),
        )
        for request, ids in zip(batch, generated, strict=True):
            answer = decode_answer(held_out.tokenizer, ids)
            answers[request.record_id] = (answer, answer == request.expected)
        progress.advance(len(batch))
    progress.close()
    return answers
