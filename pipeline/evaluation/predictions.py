"""Log-likelihoods -> table of predictions -> scores; the teacher's predictions joined to a student's by record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.core.files import one_path
from pipeline.core.types import InputError, Record
from pipeline.evaluation.choice_rules import RULES, best_choices, credit, shared_fraction, total
from pipeline.evaluation.requests import EvaluationSet, record_key


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The scores of a model on one held-out text; a score is None if no record of the text has it."""

    num_records: int
    num_targets: int
    """Number of supervised positions with a known target."""
    nll: float | None
    """Mean negative log-likelihood per known target, in nats."""
    perplexity: float | None
    """exp(nll)."""
    num_choice_records: int
    """Number of records with choices and an answer."""
    accuracy: float | None
    """Fraction of these records whose most likely choice is the answer; 1 / m where it is one of m equally likely."""
    accuracy_norm: float | None = None
    """The same by log-probability per UTF-8 byte of the choice."""
    accuracy_norm_tokens: float | None = None
    """The same by log-probability per token of the choice."""
    num_ties: int | None = None
    """Number of records with several choices that are equally likely, and more likely than all others."""
    num_free_records: int
    """Number of records for which the model generated a completion."""
    exact_match: float | None
    """Fraction of these records whose generated text equals the completion, apart from whitespace at both ends."""
    agreement: float | None
    """Fraction of the records with choices for which the teacher's most likely choice is the same. With ties a record
    counts by the fraction of best choices that both models share."""


CHOSEN = {"predicted": pl.Int64, "num_tied": pl.Int64, "correct": pl.Float64}
"""Of each rule: the first of its best choices; their number; 1 / `num_tied` where the answer is one of them, else 0."""
PREDICTION_COLUMNS: dict[str, Any] = {
    "record_id": pl.Int64,
    "record_key": pl.Binary,
    "answer": pl.Int64,
    "choice_log_probs": pl.List(pl.Float64),
    **{name + rule: dtype for rule in RULES for name, dtype in CHOSEN.items()},
    "num_targets": pl.Int64,
    "nll_sum": pl.Float64,
    "generated": pl.String,
    "exact": pl.Boolean,
}


def predictions_table(
    held_out: EvaluationSet, log_probs: list[list[float]], generated: dict[int, tuple[str, bool]]
) -> pl.DataFrame:
    """One row per record. `log_probs`: of each likelihood request; `generated`: text and exact match, by record id."""
    own_targets: dict[int, list[float]] = {record.record_id: [] for record in held_out.records}
    choices: dict[int, list[list[float]]] = {record.record_id: [] for record in held_out.records}
    for request, values in zip(held_out.likelihoods, log_probs, strict=True):
        if request.choice is None:
            own_targets[request.record_id] += values
        else:
            choices[request.record_id].append(values)
    rows = []
    for record in held_out.records:
        text, exact = generated.get(record.record_id, (None, None))
        rows.append(
            {
                "record_id": record.record_id,
                "record_key": record_key(record),
                "answer": record.answer,
                "num_targets": len(own_targets[record.record_id]),
                "nll_sum": -sum(own_targets[record.record_id]),
                "generated": text,
                "exact": exact,
                **_chosen(record, choices[record.record_id]),
            }
        )
    return pl.DataFrame(rows, schema=PREDICTION_COLUMNS)


def _chosen(record: Record, log_probs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What each rule predicts of a record with choices, and the credit for it."""
    choices = list(zip(log_probs, record.choices, strict=True))
    columns: dict[str, Any] = {"choice_log_probs": [total(*choice) for choice in choices]}
    if any(math.isnan(value) for value in columns["choice_log_probs"]):
        raise InputError(
            f"{record.where}: expected a log-probability of each choice, found NaN; the model computes no finite "
            "logits: check its weights, or choose another dtype"
        )
    for rule, score in RULES.items() if choices else ():
        best = best_choices([score(*choice) for choice in choices])
        columns["predicted" + rule] = best[0]
        columns["correct" + rule] = None if record.answer is None else credit(best, record.answer)
        columns["num_tied" + rule] = len(best)
    return columns


def with_teacher(predictions: pl.DataFrame, teacher: Sequence[Sequence[int]]) -> pl.DataFrame:
    """The table with the teacher's choice, and the fraction of the best choices that both models share."""
    student = [best_choices(log_probs) for log_probs in predictions["choice_log_probs"].to_list()]
    agreement = [
        shared_fraction(own, theirs) if own and theirs else None for own, theirs in zip(student, teacher, strict=True)
    ]
    return predictions.with_columns(
        teacher_predicted=pl.Series([best[0] if best else None for best in teacher], dtype=pl.Int64),
        agreement=pl.Series(agreement, dtype=pl.Float64),
    )


def imitation(predictions: pl.DataFrame, teacher: Sequence[Sequence[int]]) -> dict[str, float]:
    """How far a model's choices follow the teacher's: `agreement` = P(model = teacher), and `imitation`.

    imitation = P(model = teacher | teacher wrong), over the records whose answer is not among the teacher's best
    choices. With ties a record counts by the fraction of best choices that both share. A figure is left out where no
    record has it.
    """
    shared = with_teacher(predictions, teacher)["agreement"]
    is_wrong = pl.Series(
        [
            answer is not None and bool(best) and answer not in best
            for answer, best in zip(predictions["answer"].to_list(), teacher, strict=True)
        ],
        dtype=pl.Boolean,
    )
    figures = {"agreement": _mean(shared.drop_nulls()), "imitation": _mean(shared.filter(is_wrong).drop_nulls())}
    return {name: value for name, value in figures.items() if value is not None}


def teacher_choices(
    held_out: EvaluationSet, predictions: str, *, option: str = "scoring.teacher_predictions"
) -> list[tuple[int, ...]]:
    """The teacher's best choices on each record, joined by the record's content, never by its position.

    Empty for a record without choices. `option` names the file in messages.
    """
    path = one_path(predictions, option)
    teacher = pl.read_parquet(path).select("record_key", "choice_log_probs").unique("record_key")
    records = pl.DataFrame({"record_key": [record_key(record) for record in held_out.records]})
    log_probs = records.join(teacher, on="record_key", how="left", maintain_order="left")["choice_log_probs"]
    found = [best_choices(values or ()) for values in log_probs.to_list()]
    num_missing = sum(bool(record.choices) and not best for record, best in zip(held_out.records, found, strict=True))
    if num_missing:
        raise InputError(
            f"{path}: expected the teacher's prediction for each of {len(records)} records, found none for "
            f"{num_missing}; score the teacher on the same text"
        )
    return found


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


def scores_from(saved: Mapping[str, Any]) -> Scores:
    """The scores among what was saved with them, as in result.json."""
    return Scores(**{item.name: saved[item.name] for item in dataclasses.fields(Scores) if item.name in saved})


def scored_before(predictions: Path, held_out: EvaluationSet, teacher: str) -> tuple[Scores, pl.DataFrame]:
    """Saved predictions and their scores, with the agreement with another teacher; no model is needed."""
    table = pl.read_parquet(predictions).drop("teacher_predicted", "agreement", strict=False)
    table = with_teacher(table, teacher_choices(held_out, teacher))
    return scores_of(table), table


def scores_of(predictions: pl.DataFrame) -> Scores:
    """Means over the rows of a predictions table."""
    num_targets = int(predictions["num_targets"].sum())
    nll = float(predictions["nll_sum"].sum()) / num_targets if num_targets else None
    with_choices = predictions.filter(pl.col("correct").is_not_null())

    def mean_of(column: str) -> float | None:  # a table of an earlier version does not have all columns
        return _mean(predictions[column].drop_nulls()) if column in predictions.columns else None

    return Scores(
        num_records=predictions.height,
        num_targets=num_targets,
        nll=nll,
        perplexity=math.exp(min(nll, 700.0)) if nll is not None else None,
        num_choice_records=with_choices.height,
        accuracy=_mean(with_choices["correct"]),
        accuracy_norm=mean_of("correct_norm"),
        accuracy_norm_tokens=mean_of("correct_norm_tokens"),
        num_ties=int((predictions["num_tied"] > 1).sum()) if "num_tied" in predictions.columns else None,
        num_free_records=int(predictions["exact"].is_not_null().sum()),
        exact_match=_mean(predictions["exact"].drop_nulls()),
        agreement=mean_of("agreement"),
    )


def _mean(values: pl.Series) -> float | None:
    return float(values.cast(pl.Float64).mean()) if len(values) else None  # type: ignore[arg-type]
