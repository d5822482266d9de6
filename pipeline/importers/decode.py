"""A row of another project's data set -> the entries at each position, under the alignment law of `core.types`."""

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
from pipeline.importers.sources import ForeignSource, Row

TOKEN_ID = "token_id:"  # what vLLM writes before an id where it returns tokens as ids


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForeignRow:
    """One decoded source row: the entries of each position that has any."""

    input_ids_S: Tensor
    segment_lengths: tuple[int, ...]
    target_positions_N: Tensor
    target_ids_N: Tensor
    ids_NK: Tensor
    log_p_NK: Tensor
    """float64, in the source's order; -inf where there is no entry, and then the id has no meaning."""

    @property
    def target_log_p_N(self) -> Tensor:
        """float64: the log-probability of the true target; NaN where the target is unknown or not among the entries."""
        is_target_NK = (self.ids_NK == self.target_ids_N[:, None]) & (self.log_p_NK > -torch.inf)
        log_p_N = torch.where(is_target_NK, self.log_p_NK, -torch.inf).amax(dim=1)
        return torch.where(is_target_NK.any(dim=1), log_p_N, torch.nan)


def appended_token(source: ForeignSource) -> int | None:
    """The padding token that DistillKit appends to a shorter text, to get the distribution after its last token.

    None where it cannot be told from text: it is the end token in a tokenizer without padding.
    """
    pad, end = source.tokenizer.pad_token_id, source.tokenizer.eos_token_id
    return pad if source.format == "distillkit" and pad != end else None


def decode_row(source: ForeignSource, row: Row) -> ForeignRow:
    """Decode one row; an InputError describes what is wrong with it, and the caller adds file and row."""
    if source.format == "distillkit":
        return _distillkit(source, row)
    if source.format == "axolotl_raw":
        return _axolotl_raw(source, row)
    return _axolotl_prepared(source, row)


# ----------------------------------------------------------------------------------------- by format


def _distillkit(source: ForeignSource, row: Row) -> ForeignRow:
    """Distribution s predicts token s + 1; the one at the last token of a text has no known target."""
    input_ids_S = _integers(row, "input_ids")
    if source.compression is None:
        ids_NK, log_p_NK = _entries(row, "token_ids", "top_values")
    else:
        compression = source.compression
        ids_NK = decode_ids(_bytes(row, "bytepacked_indices", id_bytes(compression)), compression)
        log_p_NK = decode_log_probs(_bytes(row, "compressed_logprobs", log_prob_bytes(compression)), compression)
    if len(ids_NK) != len(log_p_NK):
        raise InputError(f"expected ids and values of the same positions, found {len(ids_NK)} and {len(log_p_NK)}")
    if len(ids_NK) not in (len(input_ids_S) - 1, len(input_ids_S)):
        raise InputError(
            f"expected a distribution for each of {len(input_ids_S)} tokens, or all but one, found {len(ids_NK)}"
        )
    is_shorter = len(ids_NK) == len(input_ids_S) - 1 > 0
    if is_shorter and "attention_mask" not in row and int(input_ids_S[-1]) == appended_token(source):
        input_ids_S = input_ids_S[:-1]
    return _align(row, input_ids_S, ids_NK, log_p_NK, first=0)


def _axolotl_raw(source: ForeignSource, row: Row) -> ForeignRow:
    """R distributions for S tokens, right-aligned: distribution r predicts token S - R + r, so prompts need none.

    With 5 tokens and 3 distributions the first one predicts token 2, which is position 1.
    """
    input_ids_S, column = _tokens(source, row), source.columns["logprobs"]
    if "target_token_ids" in row:
        ids_NK, log_p_NK = _entries(row, "target_token_ids", column)
    else:
        ids_NK, log_p_NK = _listed_entries(_value(row, column), column)
    first = len(input_ids_S) - len(ids_NK) - 1  # position t - 1 predicts token t
    if first < -1:
        raise InputError(
            f"column {column!r}: expected at most one row for each of {len(input_ids_S)} tokens, found {len(ids_NK)}; "
            "check the tokenizer and its chat template"
        )
    return _align({}, input_ids_S, ids_NK, log_p_NK, first=first)


def _axolotl_prepared(source: ForeignSource, row: Row) -> ForeignRow:
    """`target_mask` is 0 at padding; an option sets which token distribution j predicts, because no column has it."""
    input_ids_S = _integers(row, "input_ids")
    ids_NK, log_p_NK = _entries(row, "target_token_ids", "target_logprobs")
    mask_NK = _padded(*_ragged(row, "target_mask"), fill=0)
    if not ids_NK.shape == mask_NK.shape or len(ids_NK) != len(input_ids_S):
        raise InputError(
            f"expected target_token_ids, target_logprobs and target_mask of one shape for {len(input_ids_S)} tokens, "
            f"found {tuple(ids_NK.shape)} and {mask_NK.shape}"
        )
    log_p_NK = log_p_NK.masked_fill(torch.from_numpy(mask_NK) == 0, -torch.inf)
    return _align(row, input_ids_S, ids_NK, log_p_NK, first=0 if source.alignment == "current" else -1)


def _tokens(source: ForeignSource, row: Row) -> Tensor:
    """The column input_ids, else the tokens of the chat, else those of the text."""
    if "input_ids" in row:
        return _integers(row, "input_ids")
    chat, text = (source.columns[name] for name in ("messages", "text"))
    if chat in row:
        if not source.tokenizer.chat_template:
            raise InputError("expected a tokenizer with a chat template, because rows hold messages, found none")
        try:
            chat_text = source.tokenizer.apply_chat_template(_plain(row[chat]), tokenize=False)
        except Exception as error:  # a template is a program: it may raise any error
            raise InputError(f"expected messages that the chat template accepts, found: {error}") from None
        ids = source.tokenizer(chat_text, add_special_tokens=False)["input_ids"]
    elif isinstance(_plain(row.get(text)), str):
        ids = source.tokenizer(_plain(row[text]))["input_ids"]
    else:
        raise InputError(f"expected one of the columns input_ids, {chat} and {text}, found {sorted(row)}")
    return torch.tensor(ids, dtype=torch.int64)


# ---------------------------------------------------------------------------------------- alignment


def _align(row: Row, input_ids_S: Tensor, ids_NK: Tensor, log_p_NK: Tensor, *, first: int) -> ForeignRow:
    """Remove padding, find the segments, and put distribution n at position first + n.

    `attention_mask` numbers the documents of a packed row from 1 on; 0 is padding. A distribution at the last position
    of a segment has no target. With `first` < 0 distributions are stored beside the token that they predict, so
    there it predicts the first token of another document, and is dropped.

    Example: mask [1, 1, 2, 2, 0] -> segments of lengths 2 and 2; positions 1 and 3 are the last of their segments.
    """
    num_tokens = len(input_ids_S)
    mask_S = _integers(row, "attention_mask") if "attention_mask" in row else torch.ones(num_tokens, dtype=torch.int64)
    if len(mask_S) != num_tokens:
        raise InputError(f"column 'attention_mask': expected {num_tokens} numbers, found {len(mask_S)}")
    is_last_S = torch.ones(num_tokens, dtype=torch.bool)
    is_last_S[:-1] = mask_S[:-1] != mask_S[1:]
    lengths = torch.diff(torch.nonzero(is_last_S)[:, 0], prepend=torch.tensor([-1]))
    positions_N = torch.arange(first, first + len(ids_NK))
    is_used_N = (log_p_NK > -torch.inf).any(dim=1) | log_p_NK.isnan().any(dim=1)  # the checks refuse a NaN later
    is_used_N &= (positions_N >= 0) & (mask_S[positions_N.clamp(min=0)] > 0)
    if first < 0:
        is_used_N &= ~is_last_S[positions_N.clamp(min=0)]
    positions_N = positions_N[is_used_N]
    following_N = input_ids_S.roll(-1)[positions_N]
    return ForeignRow(
        input_ids_S=input_ids_S[mask_S > 0],
        segment_lengths=tuple(lengths[mask_S[is_last_S] > 0].tolist()),
        target_positions_N=((mask_S > 0).cumsum(0) - 1)[positions_N],  # counted without padding
        target_ids_N=torch.where(is_last_S[positions_N], UNKNOWN_TARGET, following_N),
        ids_NK=ids_NK[is_used_N],
        log_p_NK=log_p_NK[is_used_N],
    )


# --------------------------------------------------------------------------------- values of a row


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
    """A flat list as int64."""
    array = _array(row, column)
    if array.null_count or not (pa.types.is_integer(array.type) or len(array) == 0):
        raise InputError(f"column {column!r}: expected integers, found {array.type} with {array.null_count} nulls")
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).astype(np.int64))


def _ragged(row: Row, column: str) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of a list of lists, and the length of each inner list; that of a null is 0."""
    array = _array(row, column)
    if pa.types.is_null(array.type):
        return np.zeros(0), np.zeros(len(array), dtype=np.int64)
    try:
        counts = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        values = array.flatten()
    except (AttributeError, pa.ArrowException):
        raise InputError(f"column {column!r}: expected a list of lists, found a list of {array.type}") from None
    value_type = values.type
    is_number = pa.types.is_integer(value_type) or pa.types.is_floating(value_type)
    if not (is_number or pa.types.is_null(value_type)):
        raise InputError(f"column {column!r}: expected lists of numbers, found {value_type}")
    flat = np.zeros(0) if pa.types.is_null(value_type) else values.to_numpy(zero_copy_only=False)
    return flat, counts.astype(np.int64)


def _padded(flat: np.ndarray, counts: np.ndarray, *, fill: float) -> np.ndarray:
    """Numbers that follow one another -> [N, K]: [5, 9, 3, 7, 8] with counts [3, 2] -> [[5, 9, 3], [7, 8, fill]]."""
    padded = np.full((len(counts), int(counts.max(initial=0))), fill, dtype=flat.dtype if len(flat) else np.float64)
    padded[np.arange(padded.shape[1]) < counts[:, None]] = flat
    return padded


def _bytes(row: Row, column: str, width: int) -> np.ndarray:
    """`width` bytes for each position: uint8 [N, width]."""
    flat, counts = _ragged(row, column)
    if not (counts == width).all():
        wrong = int(counts[counts != width][0])
        raise InputError(f"column {column!r}: expected {width} bytes a position, found {wrong}; check its config")
    if len(flat) and (flat.dtype.kind not in "iu" or flat.min() < 0 or flat.max() > 255):
        raise InputError(f"column {column!r}: expected bytes, found {flat.dtype} up to {flat.max()}")
    return flat.astype(np.uint8).reshape(len(counts), width)


def _entries(row: Row, ids_column: str, values_column: str) -> tuple[Tensor, Tensor]:
    """Ids [N, K] and log-probabilities [N, K] of two parallel lists of lists."""
    (ids, counts), (values, value_counts) = _ragged(row, ids_column), _ragged(row, values_column)
    if not np.array_equal(counts, value_counts):
        raise InputError(f"expected {ids_column} and {values_column} of one shape, found different lengths")
    if len(ids) and ids.dtype.kind not in "iu":
        raise InputError(f"column {ids_column!r}: expected integers, found {ids.dtype} (or nulls)")
    ids_NK = _padded(ids.astype(np.int64), counts, fill=0)
    log_p_NK = _padded(values.astype(np.float64), counts, fill=-np.inf)
    return torch.from_numpy(ids_NK.astype(np.int64)), torch.from_numpy(log_p_NK)


def _listed_entries(positions: Any, column: str) -> tuple[Tensor, Tensor]:
    """Ids [N, K] and log-probabilities [N, K] as inference servers return them: a list or dict for each position."""
    try:
        pairs = [list(_id_log_p_pairs(position)) for position in positions]
        flat = list(itertools.chain.from_iterable(pairs))
        ids = np.array([token_id for token_id, _ in flat], dtype=np.int64)
        log_p = np.array([value for _, value in flat], dtype=np.float64)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"column {column!r}: expected for each position null, a list of {{token or token_id, logprob}} or "
            f"{{id: {{logprob}}}}, found something else ({error!r})"
        ) from None
    counts = np.array([len(entries) for entries in pairs], dtype=np.int64)
    ids_NK, log_p_NK = _padded(ids, counts, fill=0).astype(np.int64), _padded(log_p, counts, fill=-np.inf)
    return torch.from_numpy(ids_NK), torch.from_numpy(log_p_NK)


def _id_log_p_pairs(position: Any) -> Iterable[tuple[int, float]]:
    if position is None:
        return
    if isinstance(position, dict):
        # Parquet gives every position the keys of all positions, with null where one has no entry
        yield from ((int(key), entry["logprob"]) for key, entry in position.items() if entry is not None)
        return
    for entry in position:
        if entry.get("token_id") is not None:
            yield int(entry["token_id"]), entry["logprob"]
        elif entry["token"].startswith(TOKEN_ID):
            yield int(entry["token"].removeprefix(TOKEN_ID)), entry["logprob"]
        else:
            raise ValueError(f"token {entry['token']!r} is text and not {TOKEN_ID}NUMBER")
