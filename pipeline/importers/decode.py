"""A row of another project's -> what was kept at each position, under the alignment law."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.core.types import UNKNOWN_TARGET, InputError
from pipeline.importers.distillkit import decode_ids, decode_log_probs, id_bytes, log_prob_bytes
from pipeline.importers.sources import Row, Source

TOKEN_ID = "token_id:"  # vLLM's way to write a token that it was asked not to decode


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForeignRow:
    """One source row: what was kept at each position that has any entry."""

    input_ids_S: Tensor
    segment_lengths: tuple[int, ...]
    target_positions_N: Tensor
    target_ids_N: Tensor
    ids_NK: Tensor
    log_p_NK: Tensor
    """float64, in the source's order; -inf where there is no entry, and then the id means nothing."""

    @property
    def target_log_p_N(self) -> Tensor:
        """float64: the kept log-probability of the true target; NaN where it is unknown or was not kept."""
        is_target_NK = (self.ids_NK == self.target_ids_N[:, None]) & (self.log_p_NK > -torch.inf)
        found_N = torch.where(is_target_NK, self.log_p_NK, -torch.inf).amax(dim=1)
        return torch.where(is_target_NK.any(dim=1), found_N, torch.nan)


def foreign_row(source: Source, row: Row) -> ForeignRow:
    """Decode one row; an InputError says what is wrong with it, but not where it stands."""
    if source.format == "distillkit":
        return _distillkit(source, row)
    return _axolotl_raw(source, row) if source.format == "axolotl_raw" else _axolotl_prepared(source, row)


# ----------------------------------------------------------------------------------------- by format


def _distillkit(source: Source, row: Row) -> ForeignRow:
    """Row s is the distribution for token s + 1; the last token has one only where its successor was cut off."""
    input_ids_S = _integers(row, "input_ids")
    if source.packing is None:
        ids_NK, log_p_NK = _entries(row, "token_ids", "top_values")
    else:
        ids_NK = decode_ids(_packed(row, "bytepacked_indices", id_bytes(source.packing)), source.packing)
        log_p_NK = decode_log_probs(_packed(row, "compressed_logprobs", log_prob_bytes(source.packing)), source.packing)
    if len(ids_NK) != len(log_p_NK):
        raise InputError(f"expected ids and values of the same positions, found {len(ids_NK)} and {len(log_p_NK)}")
    if len(ids_NK) not in (len(input_ids_S) - 1, len(input_ids_S)):
        raise InputError(
            f"expected a distribution for each of {len(input_ids_S)} tokens, or all but one, found {len(ids_NK)}"
        )
    return _laid_out(row, input_ids_S, ids_NK, log_p_NK, first=0)


def _axolotl_raw(source: Source, row: Row) -> ForeignRow:
    """R rows beside L tokens: row r describes token L - R + r, so that prompts need none."""
    input_ids_S, column = _tokens(source, row), source.columns["logprobs"]
    if "target_token_ids" in row:
        ids_NK, log_p_NK = _entries(row, "target_token_ids", column)
    else:
        ids_NK, log_p_NK = _spelled(_value(row, column), column)
    first = len(input_ids_S) - len(ids_NK) - 1  # a row that describes token t speaks at position t - 1
    if first < -1:
        raise InputError(
            f"column {column!r}: expected at most one row for each of {len(input_ids_S)} tokens, found {len(ids_NK)}; "
            "check the tokenizer and its chat template"
        )
    return _laid_out({}, input_ids_S, ids_NK, log_p_NK, first=first)


def _axolotl_prepared(source: Source, row: Row) -> ForeignRow:
    """`target_mask` says which entries count; the file does not say which token row j describes."""
    input_ids_S = _integers(row, "input_ids")
    ids_NK, log_p_NK = _entries(row, "target_token_ids", "target_logprobs")
    mask_NK = _padded(*_ragged(row, "target_mask"), fill=0)
    if not ids_NK.shape == mask_NK.shape or len(ids_NK) != len(input_ids_S):
        raise InputError(
            f"expected target_token_ids, target_logprobs and target_mask of one shape for {len(input_ids_S)} tokens, "
            f"found {tuple(ids_NK.shape)} and {mask_NK.shape}"
        )
    log_p_NK = log_p_NK.masked_fill(torch.from_numpy(mask_NK) == 0, -torch.inf)
    return _laid_out(row, input_ids_S, ids_NK, log_p_NK, first=0 if source.alignment == "current" else -1)


def _tokens(source: Source, row: Row) -> Tensor:
    """input_ids, else the whole chat, else the text."""
    if "input_ids" in row:
        return _integers(row, "input_ids")
    chat, text = (source.columns[name] for name in ("messages", "text"))
    if chat in row:
        if not source.tokenizer.chat_template:
            raise InputError("expected a tokenizer with a chat template, because rows hold messages, found none")
        try:
            said = source.tokenizer.apply_chat_template(_plain(row[chat]), tokenize=False)
        except Exception as error:  # a template is a program of its author's: it may raise anything
            raise InputError(f"expected messages that the chat template accepts, found: {error}") from None
        ids = source.tokenizer(said, add_special_tokens=False)["input_ids"]
    elif isinstance(_plain(row.get(text)), str):
        ids = source.tokenizer(_plain(row[text]))["input_ids"]
    else:
        raise InputError(f"expected one of the columns input_ids, {chat} and {text}, found {sorted(row)}")
    return torch.tensor(ids, dtype=torch.int64)


# ---------------------------------------------------------------------------------------- alignment


def _laid_out(row: Row, input_ids_S: Tensor, ids_NK: Tensor, log_p_NK: Tensor, *, first: int) -> ForeignRow:
    """Cut padding, find the segments; distribution n speaks at position first + n.

    `attention_mask` numbers the documents of a packed row from 1 on; 0 is padding. What speaks at the last token
    of a segment has no target here; where it came from a row about the next token, as `first` < 0 says, it
    would be about another document's, and is left out.
    """
    num_tokens = len(input_ids_S)
    mask_S = _integers(row, "attention_mask") if "attention_mask" in row else torch.ones(num_tokens, dtype=torch.int64)
    if len(mask_S) != num_tokens:
        raise InputError(f"column 'attention_mask': expected {num_tokens} numbers, found {len(mask_S)}")
    is_last_S = torch.ones(num_tokens, dtype=torch.bool)
    is_last_S[:-1] = mask_S[:-1] != mask_S[1:]
    lengths = torch.diff(torch.nonzero(is_last_S)[:, 0], prepend=torch.tensor([-1]))
    positions_N = torch.arange(first, first + len(ids_NK))
    has_N = (log_p_NK > -torch.inf).any(dim=1) | log_p_NK.isnan().any(dim=1)  # a NaN is for the checks to find
    has_N &= (positions_N >= 0) & (mask_S[positions_N.clamp(min=0)] > 0)
    if first < 0:
        has_N &= ~is_last_S[positions_N.clamp(min=0)]
    positions_N = positions_N[has_N]
    following_N = input_ids_S.roll(-1)[positions_N]
    return ForeignRow(
        input_ids_S=input_ids_S[mask_S > 0],
        segment_lengths=tuple(lengths[mask_S[is_last_S] > 0].tolist()),
        target_positions_N=((mask_S > 0).cumsum(0) - 1)[positions_N],
        target_ids_N=torch.where(is_last_S[positions_N], UNKNOWN_TARGET, following_N),
        ids_NK=ids_NK[has_N],
        log_p_NK=log_p_NK[has_N],
    )


# --------------------------------------------------------------------------------------- a row's cells


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise InputError(f"expected the column {column!r}, found {sorted(row)}")
    return _plain(row[column])


def _plain(value: Any) -> Any:
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _array(row: Row, column: str) -> pa.Array:
    if column not in row:
        raise InputError(f"expected the column {column!r}, found {sorted(row)}")
    value = row[column]
    try:
        return value.values if isinstance(value, pa.Scalar) else pa.array(value)
    except (AttributeError, TypeError, pa.ArrowException):
        raise InputError(f"column {column!r}: expected a list, found something else") from None


def _integers(row: Row, column: str) -> Tensor:
    """int64 of a flat list."""
    array = _array(row, column)
    if array.null_count or not (pa.types.is_integer(array.type) or len(array) == 0):
        raise InputError(f"column {column!r}: expected integers, found {array.type} with {array.null_count} nulls")
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).astype(np.int64))


def _ragged(row: Row, column: str) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of a list of lists, and how many each inner list has; a null holds none."""
    array = _array(row, column)
    if pa.types.is_null(array.type):
        return np.zeros(0), np.zeros(len(array), dtype=np.int64)
    try:
        counts = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        values = array.flatten()
    except (AttributeError, pa.ArrowException):
        raise InputError(f"column {column!r}: expected a list of lists, found a list of {array.type}") from None
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise InputError(f"column {column!r}: expected lists of numbers, found {kind}")
    flat = np.zeros(0) if pa.types.is_null(kind) else values.to_numpy(zero_copy_only=False)
    return flat, counts.astype(np.int64)


def _padded(flat: np.ndarray, counts: np.ndarray, *, fill: float) -> np.ndarray:
    """[N, K] out of numbers that follow one another."""
    padded = np.full((len(counts), int(counts.max(initial=0))), fill, dtype=flat.dtype if len(flat) else np.float64)
    padded[np.arange(padded.shape[1]) < counts[:, None]] = flat
    return padded


def _packed(row: Row, column: str, width: int) -> np.ndarray:
    """uint8 [N, width]."""
    flat, counts = _ragged(row, column)
    if not (counts == width).all():
        wrong = int(counts[counts != width][0])
        raise InputError(f"column {column!r}: expected {width} bytes a position, found {wrong}; check its config")
    if len(flat) and (flat.dtype.kind not in "iu" or flat.min() < 0 or flat.max() > 255):
        raise InputError(f"column {column!r}: expected bytes, found {flat.dtype} up to {flat.max()}")
    return flat.astype(np.uint8).reshape(len(counts), width)


def _entries(row: Row, ids_column: str, values_column: str) -> tuple[Tensor, Tensor]:
    """Ids [N, K] and log-probabilities [N, K] out of two parallel lists of lists."""
    (ids, counts), (values, value_counts) = _ragged(row, ids_column), _ragged(row, values_column)
    if not np.array_equal(counts, value_counts):
        raise InputError(f"expected {ids_column} and {values_column} of one shape, found different lengths")
    if len(ids) and ids.dtype.kind not in "iu":
        raise InputError(f"column {ids_column!r}: expected integers, found {ids.dtype} (or nulls)")
    ids_NK = _padded(ids.astype(np.int64), counts, fill=0)
    log_p_NK = _padded(values.astype(np.float64), counts, fill=-np.inf)
    return torch.from_numpy(ids_NK.astype(np.int64)), torch.from_numpy(log_p_NK)


def _spelled(positions: Any, column: str) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of what servers return: a list, or a dict, of entries for each position."""
    try:
        pairs = [list(_pairs(position)) for position in positions]
        flat = list(itertools.chain.from_iterable(pairs))
        ids = np.array([number for number, _ in flat], dtype=np.int64)
        log_p = np.array([value for _, value in flat], dtype=np.float64)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"column {column!r}: expected for each position null, a list of {{token or token_id, logprob}} or "
            f"{{id: {{logprob}}}}, found something else ({error!r})"
        ) from None
    counts = np.array([len(some) for some in pairs], dtype=np.int64)
    ids_NK, log_p_NK = _padded(ids, counts, fill=0).astype(np.int64), _padded(log_p, counts, fill=-np.inf)
    return torch.from_numpy(ids_NK), torch.from_numpy(log_p_NK)


def _pairs(position: Any) -> Iterable[tuple[int, float]]:
    if position is None:
        return
    if isinstance(position, dict):
        # Parquet gives every position the keys of all
        yield from ((int(key), entry["logprob"]) for key, entry in position.items() if entry is not None)
        return
    for entry in position:
        if entry.get("token_id") is not None:
            yield int(entry["token_id"]), entry["logprob"]
        elif entry["token"].startswith(TOKEN_ID):
            yield int(entry["token"].removeprefix(TOKEN_ID)), entry["logprob"]
        else:
            raise ValueError(f"token {entry['token']!r} is text and not {TOKEN_ID}NUMBER")
