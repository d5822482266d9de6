"""DistillKit's bytes -> token ids and log-probabilities: pure, all positions of a row at once.

Ids: one stream of bits a position, most significant first, padded with zeros to a byte. Log-probabilities,
little-endian and end to end: the largest ones as they are, the coefficients of a curve through the others, and bins
of residuals about that curve, each a scale and small integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.core.types import InputError

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Residuals that share a scale."""

    scale_dtype: torch.dtype
    element_bits: int
    num_elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the bytes of one data set are to be read: its compression_config.yaml."""

    d: int
    """Size of the vocabulary; decides the bits of an id."""
    k: int
    """Entries of a position."""
    exact_k: int
    """How many of them, the largest, are stored as they are."""
    exact_dtype: torch.dtype
    terms: tuple[int | str, ...]
    """Of the curve through the others: powers, "sqrt" or "exp"."""
    term_dtype: torch.dtype
    bins: tuple[Bin, ...]
    delta_encoding: bool
    """Each value is the difference to the one before."""
    normalize_t: bool
    """The curve's argument runs from 0 to 1, not over the integers."""

    @property
    def id_bits(self) -> int:
        """ceil(log2(d)), at least 1."""
        return max((self.d - 1).bit_length(), 1)

    @property
    def is_exact(self) -> bool:
        """Every value is stored, and finely enough for one minus their sum to mean something."""
        return self.exact_k == self.k and self.exact_dtype in (torch.float32, torch.float64)


# --------------------------------------------------------------------------------------- its options


def packing_of(plain: Any, where: str) -> Packing:
    """The Packing that a compression_config.yaml spells; InputError if it does not spell one."""
    try:
        bins = tuple(
            Bin(
                scale_dtype=DTYPES[one["scale_dtype"]],
                element_bits=int(one["element_bits"]),
                num_elements=int(one["num_elements"]),
            )
            for one in plain.get("residual_bins") or ()
        )
        packing = Packing(
            d=int(plain["d"]),
            k=int(plain["k"]),
            exact_k=int(plain["exact_k"]),
            exact_dtype=DTYPES[plain.get("exact_dtype", "float32")],
            terms=tuple(plain.get("polynomial_terms") or ()),
            term_dtype=DTYPES[plain.get("term_dtype", "float32")],
            bins=bins,
            delta_encoding=bool(plain.get("delta_encoding", True)),
            normalize_t=bool(plain.get("normalize_t", False)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: expected DistillKit's d, k, exact_k, residual_bins ..., found it broken ({error!r}); "
            "take the file that was written beside the data"
        ) from None
    _check(packing, where)
    return packing


def _check(packing: Packing, where: str) -> None:
    rest = packing.k - packing.exact_k
    if packing.d < 1 or packing.k < 1 or not 0 <= packing.exact_k <= packing.k:
        raise InputError(f"{where}: expected 0 <= exact_k <= k, found exact_k={packing.exact_k}, k={packing.k}")
    if rest and not packing.terms and not packing.bins:
        raise InputError(f"{where}: expected polynomial_terms or residual_bins for {rest} of k entries, found neither")
    if any(not 1 <= one.element_bits <= 64 or one.num_elements < 1 for one in packing.bins):
        raise InputError(f"{where}: expected residual_bins of 1 to 64 bits and 1 or more elements, found others")
    if sum(one.num_elements for one in packing.bins) > rest:
        raise InputError(f"{where}: expected residual_bins of at most k - exact_k = {rest} elements, found more")
    for term in packing.terms:
        if not (type(term) is int and term >= 0) and term not in ("sqrt", "exp"):
            raise InputError(f"{where}: expected polynomial_terms of powers, sqrt or exp, found {term!r}")


# --------------------------------------------------------------------------------------------- bytes


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` integers of `bits` bits take."""
    return -(-count * bits // 8)


def id_bytes(packing: Packing) -> int:
    """Bytes of one position's ids."""
    return packed_bytes(packing.k, packing.id_bits)


def log_prob_bytes(packing: Packing) -> int:
    """Bytes of one position's log-probabilities."""
    fixed = packing.exact_k * packing.exact_dtype.itemsize + len(packing.terms) * packing.term_dtype.itemsize
    return fixed + sum(
        one.scale_dtype.itemsize + packed_bytes(one.num_elements, one.element_bits) for one in packing.bins
    )


def unpack_bits(bytes_NW: np.ndarray, *, count: int, bits: int) -> np.ndarray:
    """uint64 [N, count]: the first `count` integers of `bits` bits in each row's stream."""
    bits_NKb = np.unpackbits(bytes_NW, axis=1)[:, : count * bits].reshape(len(bytes_NW), count, bits)
    values_NK = np.zeros((len(bytes_NW), count), dtype=np.uint64)
    for b in range(bits):
        values_NK = (values_NK << np.uint64(1)) | bits_NKb[:, :, b]
    return values_NK


def decode_ids(bytes_NW: np.ndarray, packing: Packing) -> Tensor:
    """int64 [N, k] token ids."""
    ids_NK = unpack_bits(bytes_NW, count=packing.k, bits=packing.id_bits)
    return torch.from_numpy(ids_NK.astype(np.int64))


def decode_log_probs(bytes_NW: np.ndarray, packing: Packing) -> Tensor:
    """float64 [N, k] log-probabilities, in the encoder's own arithmetic; -inf from the first missing value on."""
    exact_NK, at = _floats(bytes_NW, 0, packing.exact_k, packing.exact_dtype)
    num_rest = packing.k - packing.exact_k
    rest_NK = torch.zeros(len(bytes_NW), num_rest, dtype=packing.term_dtype)
    if packing.terms:
        coefficients_NP, at = _floats(bytes_NW, at, len(packing.terms), packing.term_dtype)
        rest_NK = _curve(coefficients_NP, packing, num_rest)
    if packing.bins:
        rest_NK = rest_NK + _residuals(bytes_NW, at, packing, num_rest)
    values_NK = torch.cat([exact_NK, rest_NK.to(packing.exact_dtype)], dim=1)
    if packing.delta_encoding:
        is_gone_NK = torch.isneginf(values_NK).cumsum(dim=1) > 0  # the difference of two -inf is a NaN
        values_NK = values_NK.float().cumsum(dim=1).to(packing.exact_dtype).masked_fill(is_gone_NK, -torch.inf)
    return values_NK.double()


def _floats(bytes_NW: np.ndarray, at: int, count: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """`count` little-endian floats of each row, and where the next field begins."""
    end = at + count * dtype.itemsize
    if count == 0:
        return torch.zeros(len(bytes_NW), 0, dtype=dtype), end
    return torch.from_numpy(bytes_NW[:, at:end].copy()).view(dtype), end


def _curve(coefficients_NP: Tensor, packing: Packing, count: int) -> Tensor:
    """sum_p coefficient_p * term_p(t) at the points t of the entries that are not exact."""
    dtype = packing.term_dtype
    points_K = torch.linspace(0, 1, count, dtype=dtype) if packing.normalize_t else torch.arange(count).to(dtype)
    rules = {"sqrt": torch.sqrt, "exp": torch.exp}
    terms = [rules[term](points_K) if isinstance(term, str) else points_K**term for term in packing.terms]
    return (coefficients_NP[:, :, None] * torch.stack(terms)).sum(dim=1)


def _residuals(bytes_NW: np.ndarray, at: int, packing: Packing, count: int) -> Tensor:
    """[N, count]; 0 for the entries that no bin reaches."""
    parts = []
    for one in packing.bins:
        scale_N1, at = _floats(bytes_NW, at, 1, one.scale_dtype)
        end = at + packed_bytes(one.num_elements, one.element_bits)
        levels_NK = unpack_bits(bytes_NW[:, at:end], count=one.num_elements, bits=one.element_bits)
        steps_NK = torch.from_numpy(levels_NK.astype(np.float64))
        centred_NK = steps_NK * 2 - 1 if one.element_bits == 1 else steps_NK - 2.0 ** (one.element_bits - 1)
        parts.append((centred_NK * scale_N1.double()).to(one.scale_dtype))
        at = end
    reached_NK = torch.cat([part.to(packing.term_dtype) for part in parts], dim=1)
    return torch.nn.functional.pad(reached_NK, (0, count - reached_NK.shape[1]))
