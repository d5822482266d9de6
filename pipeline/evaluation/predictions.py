"""Per-record predictions -> scores; the teacher's predictions joined to a student's by record."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from pipeline.core.files import one_path
from pipeline.core.types import InputError, Scores
from pipeline.evaluation.requests import EvaluationSet, record_key


def predictions_table(
    exam: EvaluationSet, log_probs: list[list[float]], answers: dict[int, tuple[str, bool]]
) -> pl.DataFrame:
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
                "generated": spoken,
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
        "generated": pl.String,
        "exact": pl.Boolean,
    }
    return pl.DataFrame(rows, schema=schema)


def teacher_choices(exam: EvaluationSet, predictions: str) -> pl.Series:
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


def teacher_score(exam: EvaluationSet, predictions: str) -> float:
    """The teacher's score on an exam by its predictions, as `decisive` has it."""
    path = one_path(predictions, "loss.kd.adaptive_weight.teacher_predictions")
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
    return main_score(scores_of(rows))


def main_score(scores: Scores) -> float:
    """One number, more is better: accuracy over choices, else exact match if measured, else minus the nll."""
    for fraction in (scores.accuracy, scores.exact_match):
        if fraction is not None:
            return fraction
    assert scores.nll is not None
    return -scores.nll


def scores_of(predictions: pl.DataFrame) -> Scores:
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
