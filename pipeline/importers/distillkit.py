"""DistillKit's compressed bytes -> token ids and log-probabilities, for all positions of a row at once.

Ids: one stream of bits for each position, most significant bit first, padded with zeros to a full byte.
Log-probabilities, little-endian, one after another: first the largest ones uncompressed, then the coefficients of a
curve through the others, then bins of residuals from that curve, each bin a scale and small integers.
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
class ResidualBin:
    """Consecutive residuals that share a scale: residual = scale * (integer - 2 ** (element_bits - 1))."""

    scale_dtype: torch.dtype
    element_bits: int
    """Bits of an integer; 1 stands for a residual of -scale or scale."""
    num_elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """The compression of one data set: its compression_config.yaml, with the names used there."""

    d: int
    """Size of the vocabulary; it gives the number of bits of an id."""
    k: int
    """Entries of a position."""
    exact_k: int
    """The number of largest entries that are stored uncompressed."""
    exact_dtype: torch.dtype
    terms: tuple[int | str, ...]
    """The terms of the curve through the other entries: powers, "sqrt" or "exp"."""
    term_dtype: torch.dtype
    bins: tuple[ResidualBin, ...]
    delta_encoding: bool
    """Each value is stored as its difference from the one before."""
    normalize_t: bool
    """The curve's argument runs from 0 to 1 instead of over the integers."""

    @property
    def id_bits(self) -> int:
        """ceil(log2(d)), at least 1."""
        return max((self.d - 1).bit_length(), 1)

    @property
    def is_exact(self) -> bool:
        """Every value is stored uncompressed and precisely enough to compute the tail as 1 - sum p."""
        return self.exact_k == self.k and self.exact_dtype in (torch.float32, torch.float64)


# --------------------------------------------------------------------------------------- its options


def parse_compression(plain: Any, where: str) -> Compression:
    """The Compression of a compression_config.yaml that was read as plain data; InputError if it is not valid."""
    try:
        bins = tuple(
            ResidualBin(
                scale_dtype=DTYPES[residual_bin["scale_dtype"]],
                element_bits=int(residual_bin["element_bits"]),
                num_elements=int(residual_bin["num_elements"]),
            )
            for residual_bin in plain.get("residual_bins") or ()
        )
        compression = Compression(
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
    _check(compression, where)
    return compression


def _check(compression: Compression, where: str) -> None:
    num_rest = compression.k - compression.exact_k
    if compression.d < 1 or compression.k < 1 or not 0 <= compression.exact_k <= compression.k:
        raise InputError(f"{where}: expected 0 <= exact_k <= k, found exact_k={compression.exact_k}, k={compression.k}")
    if num_rest and not compression.terms and not compression.bins:
        raise InputError(
            f"{where}: expected polynomial_terms or residual_bins for {num_rest} of k entries, found neither"
        )
    if any(not 1 <= part.element_bits <= 64 or part.num_elements < 1 for part in compression.bins):
        raise InputError(f"{where}: expected residual_bins of 1 to 64 bits and 1 or more elements, found others")
    if sum(part.num_elements for part in compression.bins) > num_rest:
        raise InputError(f"{where}: expected residual_bins of at most k - exact_k = {num_rest} elements, found more")
    for term in compression.terms:
        if not (type(term) is int and term >= 0) and term not in ("sqrt", "exp"):
            raise InputError(f"{where}: expected polynomial_terms of powers, sqrt or exp, found {term!r}")


# --------------------------------------------------------------------------------------------- bytes


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` integers of `bits` bits, rounded up: 3 integers of 5 bits take 2 bytes."""
    return -(-count * bits // 8)


def id_bytes(compression: Compression) -> int:
    """Bytes of one position's ids."""
    return packed_bytes(compression.k, compression.id_bits)


def log_prob_bytes(compression: Compression) -> int:
    """Bytes of one position's log-probabilities."""
    fixed = (
        compression.exact_k * compression.exact_dtype.itemsize
        + len(compression.terms) * compression.term_dtype.itemsize
    )
    return fixed + sum(
        part.scale_dtype.itemsize + packed_bytes(part.num_elements, part.element_bits) for part in compression.bins
    )


def unpack_bits(bytes_NW: np.ndarray, *, count: int, bits: int) -> np.ndarray:
    """uint64 [N, count]: the first `count` integers of `bits` bits in each row's stream.

    The byte 0b01010011 holds two integers of 3 bits: 0b010 = 2 and 0b100 = 4.
    """
    bits_NKb = np.unpackbits(bytes_NW, axis=1)[:, : count * bits].reshape(len(bytes_NW), count, bits)
    values_NK = np.zeros((len(bytes_NW), count), dtype=np.uint64)
    for b in range(bits):
        values_NK = (values_NK << np.uint64(1)) | bits_NKb[:, :, b]
    return values_NK


def decode_ids(bytes_NW: np.ndarray, compression: Compression) -> Tensor:
    """int64 [N, k] token ids."""
    ids_NK = unpack_bits(bytes_NW, count=compression.k, bits=compression.id_bits)
    return torch.from_numpy(ids_NK.astype(np.int64))


def decode_log_probs(bytes_NW: np.ndarray, compression: Compression) -> Tensor:
    """float64 [N, k] log-probabilities, computed in the encoder's own types; -inf from the first missing value on."""
    exact_NK, start = _floats(bytes_NW, 0, compression.exact_k, compression.exact_dtype)
    num_rest = compression.k - compression.exact_k
    rest_NK = torch.zeros(len(bytes_NW), num_rest, dtype=compression.term_dtype)
    if compression.terms:
        coefficients_NP, start = _floats(bytes_NW, start, len(compression.terms), compression.term_dtype)
        rest_NK = _curve(coefficients_NP, compression, num_rest)
    if compression.bins:
        rest_NK = rest_NK + _residuals(bytes_NW, start, compression, num_rest)
    values_NK = torch.cat([exact_NK, rest_NK.to(compression.exact_dtype)], dim=1)
    if compression.delta_encoding:
        is_missing_NK = torch.isneginf(values_NK).cumsum(dim=1) > 0  # the difference of two -inf is a NaN
        values_NK = values_NK.float().cumsum(dim=1).to(compression.exact_dtype).masked_fill(is_missing_NK, -torch.inf)
    return values_NK.double()


def _floats(bytes_NW: np.ndarray, start: int, count: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """`count` little-endian floats of each row from byte `start` on, and the first byte after them."""
    end = start + count * dtype.itemsize
    if count == 0:
        return torch.zeros(len(bytes_NW), 0, dtype=dtype), end
    return torch.from_numpy(bytes_NW[:, start:end].copy()).view(dtype), end


def _curve(coefficients_NP: Tensor, compression: Compression, count: int) -> Tensor:
    """sum_p coefficient_p * term_p(t) at the points t of the entries that are not stored uncompressed."""
    dtype = compression.term_dtype
    points_K = torch.linspace(0, 1, count, dtype=dtype) if compression.normalize_t else torch.arange(count).to(dtype)
    functions = {"sqrt": torch.sqrt, "exp": torch.exp}
    terms = [functions[term](points_K) if isinstance(term, str) else points_K**term for term in compression.terms]
    return (coefficients_NP[:, :, None] * torch.stack(terms)).sum(dim=1)


def _residuals(bytes_NW: np.ndarray, start: int, compression: Compression, count: int) -> Tensor:
    """The residuals of `count` entries: [N, count]; 0 for the last entries where the bins hold fewer."""
    residuals = []
    for part in compression.bins:
        scale_N1, start = _floats(bytes_NW, start, 1, part.scale_dtype)
        end = start + packed_bytes(part.num_elements, part.element_bits)
        integers_NK = unpack_bits(bytes_NW[:, start:end], count=part.num_elements, bits=part.element_bits)
        levels_NK = torch.from_numpy(integers_NK.astype(np.float64))
        centred_NK = levels_NK * 2 - 1 if part.element_bits == 1 else levels_NK - 2.0 ** (part.element_bits - 1)
        residuals.append((centred_NK * scale_N1.double()).to(part.scale_dtype))
        start = end
    residuals_NK = torch.cat([part_NK.to(compression.term_dtype) for part_NK in residuals], dim=1)
    return torch.nn.functional.pad(residuals_NK, (0, count - residuals_NK.shape[1]))
