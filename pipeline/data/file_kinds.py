"""What a file's name tells, its format and its compression; and its bytes, unpacked."""

from __future__ import annotations

import contextlib
import io
import lzma
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.core.types import InputError

FORMATS = {
    **{".jsonl": "json", ".ndjson": "json", ".json": "json", ".txt": "text", ".csv": "csv", ".tsv": "csv"},
    **{".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"},
}
COMPRESSIONS = (".gz", ".zst", ".xz")
DESCRIPTIONS = ("dataset_info.json", "dataset_dict.json", "state.json")  # `datasets` writes them beside its data
ARROW_FILE = b"ARROW1"  # how an Arrow file begins; an Arrow stream does not
BUFFER_BYTES = 1 << 16  # of unpacked bytes; small, so that the position in the packed file is nearly right


def file_format(file: Path) -> str | None:
    """json, text, csv, parquet or arrow, from the file's name; None if it has no such ending."""
    return FORMATS.get(format_suffix(file))


def format_suffix(file: Path) -> str:
    """The suffix before that of the compression, in small letters: ".csv" of A.CSV.gz."""
    return Path(file.name.lower().removesuffix(_compression(file))).suffix


def endings(formats: Collection[str] = tuple(FORMATS.values())) -> str:
    """The endings of some formats, for messages."""
    suffixes = [suffix for suffix, name in FORMATS.items() if name in formats]
    return f"{', '.join(suffixes)} (each also with {', '.join(COMPRESSIONS)})"


def files_in(folder: Path, formats: Collection[str] = tuple(FORMATS.values())) -> list[Path]:
    """The files of these formats in a folder and its subfolders, sorted.

    Hidden ones (.ipynb_checkpoints, ._name) and the descriptions that `datasets` writes are left out.
    """
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and file_format(path) in formats)
    files = (path for path in files if path.name not in DESCRIPTIONS)
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _compression(file: Path) -> str:
    suffix = file.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """InputError, which names the file, where it cannot be read or unpacked."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise InputError(f"{file}: expected a readable file, found it damaged ({error}); replace it") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """A file's bytes, unpacked while they are read."""

    stream: io.BufferedReader
    position: Callable[[], int]
    """The number of bytes of the (packed) file read so far."""


@contextlib.contextmanager
def unpacked(file: Path) -> Iterator[Unpacked]:
    """Open a file for one pass from its beginning."""
    compression = _compression(file)
    with file.open("rb") as packed:
        if not compression:
            yield Unpacked(stream=packed, position=packed.tell)
            return
        if not packed.peek(1):  # pyarrow would take it for the packed form of nothing
            raise EOFError("a compressed file has at least a head, this one is empty")
        with io.BufferedReader(_unpacking(packed, compression), BUFFER_BYTES) as stream:
            yield Unpacked(stream=stream, position=packed.tell)


def _unpacking(packed: BinaryIO, compression: str) -> Any:
    if compression == ".xz":
        return lzma.LZMAFile(packed)
    return pa.CompressedInputStream(packed, "gzip" if compression == ".gz" else "zstd")


@contextlib.contextmanager
def seekable(file: Path) -> Iterator[str | BinaryIO]:
    """The file's path; or, if it is compressed, a temporary file without a name that holds its unpacked bytes."""
    if not _compression(file):
        yield str(file)
        return
    with tempfile.TemporaryFile() as whole:
        with unpacked(file) as source:
            while block := source.stream.read(1 << 20):
                try:
                    whole.write(block)
                    whole.flush()
                except OSError as error:
                    raise InputError(
                        f"{file}: expected room to unpack it in {tempfile.gettempdir()}, found {error.strerror}; free "
                        "disk space, or set TMPDIR to another folder"
                    ) from None
        whole.seek(0)
        yield whole


def arrow_batches(file: Path) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The batches of an Arrow stream or file, each with the bytes of the file read so far."""
    with unpacked(file) as source:
        if source.stream.peek(len(ARROW_FILE))[: len(ARROW_FILE)] != ARROW_FILE:
            for batch in pa.ipc.open_stream(source.stream):
                yield batch, source.position()
            return
    with seekable(file) as opened:
        batches = pa.ipc.open_file(pa.memory_map(opened) if isinstance(opened, str) else opened)
        for number in range(batches.num_record_batches):
            yield batches.get_batch(number), file.stat().st_size * (number + 1) // batches.num_record_batches
