"""Tables of predictions -> scores; the teacher's predictions joined to a student's by record."""

from __future__ import annotations

import math

import polars as pl

from pipeline.core.files import one_path
from pipeline.core.types import InputError, Scores
from pipeline.evaluation.requests import EvaluationSet, record_key


def teacher_choices(held_out: EvaluationSet, predictions: str) -> pl.Series:
    """The teacher's choice on each record, joined by the record's content, never by its position."""
    path = one_path(predictions, "scoring.teacher_predictions")
    teacher = pl.read_parquet(path).select("record_key", "predicted").unique("record_key")
    records = pl.DataFrame({"record_key": [record_key(record) for record in held_out.records]})
    predicted = records.join(teacher, on="record_key", how="left", maintain_order="left")["predicted"]
    has_choices = pl.Series([bool(record.choices) for record in held_out.records])
    num_missing = int((predicted.is_null() & has_choices).sum())
    if num_missing:
        raise InputError(
            f"{path}: expected the teacher's prediction for each of {len(records)} records, found none for "
            f"{num_missing}; score the teacher on the same text"
        )
    return predicted


def teacher_score(held_out: EvaluationSet, predictions: str) -> float:
    """The teacher's `main_score` on the same records, from its predictions file."""
    path = one_path(predictions, "loss.kd.adaptive_weight.teacher_predictions")
    records = pl.DataFrame({"record_key": [record_key(record) for record in held_out.records]})
    rows = records.join(pl.read_parquet(path).unique("record_key"), on="record_key", how="left")
    to_generate = {request.record_id for request in held_out.generations}
    is_generated = pl.Series([record.record_id in to_generate for record in held_out.records])
    num_missing = int((rows["num_targets"].is_null() | (is_generated & rows["exact"].is_null())).sum())
    if num_missing:
        raise InputError(
            f"{path}: expected the teacher's prediction for each of {len(records)} records of dev, found none for "
            f"{num_missing}; score the teacher on the same text, with scoring.max_new_tokens={held_out.max_new_tokens}"
        )
    # where this run generates nothing, what the teacher generated must not count
    rows = rows.with_columns(exact=pl.when(is_generated).then(pl.col("exact")))
    return main_score(scores_of(rows))


def main_score(scores: Scores) -> float:
    """The score that decisions use, higher is better: accuracy over choices, else exact match, else minus the nll."""
    for fraction in (scores.accuracy, scores.exact_match):
        if fraction is not None:
            return fraction
    assert scores.nll is not None
    return -scores.nll


def scores_of(predictions: pl.DataFrame) -> Scores:
    """Means over the rows of a predictions table."""
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
