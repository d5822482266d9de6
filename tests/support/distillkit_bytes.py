"""DistillKit's bytes, written by hand."""

from __future__ import annotations

import struct

FORMATS = {"float16": "e", "float32": "f", "float64": "d"}


def bit_bytes(numbers: list[int], bits: int) -> bytes:
    """One stream of bits, most significant first, as a string of 0 and 1."""
    stream = "".join(format(number, f"0{bits}b") for number in numbers)
    stream += "0" * (-len(stream) % 8)
    return bytes(int(stream[i : i + 8], 2) for i in range(0, len(stream), 8))


def floats(values: list[float], dtype: str) -> bytes:
    if dtype == "bfloat16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{FORMATS[dtype]}", *values)
