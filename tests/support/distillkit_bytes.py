"""An encoder of DistillKit's compressed bytes, slow and simple, to test the decoder against."""

from __future__ import annotations

import struct

FORMATS = {"float16": "e", "float32": "f", "float64": "d"}


def bit_bytes(numbers: list[int], bits: int) -> bytes:
    """Integers of `bits` bits as one stream, most significant bit first, padded with zeros to a full byte."""
    stream = "".join(format(number, f"0{bits}b") for number in numbers)
    stream += "0" * (-len(stream) % 8)
    return bytes(int(stream[i : i + 8], 2) for i in range(0, len(stream), 8))


def floats(values: list[float], dtype: str) -> bytes:
    """Little-endian floats; a bfloat16 is the upper half of a float32."""
    if dtype == "bfloat16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{FORMATS[dtype]}", *values)
