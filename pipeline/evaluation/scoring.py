"""Held-out scores of any model: likelihood of known targets, accuracy over choices, agreement with the teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import torch

from pipeline.config.schema import EvaluateConfig
from pipeline.core.files import write_json
from pipeline.core.progress import Progress, log, start_logging
from pipeline.core.runtime import Ranks, compute_device
from pipeline.core.types import Scores
from pipeline.data.packing import Segment, collate_inputs, pack
from pipeline.data.records import open_text
from pipeline.evaluation.predictions import predictions_table, scores_of, teacher_choices
from pipeline.evaluation.requests import (
    EvaluationSet,
    LikelihoodRequest,
    check_generation_requests,
    decode_answer,
    open_evaluation_set,
)
from pipeline.models import loading as models
from pipeline.models.compatibility import max_positions
from pipeline.models.forward import HEAD_POSITIONS, Model, hidden_states, logits
from pipeline.models.generation import batches_by_length, generate
from pipeline.models.prepack import prepack
from pipeline.models.tokenizer import open_tokenizer, vocabulary_size

SHORTEST_WINDOW = 128  # tokens; a wider window would only add attention between segments that is masked away


def run(config: EvaluateConfig) -> Scores:
    """Score a model folder; print, and write scores.json and predictions.parquet if asked."""
    start_logging()
    folder, tokenizer = open_tokenizer(config.model)
    longest, max_new_tokens = max_positions(folder), config.scoring.max_new_tokens
    exam = open_evaluation_set(
        open_text(config.text, "text"), tokenizer, longest=longest, max_new_tokens=max_new_tokens
    )
    check_generation_requests([exam])
    if config.scoring.teacher_predictions is not None:
        teacher_choices(exam, config.scoring.teacher_predictions)
    model = prepack(models.open_model(config.model, compute_device()))
    scores, predictions = score(
        model,
        exam,
        batch_tokens=config.scoring.batch_tokens,
        teacher_predictions=config.scoring.teacher_predictions,
        log_every_seconds=config.log_every_seconds,
    )
    for name, value in dataclasses.asdict(scores).items():
        print(f"{name:20} {value if value is not None else '-'}")
    if config.out is not None:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        predictions.write_parquet(out / "predictions.parquet")
        write_json(out / "scores.json", dataclasses.asdict(scores))
        log.info("wrote %s and predictions.parquet beside it", out / "scores.json")
    return scores


def score(
    model: Model,
    exam: EvaluationSet,
    *,
    batch_tokens: int,
    teacher_predictions: str | None,
    log_every_seconds: float,
    ranks: Ranks | None = None,
) -> tuple[Scores, pl.DataFrame]:
    """Scores over all records, and one row a record: what was predicted and how likely everything was.

    With `ranks` all of them are here with one student, whose words are the first one's on every rank.
    """
    model.eval()
    log_probs = _log_probs(model, exam.items, vocabulary_size(exam.tokenizer), batch_tokens, log_every_seconds)
    answers = _answers(model, exam, batch_tokens, log_every_seconds, ranks)
    predictions = predictions_table(exam, log_probs, answers)
    if teacher_predictions is not None:
        predictions = predictions.with_columns(teacher_predicted=teacher_choices(exam, teacher_predictions))
    return scores_of(predictions), predictions


def _merged(items: Sequence[LikelihoodRequest]) -> tuple[list[Segment], list[tuple[int, int]]]:
    """Segments to forward, and for each item its (segment, first pair in it).

    An item whose tokens begin another item of the same record is read off that one's positions: eleven
    choices of one token each cost one forward of the prompt.
    """
    ids: list[tuple[int, ...]] = []
    pairs: list[list[tuple[int, int]]] = []
    places: dict[int, tuple[int, int]] = {}
    first_of_record, current = 0, None
    for i in sorted(range(len(items)), key=lambda i: (items[i].record_id, -len(items[i].ids))):
        item = items[i]
        if item.record_id != current:
            first_of_record, current = len(ids), item.record_id
        hosts = (j for j in range(first_of_record, len(ids)) if ids[j][: len(item.ids)] == item.ids)
        host = next(hosts, None)
        if host is None:
            host = len(ids)
            ids.append(item.ids)
            pairs.append([])
        places[i] = (host, len(pairs[host]))
        pairs[host].extend(item.pairs)
    merged = [
        Segment(record_id=j, ids=tokens, targets=tuple(wanted))
        for j, (tokens, wanted) in enumerate(zip(ids, pairs, strict=True))
    ]
    return merged, [places[i] for i in range(len(items))]


@torch.inference_mode()
def _log_probs(
    model: Model, items: Sequence[LikelihoodRequest], vocabulary_size: int, batch_tokens: int, log_every_seconds: float
) -> list[list[float]]:
    """Log-probability (nats) of every pair of every item."""
    merged, places = _merged(items)
    window = max(SHORTEST_WINDOW, max(len(segment.ids) for segment in merged))
    device = next(model.parameters()).device
    found: dict[int, list[float]] = {}
    sequences = list(pack(merged, window=window))
    progress = Progress("score", total=len(sequences), unit=" sequences", log_every_seconds=log_every_seconds)
    size = max(batch_tokens // window, 1)
    for start in range(0, len(sequences), size):
        batch = sequences[start : start + size]
        input_ids_BS, position_ids_BS, flat_N = collate_inputs(batch)
        tokens_N = torch.cat([sequence.target_ids_N for sequence in batch]).to(device)
        hidden_BSH = hidden_states(model, input_ids_BS.to(device), position_ids_BS.to(device))
        values = _pair_log_probs(model, hidden_BSH.flatten(0, 1), flat_N.to(device), tokens_N, vocabulary_size)
        for sequence in batch:
            for segment in sequence.record_ids:
                count = len(merged[segment].targets)
                found[segment], values = values[:count], values[count:]
        progress.advance(len(batch))
    progress.close()
    return [found[host][first : first + len(item.pairs)] for item, (host, first) in zip(items, places, strict=True)]


def _pair_log_probs(
    model: Model, hidden_PH: torch.Tensor, flat_N: torch.Tensor, tokens_N: torch.Tensor, vocabulary_size: int
) -> list[float]:
    """Many tokens may be asked of one position; each position goes through the head once."""
    positions_M, inverse_N = flat_N.unique(return_inverse=True)
    values_N = torch.empty(len(flat_N), dtype=torch.float32, device=flat_N.device)
    for start in range(0, len(positions_M), HEAD_POSITIONS):
        chosen_M = positions_M[start : start + HEAD_POSITIONS]
        log_q_MV = logits(model, hidden_PH[chosen_M], vocabulary_size).float().log_softmax(dim=1)
        here_N = (inverse_N >= start) & (inverse_N < start + HEAD_POSITIONS)
        values_N[here_N] = log_q_MV[inverse_N[here_N] - start, tokens_N[here_N]]
    return values_N.tolist()


@torch.inference_mode()
def _answers(
    model: Model, exam: EvaluationSet, batch_tokens: int, log_every_seconds: float, ranks: Ranks | None
) -> dict[int, tuple[str, bool]]:
    """Of each record with a question: what the model said, greedily, and whether that is what was wanted."""
    questions, found = exam.questions, {}
    progress = Progress("answer", total=len(questions), unit=" records", log_every_seconds=log_every_seconds)
    lengths = [len(question.ids) for question in questions]

    def choose(_: int, logits_BV: torch.Tensor) -> torch.Tensor:
        likeliest_B = logits_BV.argmax(dim=1)
        # at ZeRO 3 a rank that ends earlier, by a tie that it breaks otherwise, would leave the others waiting
        return likeliest_B if ranks is None else ranks.broadcast(likeliest_B)

    for rows in batches_by_length(lengths, batch_tokens=batch_tokens, max_new_tokens=exam.max_new_tokens):
        asked = [questions[row] for row in rows]
        words = generate(
            model,
            [torch.tensor(question.ids) for question in asked],
            choose,
            max_new_tokens=[exam.max_new_tokens] * len(asked),
            end_ids=[question.ends for question in asked],
            vocabulary_size=vocabulary_size(exam.tokenizer),
        )
        for question, ids in zip(asked, words, strict=True):
            answer = decode_answer(exam.tokenizer, ids)
            found[question.record_id] = (answer, answer == question.wanted)
        progress.advance(len(asked))
    progress.close()
    return found


# ----------------------------------------------------------------------------------- what came of it
