"""Locations: a cache lies in a local folder or at the URL of an object store.

A store has no rename, no links and no locks. Its guarantees: an object appears complete or not at all, and a reader
sees the last one that was put. `RemotePath` has the methods of pathlib that a cache needs, built on these guarantees.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

import pyarrow.fs as stores

from pipeline.core import files
from pipeline.core.types import InputError

CHUNK_BYTES = 8 << 20
SECRET_NAME = re.compile(r"secret|token|key|sig|password|credential", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How long requests to S3 are tried."""

    max_attempts: int
    connect_seconds: float
    request_seconds: float


RETRIES = Retries(max_attempts=7, connect_seconds=10.0, request_seconds=30.0)  # survives an outage of half a minute
START_RETRIES = Retries(max_attempts=2, connect_seconds=2.0, request_seconds=2.0)  # a wrong URL fails at once


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePath:
    """A path in an object store: an object, or a prefix that stands for a folder."""

    filesystem: Any = field(compare=False, repr=False)
    """pyarrow's."""
    path: str
    """Bucket and key, as the filesystem takes them."""
    address: str
    """The URL without its query; it holds no secret, because `open_location` accepts none."""
    query: str = ""
    """The URL's query with its question mark, or nothing."""

    def __truediv__(self, name: str) -> RemotePath:
        quoted = name if self.address.startswith("fsspec+") else quote(name)
        return replace(self, path=f"{self.path}/{name}", address=f"{self.address}/{quoted}")

    def __str__(self) -> str:
        return self.address + self.query

    def __reduce__(self) -> Any:  # for a worker process, which opens it again
        return open_location, (str(self),)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> RemotePath:
        """The path without its last part."""
        return replace(self, path=self.path.rsplit("/", 1)[0], address=self.address.rsplit("/", 1)[0])

    def exists(self) -> bool:
        """Whether there is an object at this path."""
        return bool(_info(self).type == stores.FileType.File)

    def read_text(self) -> str:
        """The object's content; FileNotFoundError if there is none."""
        with _as_input_error(self), self.filesystem.open_input_stream(self.path) as stream:
            return str(stream.read().decode())

    def write_text(self, text: str) -> None:
        """Put the object, over any that is there."""
        with _as_input_error(self, not_found_too=True):
            _make_folder(self.parent)
            # A stream that is closed early, even by an exception, publishes what was written so far. Ctrl-C interrupts
            # the main thread only, so another thread puts the object complete or (after a kill) not at all.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(_put, self, text.encode()).result()

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        with _as_input_error(self):
            try:
                self.filesystem.delete_file(self.path)
            except FileNotFoundError:
                if not missing_ok:
                    raise


Location = Path | RemotePath


def open_location(location: str, *, retries: Retries = RETRIES) -> Location:
    """The location of a local path, a file:// URL or the URL of an object store; InputError if it cannot be opened."""
    if not files.is_url(location):
        return Path(location)
    parts = urlsplit(location)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    _check_has_no_credentials(parts)
    address = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    query = f"?{parts.query}" if parts.query else ""
    try:
        filesystem, path = stores.FileSystem.from_uri(address + query)
    except Exception as error:  # of pyarrow, or of any library behind fsspec
        raise _request_error(address, error) from error
    if filesystem.type_name == "hdfs":
        raise InputError(
            f"cache: expected an object store or a local path, found {address}; mount it and give its path"
        )
    return RemotePath(
        filesystem=_with_retries(filesystem, retries), path=path.rstrip("/"), address=address, query=query
    )


def _check_has_no_credentials(parts: SplitResult) -> None:
    """Raise InputError, without the secret, for a URL with a password or with a secret in its query."""
    has_password = ":" in parts.netloc.rpartition("@")[0]
    has_secret = any(SECRET_NAME.search(name) for name, _ in parse_qsl(parts.query))
    if has_password or has_secret:
        shown = f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}{parts.path}".rstrip("/")
        raise InputError(
            f"cache: expected an address without credentials, found some in that of {shown}; an address is kept in "
            "logs and run folders: give them in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)"
        )


def one_location(location: str, what: str) -> Location:
    """The location of a URL, or the one existing path that a name or glob matches."""
    return open_location(location) if files.is_url(location) else files.one_path(location, what)


def check_url(location: str, what: str, *, writing: bool) -> None:
    """Raise InputError, within seconds, for a URL where no cache can be written, or where there is none to read."""
    place = open_location(location, retries=START_RETRIES)
    if isinstance(place, Path):
        return
    if place.filesystem.type_name in ("s3", "gcs", "abfs"):
        bucket = place.path.split("/")[0]
        with _as_input_error(place):
            info = place.filesystem.get_file_info(bucket)
        if info.type == stores.FileType.NotFound:
            raise InputError(
                f"{what}: expected the bucket {bucket!r} of {place}, found no such bucket; create it, or check "
                "AWS_ENDPOINT_URL and the credentials in the environment"
            )
    if writing:
        probe = place / f".{secrets.token_hex(8)}.probe"
        probe.write_text("")
        probe.unlink(missing_ok=True)
    elif not (place / "manifest.json").exists():
        raise InputError(
            f"{what}: expected {place / 'manifest.json'}, found no such file; capture with scripts/capture.py"
        )


def write_json(place: Location, value: Any) -> None:
    """Write plain data as indented JSON, complete or not at all."""
    if isinstance(place, Path):
        files.write_json(place, value)
    else:
        place.write_text(json.dumps(value, indent=2) + "\n")


def upload(local: Path, remote: RemotePath) -> None:
    """Put a file as an object and check its size; an exception meanwhile may leave a part of it in the store."""
    with _as_input_error(remote, not_found_too=True):
        _make_folder(remote.parent)
        with local.open("rb") as file, remote.filesystem.open_output_stream(remote.path) as stream:
            shutil.copyfileobj(file, stream, CHUNK_BYTES)
    expected, found = local.stat().st_size, _info(remote).size
    if found != expected:
        raise InputError(
            f"{remote}: expected {expected} bytes after the upload, found {found}; run the same command again"
        )


def download(remote: RemotePath, local: Path, start: int = 0, end: int | None = None) -> None:
    """Fetch the bytes `start` to `end` of an object, or all, into a file; FileNotFoundError if there is no object."""
    with _as_input_error(remote), remote.filesystem.open_input_file(remote.path) as stream, local.open("wb") as file:
        stream.seek(start)
        for left in range((stream.size() if end is None else end) - start, 0, -CHUNK_BYTES):
            file.write(stream.read(min(left, CHUNK_BYTES)))


def modified(place: Location) -> float:
    """When a file or object was last written: seconds since 1970 by the clock of its disk or store."""
    if isinstance(place, Path):
        return place.stat().st_mtime
    info = _info(place)
    if info.type == stores.FileType.NotFound:
        raise FileNotFoundError(str(place))
    if info.mtime_ns is not None:
        return float(info.mtime_ns) / 1e9
    with _as_input_error(place):  # pyarrow does not ask fsspec for it
        return float(place.filesystem.handler.fs.modified(place.path).timestamp())


def age_seconds(place: Location) -> float:
    """How long ago a file or object was last written, compared with one written now, so by one clock.

    That one appears a folder above: a change of the folder itself is a sign of work in it (scripts/status.py).
    """
    now = sibling(place.parent, "now")
    try:
        now.write_text("")
        return modified(now) - modified(place)
    finally:
        now.unlink(missing_ok=True)


def sibling(place: Location, ending: str) -> Location:
    """An unused hidden name in the same folder."""
    return place.parent / f".{place.name}.{secrets.token_hex(4)}.{ending}"


def names(folder: Location) -> list[str]:
    """The names of the files in a folder; empty if there is no folder."""
    if isinstance(folder, Path):
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    with _as_input_error(folder):
        _clear_fsspec_cache(folder)
        infos = folder.filesystem.get_file_info(stores.FileSelector(folder.path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == stores.FileType.File)


# --------------------------------------------------------------------------------- errors and requests


@contextlib.contextmanager
def _as_input_error(place: RemotePath, *, not_found_too: bool = False) -> Iterator[None]:
    """Any error of the store, or of the library behind it, becomes an InputError; FileNotFoundError on request only."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not not_found_too:
            raise
        raise _request_error(str(place), error) from error


def _request_error(address: str, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:400]
    return InputError(
        f"cache: expected {address} to be served, found: {reason}; check the address, AWS_ENDPOINT_URL and the "
        "credentials in the environment, then run the same command again"
    )


def _with_retries(filesystem: Any, retries: Retries) -> Any:
    """The same filesystem with limits on attempts and seconds, which a URL cannot express; S3 only."""
    if filesystem.type_name != "s3":
        return filesystem
    settings = filesystem.__reduce__()[1][0]
    changes = {
        "retry_strategy": stores.AwsStandardS3RetryStrategy(max_attempts=retries.max_attempts),
        "connect_timeout": retries.connect_seconds,
        "request_timeout": retries.request_seconds,
        "allow_delayed_open": True,  # a small object takes one PUT then, not three requests
    }
    return stores.S3FileSystem(**{**settings, **changes})


def _put(place: RemotePath, content: bytes) -> None:
    with place.filesystem.open_output_stream(place.path) as stream:
        stream.write(content)


def _info(place: RemotePath) -> Any:
    with _as_input_error(place):
        _clear_fsspec_cache(place)
        return place.filesystem.get_file_info(place.path)


def _make_folder(place: RemotePath) -> None:
    if place.filesystem.type_name.startswith("py::"):  # fsspec's file systems may have folders
        place.filesystem.create_dir(place.path, recursive=True)


def _clear_fsspec_cache(place: RemotePath) -> None:
    if place.filesystem.type_name.startswith("py::"):  # fsspec caches listings, and other processes write too
        place.filesystem.handler.fs.invalidate_cache()
