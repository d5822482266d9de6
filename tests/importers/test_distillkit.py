"""Bytes that a slow encoder in the tests writes, bit by bit, are decoded to its input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.types import InputError
from pipeline.importers.distillkit import (
    DTYPES,
    decode_ids,
    decode_log_probs,
    id_bytes,
    log_prob_bytes,
    parse_compression,
    unpack_bits,
)
from support.distillkit_bytes import bit_bytes, floats


def compression(**settings: Any) -> Any:
    return parse_compression({"d": 20, "k": 3, "exact_k": 3, "residual_bins": [], **settings}, "config")


def rows_of(*rows: bytes) -> np.ndarray:
    return np.stack([np.frombuffer(row, dtype=np.uint8) for row in rows])


@pytest.mark.parametrize(
    ("d", "ids", "packed"),
    [(20, [5, 9, 3], "2A 46"), (151936, [100000, 7, 151643], "61 A8 00 00 79 41 6C")],
)
def test_worked_examples_of_ids(d: int, ids: list[int], packed: str) -> None:
    assert decode_ids(rows_of(bytes.fromhex(packed)), compression(d=d)).tolist() == [ids]
    assert id_bytes(compression(d=d)) == len(bytes.fromhex(packed))
    assert bit_bytes(ids, compression(d=d).id_bits) == bytes.fromhex(packed)


def test_worked_example_of_a_curve() -> None:
    chosen = compression(exact_k=2, k=4, polynomial_terms=[0, 1], delta_encoding=False)
    packed = rows_of(bytes.fromhex("000000BF 0000C0BF 000000C0 000080BF"))
    assert decode_log_probs(packed, chosen).tolist() == [[-0.5, -1.5, -2.0, -3.0]]
    assert log_prob_bytes(chosen) == 16


def test_worked_example_of_a_bin() -> None:
    residual_bin = {"scale_dtype": "float16", "element_bits": 4, "num_elements": 2}
    chosen = compression(exact_k=0, k=2, residual_bins=[residual_bin], delta_encoding=False)
    assert decode_log_probs(rows_of(bytes.fromhex("0036 30")), chosen).tolist() == [[-1.875, -3.0]]
    assert log_prob_bytes(chosen) == 3


@settings(deadline=None)
@given(
    bits=st.integers(1, 64),
    data=st.data(),
    count=st.integers(1, 9),
    num_rows=st.integers(1, 4),
    spare=st.integers(0, 2),
)
def test_integers_of_any_width(bits: int, data: Any, count: int, num_rows: int, spare: int) -> None:
    numbers = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    rows = [data.draw(numbers) for _ in range(num_rows)]
    packed = rows_of(*(bit_bytes(row, bits) + b"\xff" * spare for row in rows))
    assert unpack_bits(packed, count=count, bits=bits).tolist() == rows


@pytest.mark.parametrize("d", [1, 2, 3, 256, 257, 65_536, 65_537, 2**31])
def test_bits_of_an_id(d: int) -> None:
    largest = d - 1
    assert compression(d=d, k=1, exact_k=1).id_bits == max(len(format(largest, "b")), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [False, True])
def test_exact_values_of_every_type(dtype: str, delta: bool) -> None:
    rows = [[-0.5, -0.75, -1.25, -4.0], [-1.0, -1.0, -1.5, -2.0]]  # exact in every type, and so are their differences
    stored = [[row[0], *np.diff(row).tolist()] if delta else row for row in rows]
    packed = rows_of(*(floats(row, dtype) for row in stored))
    chosen = compression(k=4, exact_k=4, exact_dtype=dtype, delta_encoding=delta)
    assert decode_log_probs(packed, chosen).tolist() == rows
    assert chosen.is_exact == (dtype in ("float32", "float64"))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_curve_with_every_term_and_residuals_about_it(normalize: bool) -> None:
    num_rest, coefficients = 5, [-3.0, -0.25, 0.125, -0.5, -0.0625]
    points = [j / (num_rest - 1) if normalize else float(j) for j in range(num_rest)]
    curve = [
        sum(c * x for c, x in zip(coefficients, [1.0, t, t * t, t**0.5, float(np.exp(t))], strict=True)) for t in points
    ]
    bins = [
        {"scale_dtype": "float32", "element_bits": 3, "num_elements": 2},
        {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
    ]
    packed = floats([-0.5], "float32") + floats(coefficients, "float32")
    packed += floats([0.25], "float32") + bit_bytes([7, 0], 3) + floats([0.5], "float32") + bit_bytes([1, 0], 1)
    residuals = [(7 - 4) * 0.25, (0 - 4) * 0.25, 0.5, -0.5, 0.0]  # the last entry has none
    chosen = compression(
        k=6,
        exact_k=1,
        polynomial_terms=[0, 1, 2, "sqrt", "exp"],
        residual_bins=bins,
        delta_encoding=False,
        normalize_t=normalize,
    )
    expected = torch.tensor([[-0.5, *(c + r for c, r in zip(curve, residuals, strict=True))]], dtype=torch.float64)
    assert torch.allclose(decode_log_probs(rows_of(packed), chosen), expected, rtol=1e-6)
    assert log_prob_bytes(chosen) == len(packed)
    assert not chosen.is_exact


def test_what_follows_a_missing_value_is_missing() -> None:
    """The encoder takes the difference of two -inf, which is a NaN."""
    packed = rows_of(floats([-1.0, -1.0, -float("inf"), float("nan")], "float32"))
    assert decode_log_probs(packed, compression(k=4, exact_k=4)).tolist() == [[-1.0, -2.0, -torch.inf, -torch.inf]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": None}, "config: expected DistillKit's d, k"),
        ({"exact_dtype": "float8"}, "found it broken (KeyError('float8'))"),
        ({"exact_k": 4}, "expected 0 <= exact_k <= k, found exact_k=4, k=3"),
        ({"exact_k": 2}, "expected polynomial_terms or residual_bins for 1 of k entries, found neither"),
        ({"exact_k": 2, "polynomial_terms": ["cos"]}, "expected polynomial_terms of powers, sqrt or exp, found 'cos'"),
        (
            {"exact_k": 2, "residual_bins": [{"scale_dtype": "float32", "element_bits": 65, "num_elements": 1}]},
            "expected residual_bins of 1 to 64 bits",
        ),
        (
            {"exact_k": 2, "residual_bins": [{"scale_dtype": "float32", "element_bits": 4, "num_elements": 2}]},
            "expected residual_bins of at most k - exact_k = 1 elements, found more",
        ),
    ],
)
def test_a_configuration_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        compression(**changes)
    assert message in str(refused.value)
