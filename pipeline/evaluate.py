"""Held-out scores of any model: likelihood of known targets, accuracy over choices, agreement with the teacher."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch

from pipeline import models
from pipeline.config import EvaluateConfig
from pipeline.corpus import Segment, collate_inputs, pack, segments
from pipeline.runtime import Progress, compute_device, log, one_path, start_logging, write_json
from pipeline.text import Rejections, Text, open_text, read_records
from pipeline.types import UNKNOWN_TARGET, InputError, Record, Scores

SHORTEST_WINDOW = 128  # tokens; a wider window would only add attention between segments that is masked away
HEAD_POSITIONS = 512  # positions in one pass through the head: bounds the [N, V] matrix

Pairs = tuple[tuple[int, int], ...]  # (position, token): what to score


def run(config: EvaluateConfig) -> Scores:
    """Score a model folder; print, and write scores.json and predictions.parquet if asked."""
    start_logging()
    folder = models.model_folder(config.model.path, revision=config.model.revision)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    text = open_text(config.text, "text")
    records = read_records(text, tokenizer)
    model = models.load_model(
        folder,
        dtype=config.model.dtype.name,
        device=compute_device(),
        attention=config.model.attention,
        num_layers=config.model.num_layers,
        trust_remote_code=config.model.trust_remote_code,
    )
    scores, predictions = score(
        model,
        tokenizer,
        records,
        text,
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
    tokenizer: Any,
    records: Sequence[Record],
    text: Text,
    *,
    batch_tokens: int,
    teacher_predictions: str | None,
    log_every_seconds: float,
) -> tuple[Scores, pl.DataFrame]:
    """Scores over all records, and one row a record: what was predicted and how likely everything was."""
    model.eval()
    items = [item for record in records for item in _items(record, tokenizer, text)]
    log_probs = _log_probs(model, items, len(tokenizer), batch_tokens, log_every_seconds)
    predictions = _predictions(records, items, log_probs)
    if teacher_predictions is not None:
        predictions = _with_teacher(predictions, one_path(teacher_predictions, "scoring.teacher_predictions"))
    return _scores(predictions), predictions


# ------------------------------------------------------------------------------- what has to be scored


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """One continuation of one record: the tokens read and the (position, token) pairs to score."""

    record_id: int
    choice: int | None
    """None: the record's own targets, for the negative log-likelihood."""
    ids: tuple[int, ...]
    pairs: Pairs


def _items(record: Record, tokenizer: Any, text: Text) -> Iterator[_Item]:
    if record.completion is not None:
        own = segments([record], text, tokenizer, Rejections(skip=False), window=1 << 30)
        for segment in own:
            pairs = tuple((s, t) for s, t in segment.targets if t != UNKNOWN_TARGET)
            yield _Item(record_id=record.record_id, choice=None, ids=segment.ids[: pairs[-1][0] + 1], pairs=pairs)
    if not record.choices:
        return
    if record.prompt is None:
        raise InputError(f"{record.where}: expected a prompt beside the choices, found none; add one")
    prompt = tuple(tokenizer(record.prompt, add_special_tokens=not record.templated)["input_ids"])
    for index, choice in enumerate(record.choices):
        ids = tuple(tokenizer(choice, add_special_tokens=False)["input_ids"])
        pairs = tuple((len(prompt) - 1 + j, token) for j, token in enumerate(ids))
        yield _Item(record_id=record.record_id, choice=index, ids=prompt + ids[:-1], pairs=pairs)


def _merged(items: Sequence[_Item]) -> tuple[list[Segment], list[tuple[int, int]]]:
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
    model: models.Model, items: Sequence[_Item], vocabulary_size: int, batch_tokens: int, log_every_seconds: float
) -> list[list[float]]:
    """Log-probability (nats) of every pair of every item."""
    merged, places = _merged(items)
    window = max(SHORTEST_WINDOW, max(len(segment.ids) for segment in merged))
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and window > longest and window > SHORTEST_WINDOW:
        raise InputError(f"a held-out record has {window} tokens: expected at most {longest}, the model's positions")
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
        log_q_MV = models.logits(model, hidden_PH[chosen_M], vocabulary_size).float().log_softmax(dim=1)
        here_N = (inverse_N >= start) & (inverse_N < start + HEAD_POSITIONS)
        values_N[here_N] = log_q_MV[inverse_N[here_N] - start, tokens_N[here_N]]
    return values_N.tolist()


# ----------------------------------------------------------------------------------- what came of it


def record_key(record: Record) -> bytes:
    """16 bytes over all that a prediction answers to: predictions of two models are joined by it."""
    parts = [record.prompt or "", record.completion or "", *record.choices, str(record.answer)]
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.digest()


def _predictions(records: Sequence[Record], items: Sequence[_Item], log_probs: list[list[float]]) -> pl.DataFrame:
    own: dict[int, list[float]] = {record.record_id: [] for record in records}
    choices: dict[int, list[float]] = {record.record_id: [] for record in records}
    for item, values in zip(items, log_probs, strict=True):
        if item.choice is None:
            own[item.record_id] += values
        else:
            choices[item.record_id].append(sum(values))
    rows = []
    for record in records:
        likelihoods = choices[record.record_id]
        predicted = likelihoods.index(max(likelihoods)) if likelihoods else None
        scored = predicted is not None and record.answer is not None
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
    }
    return pl.DataFrame(rows, schema=schema)


def _with_teacher(predictions: pl.DataFrame, path: Path) -> pl.DataFrame:
    teacher = pl.read_parquet(path).select("record_key", teacher_predicted="predicted").unique("record_key")
    joined = predictions.join(teacher, on="record_key", how="left", maintain_order="left")
    unknown = joined.filter(pl.col("predicted").is_not_null() & pl.col("teacher_predicted").is_null()).height
    if unknown:
        raise InputError(
            f"{path}: expected the teacher's prediction for each of {predictions.height} records, found none for "
            f"{unknown}; score the teacher on the same text"
        )
    return joined


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
        agreement=agreement,
    )


def _mean(values: pl.Series) -> float | None:
    return float(values.cast(pl.Float64).mean()) if len(values) else None  # type: ignore[arg-type]
