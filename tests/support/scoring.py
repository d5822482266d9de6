"""Held-out texts scored in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import torch

from pipeline.config.schema import Targets
from pipeline.evaluation.few_shot import Examples
from pipeline.evaluation.predictions import Scores
from pipeline.evaluation.requests import EvaluationSet, open_evaluation_set
from pipeline.evaluation.scoring import score
from pipeline.models.compatibility import max_positions
from pipeline.models.loading import load_model
from pipeline.models.tokenizer import end_token_ids, load_tokenizer
from support.tiny import text_of


def scored(
    folder: Path,
    path: Path,
    *,
    teacher: str | None = None,
    max_new_tokens: int = 0,
    batch_tokens: int = 300,
    examples: Examples | None = None,
    **settings: Any,
) -> tuple[Scores, pl.DataFrame]:
    exam = exam_of(folder, path, max_new_tokens=max_new_tokens, examples=examples, **settings)
    # with the kernel of `train_arguments`: tests compare last bits
    model = load_model(folder, dtype="float32", device=torch.device("cpu"), attention="sdpa")
    return score(
        model,
        exam,
        batch_tokens=batch_tokens,
        teacher_predictions=teacher,
        log_every_seconds=60,
    )


def exam_of(
    folder: Path, path: Path, *, max_new_tokens: int = 0, examples: Examples | None = None, **settings: Any
) -> EvaluationSet:
    text = text_of(path, "test", **{"targets": Targets.completion, **settings})
    tokenizer = load_tokenizer(folder)
    return open_evaluation_set(
        text,
        tokenizer,
        longest=max_positions(folder),
        max_new_tokens=max_new_tokens,
        end_ids=end_token_ids(folder, tokenizer),
        examples=examples,
    )
