"""Held-out scores of any model: likelihood of known targets, accuracy over choices, agreement with the teacher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch

from pipeline.config.schema import EvaluateConfig
from pipeline.core.files import one_path, write_json
from pipeline.core.progress import Progress, log, start_logging
from pipeline.core.runtime import Ranks, compute_device
from pipeline.core.types import InputError, Scores
from pipeline.data.records import open_text
from pipeline.data.tokenize import Segment, collate_inputs, pack
from pipeline.evaluation.requests import Exam, Item, check_questions, open_exam, record_key, said
from pipeline.models import loading as models
from pipeline.models.forward import logits
from pipeline.models.generation import batches_of_like_length, say
from pipeline.models.prepack import laid_out

SHORTEST_WINDOW = 128  # tokens; a wider window would only add attention between segments that is masked away
HEAD_POSITIONS = 512  # positions in one pass through the head: bounds the [N, V] matrix


def run(config: EvaluateConfig) -> Scores:
    """Score a model folder; print, and write scores.json and predictions.parquet if asked."""
    start_logging()
    folder, tokenizer = models.open_tokenizer(config.model)
    longest, max_new_tokens = models.longest_sequence(folder), config.scoring.max_new_tokens
    exam = open_exam(open_text(config.text, "text"), tokenizer, longest=longest, max_new_tokens=max_new_tokens)
    check_questions([exam])
    if config.scoring.teacher_predictions is not None:
        teacher_choices(exam, config.scoring.teacher_predictions)
    model = laid_out(models.open_model(config.model, compute_device()))
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
    model: models.Model,
    exam: Exam,
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
    log_probs = _log_probs(model, exam.items, models.vocabulary_size(exam.tokenizer), batch_tokens, log_every_seconds)
    answers = _answers(model, exam, batch_tokens, log_every_seconds, ranks)
    predictions = _predictions(exam, log_probs, answers)
    if teacher_predictions is not None:
        predictions = predictions.with_columns(teacher_predicted=teacher_choices(exam, teacher_predictions))
    return _scores(predictions), predictions


def _merged(items: Sequence[Item]) -> tuple[list[Segment], list[tuple[int, int]]]:
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
    model: models.Model, items: Sequence[Item], vocabulary_size: int, batch_tokens: int, log_every_seconds: float
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
        hidden_BSH = models.hidden_states(model, input_ids_BS.to(device), position_ids_BS.to(device))
        values = _pair_log_probs(model, hidden_BSH.flatten(0, 1), flat_N.to(device), tokens_N, vocabulary_size)
        for sequence in batch:
            for segment in sequence.record_ids:
                count = len(merged[segment].targets)
                found[segment], values = values[:count], values[count:]
        progress.advance(len(batch))
    progress.close()
    return [found[host][first : first + len(item.pairs)] for item, (host, first) in zip(items, places, strict=True)]


def _pair_log_probs(
    model: models.Model, hidden_PH: torch.Tensor, flat_N: torch.Tensor, tokens_N: torch.Tensor, vocabulary_size: int
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
    model: models.Model, exam: Exam, batch_tokens: int, log_every_seconds: float, ranks: Ranks | None
) -> dict[int, tuple[str, bool]]:
    """Of each record with a question: what the model said, greedily, and whether that is what was wanted."""
    questions, found = exam.questions, {}
    progress = Progress("answer", total=len(questions), unit=" records", log_every_seconds=log_every_seconds)
    lengths = [len(question.ids) for question in questions]

    def choose(_: int, logits_BV: torch.Tensor) -> torch.Tensor:
        likeliest_B = logits_BV.argmax(dim=1)
        # at ZeRO 3 a rank that ends earlier, by a tie that it breaks otherwise, would leave the others waiting
        return likeliest_B if ranks is None else ranks.first(likeliest_B)

    for rows in batches_of_like_length(lengths, batch_tokens=batch_tokens, max_new_tokens=exam.max_new_tokens):
        asked = [questions[row] for row in rows]
        words = say(
            model,
            [torch.tensor(question.ids) for question in asked],
            choose,
            room=[exam.max_new_tokens] * len(asked),
            ends=[question.ends for question in asked],
            vocabulary_size=models.vocabulary_size(exam.tokenizer),
        )
        for question, ids in zip(asked, words, strict=True):
            answer = said(exam.tokenizer, ids)
            found[question.record_id] = (answer, answer == question.wanted)
        progress.advance(len(asked))
    progress.close()
    return found


# ----------------------------------------------------------------------------------- what came of it


def _predictions(exam: Exam, log_probs: list[list[float]], answers: dict[int, tuple[str, bool]]) -> pl.DataFrame:
    own: dict[int, list[float]] = {record.record_id: [] for record in exam.records}
    choices: dict[int, list[float]] = {record.record_id: [] for record in exam.records}
    for item, values in zip(exam.items, log_probs, strict=True):
        if item.choice is None:
            own[item.record_id] += values
        else:
            choices[item.record_id].append(sum(values))
    rows = []
    for record in exam.records:
        likelihoods = choices[record.record_id]
        predicted = likelihoods.index(max(likelihoods)) if likelihoods else None
        scored = predicted is not None and record.answer is not None
        spoken, exact = answers.get(record.record_id, (None, None))
        rows.append(
            {
                "record_id": record.record_id,
                "record_key": record_key(record),
                "answer": record.answer,
                "predicted": predicted,
                "correct": predicted == record.answer if scored else None,
                "choice_log_probs": likelihoods,
                "num_targets": len(own[record.record_id]),
                "nll_sum": -sum(own[record.record_id]),
                "said": spoken,
                "exact": exact,
            }
        )
    schema: dict[str, Any] = {
        "record_id": pl.Int64,
        "record_key": pl.Binary,
        "answer": pl.Int64,
        "predicted": pl.Int64,
        "correct": pl.Boolean,
        "choice_log_probs": pl.List(pl.Float32),
        "num_targets": pl.Int64,
        "nll_sum": pl.Float64,
        "said": pl.String,
        "exact": pl.Boolean,
    }
    return pl.DataFrame(rows, schema=schema)


def teacher_choices(exam: Exam, predictions: str) -> pl.Series:
    """The teacher's choice on each record, joined by what the record says, never by its position."""
    path = one_path(predictions, "scoring.teacher_predictions")
    teacher = pl.read_parquet(path).select("record_key", "predicted").unique("record_key")
    mine = pl.DataFrame({"record_key": [record_key(record) for record in exam.records]})
    joined = mine.join(teacher, on="record_key", how="left", maintain_order="left")["predicted"]
    asked = pl.Series([bool(record.choices) for record in exam.records])
    unknown = int((joined.is_null() & asked).sum())
    if unknown:
        raise InputError(
            f"{path}: expected the teacher's prediction for each of {len(asked)} records, found none for {unknown}; "
            "score the teacher on the same text"
        )
    return joined


def teacher_score(exam: Exam, predictions: str) -> float:
    """The teacher's score on an exam by its predictions, as `decisive` has it."""
    path = one_path(predictions, "loss.kd.overtaken.teacher_predictions")
    mine = pl.DataFrame({"record_key": [record_key(record) for record in exam.records]})
    rows = mine.join(pl.read_parquet(path).unique("record_key"), on="record_key", how="left")
    questions = {question.record_id for question in exam.questions}
    asked = pl.Series([record.record_id in questions for record in exam.records])
    unknown = int((rows["num_targets"].is_null() | (asked & rows["exact"].is_null())).sum())
    if unknown:
        raise InputError(
            f"{path}: expected the teacher's prediction for each of {len(mine)} records of dev, found none for "
            f"{unknown}; score the teacher on the same text, with scoring.max_new_tokens={exam.max_new_tokens}"
        )
    rows = rows.with_columns(exact=pl.when(asked).then(pl.col("exact")))  # what is not asked here decides nothing
    return decisive(_scores(rows))


def decisive(scores: Scores) -> float:
    """One number, more is better: accuracy over choices, else exact match if measured, else minus the nll."""
    for fraction in (scores.accuracy, scores.exact_match):
        if fraction is not None:
            return fraction
    assert scores.nll is not None
    return -scores.nll


def _scores(predictions: pl.DataFrame) -> Scores:
    num_targets = int(predictions["num_targets"].sum())
    nll = float(predictions["nll_sum"].sum()) / num_targets if num_targets else None
    with_choices = predictions.filter(pl.col("correct").is_not_null())
    agreement = None
    if "teacher_predicted" in predictions.columns:
        compared = predictions.filter(pl.col("predicted").is_not_null())
        agreement = _mean(compared["predicted"] == compared["teacher_predicted"])
    return Scores(
        num_records=predictions.height,
        num_targets=num_targets,
        nll=nll,
        perplexity=math.exp(min(nll, 700.0)) if nll is not None else None,
        num_choice_records=with_choices.height,
        accuracy=_mean(with_choices["correct"]),
        num_free_records=int(predictions["exact"].is_not_null().sum()),
        exact_match=_mean(predictions["exact"].drop_nulls()),
        agreement=agreement,
    )


def _mean(values: pl.Series) -> float | None:
    return float(values.cast(pl.Float64).mean()) if len(values) else None  # type: ignore[arg-type]
