"""Predictions of all arms on one test text, in one order of its records: joined by content, never by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.analysis.values import ArmPredictions, HeldOut
from pipeline.core.progress import log
from pipeline.core.types import InputError, Record
from pipeline.evaluation.choice_rules import best_choices
from pipeline.report.arms import ArmRuns
from pipeline.report.runs import scores_on

KEY = ["record_key", "copy"]
"""The same record may stand in a text several times: its copies are numbered."""
MEASURED = {"accuracy": "correct", "exact_match": "exact", "-nll": "nll_sum"}
"""Metric -> the column that has a value where it is measured; the first that a text has is its metric."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextPredictions:
    """All predictions on one test text, in the same order of records."""

    name: str
    metric: str
    """accuracy, exact_match or -nll."""
    keys: tuple[bytes, ...]
    """`record_key` of each record."""
    arms: tuple[ArmPredictions, ...]
    tables: Mapping[Path, pl.DataFrame]
    """By run folder: the rows of its predictions file in that order."""
    is_out_of_domain: bool = False


def read_predictions(arms: Sequence[ArmRuns], name: str = "test") -> TextPredictions:
    """The predictions of all arms whose runs were scored on a text; others are named in a warning.

    Records without the text's metric, or without a prediction of every run, are left out and counted in a warning.
    InputError where no record is left, or a file is missing.
    """
    scored = [of_arm for of_arm in arms if all(scores_on(run, name) is not None for run in of_arm.runs)]
    tables = {run.folder: _read(run.paths.predictions(name)) for of_arm in scored for run in of_arm.runs}
    measured = (metric for metric, column in MEASURED.items() if any(_has(t, column) for t in tables.values()))
    metric = next(measured, None)
    if metric is None:
        raise InputError(
            f"{name}: expected predictions with an answer or targets, found none in {len(tables)} runs that are scored "
            "on it with all seeds; score them on labeled text with scripts/evaluate.py"
        )
    with_metric = [a for a in scored if all(_has(tables[run.folder], MEASURED[metric]) for run in a.runs)]
    for of_arm in arms:
        if of_arm not in with_metric:
            log.warning("%s: %s has no %s on it: left out", name, of_arm.arm.label, metric)
    tables = _aligned(
        {run.folder: tables[run.folder] for of_arm in with_metric for run in of_arm.runs}, name, MEASURED[metric]
    )
    if metric == "-nll":
        check_same_targets(tables, name)
    first = next(iter(tables.values()))
    scores = [scores_on(run, name) or {} for of_arm in with_metric for run in of_arm.runs]
    return TextPredictions(
        name=name,
        metric=metric,
        keys=tuple(first["record_key"].to_list()),
        arms=tuple(arm_predictions(of_arm, tables, metric) for of_arm in with_metric),
        tables=tables,
        is_out_of_domain=any(of_run.get("out_of_domain", False) for of_run in scores),
    )


def _read(path: Path) -> pl.DataFrame:
    if not path.exists():
        raise InputError(f"{path}: expected the predictions of a finished run, found no such file; restore it")
    table = pl.read_parquet(path)
    if "num_tied" not in table.columns:  # of an earlier version
        counts = [len(best_choices(values)) or None for values in table["choice_log_probs"].to_list()]
        table = table.with_columns(num_tied=pl.Series(counts, dtype=pl.Int64))
    return table.with_columns(copy=pl.int_range(pl.len()).over("record_key"))


def _has(table: pl.DataFrame, column: str) -> bool:
    if column == "nll_sum":
        return bool((table["num_targets"] > 0).any())
    return column in table.columns and table[column].is_not_null().any()


def _aligned(tables: Mapping[Path, pl.DataFrame], name: str, column: str) -> dict[Path, pl.DataFrame]:
    """The tables with the records that all of them have, in the order of the first."""
    is_measured = pl.col("num_targets") > 0 if column == "nll_sum" else pl.col(column).is_not_null()
    measured = {folder: table.filter(is_measured) for folder, table in tables.items()}
    first = next(iter(measured.values()))
    if all(table[KEY].equals(first[KEY]) for table in measured.values()):
        common, aligned = first[KEY], measured
    else:
        common = first[KEY]
        for table in measured.values():
            common = common.join(table[KEY], on=KEY, how="semi", maintain_order="left")
        aligned = {f: common.join(t, on=KEY, how="left", maintain_order="left") for f, t in measured.items()}
    num_records = max(len(table) for table in tables.values())
    if common.is_empty():
        raise InputError(
            f"{name}: expected records that all runs have predictions of, found none; report the runs apart, with runs="
        )
    if len(common) < num_records:
        log.warning(
            "%s: %d of %d records count: the others lack a prediction or the metric", name, len(common), num_records
        )
    return aligned


def check_same_targets(tables: Mapping[Path, pl.DataFrame], name: str) -> None:
    """InputError where a record has more targets in some runs than in others, as after another tokenizer or window.

    The nll of a target is then no measure by which they can be compared.
    """
    (first, of_first), *others = ((folder, table["num_targets"]) for folder, table in tables.items())
    differing = [folder for folder, of_other in others if not of_other.equals(of_first)]
    if differing:
        raise InputError(
            f"{name}: expected the same number of targets a record in all runs, found others than in {first} in "
            f"{', '.join(map(str, differing))}; report them apart, with runs="
        )


def arm_predictions(of_arm: ArmRuns, tables: Mapping[Path, pl.DataFrame], metric: str) -> ArmPredictions:
    """The arrays of an arm from the aligned tables of its runs."""
    rows = [tables[run.folder] for run in of_arm.runs]
    if metric == "-nll":
        credit_RM = -_stacked(rows, "nll_sum")
        return ArmPredictions(arm=of_arm.arm, credit_RM=credit_RM, weight_M=_stacked(rows[:1], "num_targets")[0])
    credit_RM = _stacked(rows, MEASURED[metric])
    weight_M = np.ones(credit_RM.shape[1])
    if metric == "exact_match":
        return ArmPredictions(arm=of_arm.arm, credit_RM=credit_RM, weight_M=weight_M)
    return ArmPredictions(
        arm=of_arm.arm,
        credit_RM=credit_RM,
        weight_M=weight_M,
        predicted_RM=_stacked(rows, "predicted").astype(np.int64),
        probability_RMC=np.stack([probabilities(table["choice_log_probs"]) for table in rows]),
        num_tied_RM=_stacked(rows, "num_tied").astype(np.int64),
    )


def mean_nll(of_arm: ArmRuns, tables: Mapping[Path, pl.DataFrame]) -> float | None:
    """Mean negative log-likelihood per known target in nats, mean over seeds; None without targets."""
    rows = [tables[run.folder] for run in of_arm.runs]
    num_targets = _stacked(rows, "num_targets").sum(axis=1)
    if not num_targets.all():
        return None
    return float((_stacked(rows, "nll_sum").sum(axis=1) / num_targets).mean())


def _stacked(tables: Sequence[pl.DataFrame], column: str) -> np.ndarray:
    return np.stack([table[column].cast(pl.Float64).to_numpy() for table in tables])


def probabilities(log_probs: pl.Series) -> np.ndarray:
    """softmax over the choices of each record, [M, C]; padded with 0 where a record has fewer choices."""
    lengths_M = log_probs.list.len().to_numpy()
    flat = log_probs.explode().to_numpy()
    padded_MC = np.full((len(lengths_M), int(lengths_M.max())), -np.inf)
    padded_MC[np.arange(padded_MC.shape[1]) < lengths_M[:, None]] = flat
    shifted_MC = np.exp(padded_MC - padded_MC.max(axis=1, keepdims=True))
    return np.asarray(shifted_MC / shifted_MC.sum(axis=1, keepdims=True))


def held_out(text: TextPredictions, records: Mapping[bytes, Record]) -> HeldOut:
    """What is known of the records, in the order of the predictions; without `records` no classes and lengths."""
    known = [records[key] for key in text.keys] if records else []
    answer_M = None
    if text.metric == "accuracy":
        answer_M = next(iter(text.tables.values()))["answer"].to_numpy().astype(np.int64)
    classes = known and answer_M is not None
    return HeldOut(
        name=text.name,
        answer_M=answer_M,
        class_M=np.array([record.choices[record.answer or 0].strip() for record in known]) if classes else None,
        length_M=np.array([len(record.prompt or "") for record in known]) if known else None,
        is_out_of_domain=text.is_out_of_domain,
    )
