"""Places: a cache lies in a local folder or under an address of an object store.

A store has no rename, no links and no locks. What it has: an object appears whole or not at all, and a reader sees
the last one that was put. `Remote` is the slice of pathlib that a cache needs, over exactly that.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pyarrow.fs as stores

from pipeline.core import files
from pipeline.core.types import InputError

CHUNK_BYTES = 8 << 20
PATIENT = {"attempts": 7, "connect_seconds": 10.0, "answer_seconds": 30.0}  # at work: sits out half a minute
BRISK = {"attempts": 2, "connect_seconds": 2.0, "answer_seconds": 2.0}  # at the start, when somebody is watching
SECRET = re.compile(r"secret|token|key|sig|password|credential", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePath:
    """A place in an object store: an object, or what a folder would be."""

    filesystem: Any = field(compare=False, repr=False)
    """pyarrow's."""
    path: str
    """As the filesystem knows it: bucket and key."""
    address: str
    """As people know it, without the query; no secret can be in it, because `open_place` takes none."""
    query: str = ""

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(
            filesystem=self.filesystem,
            path=f"{self.path}/{name}",
            address=f"{self.address}/{name if self.address.startswith('fsspec+') else quote(name)}",
            query=self.query,
        )

    def __str__(self) -> str:
        return self.address + self.query

    def __reduce__(self) -> Any:  # to a worker process: opened anew there
        return open_location, (str(self),)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> RemotePath:
        """The place that holds this one."""
        path, address = self.path.rsplit("/", 1)[0], self.address.rsplit("/", 1)[0]
        return RemotePath(filesystem=self.filesystem, path=path, address=address, query=self.query)

    def exists(self) -> bool:
        """Whether there is an object."""
        return bool(_info(self).type == stores.FileType.File)

    def read_text(self) -> str:
        """The whole object; FileNotFoundError if there is none."""
        with _answering(self), self.filesystem.open_input_stream(self.path) as stream:
            return str(stream.read().decode())

    def write_text(self, text: str) -> None:
        """Put one object, in place of any that is there."""
        with _answering(self, needs_it=False):
            _make_folder(self.parent)
            # A stream that is closed early, even by an exception, publishes what it has so far. Ctrl-C reaches only
            # the main thread, so from another an object is put whole or (by a kill) not at all.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(_put, self, text.encode()).result()

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        with _answering(self):
            try:
                self.filesystem.delete_file(self.path)
            except FileNotFoundError:
                if not missing_ok:
                    raise


Location = Path | RemotePath


def is_url(location: str) -> bool:
    """Whether a location is an address rather than a local path."""
    return "://" in location


def open_location(location: str, *, patience: dict[str, Any] | None = None) -> Location:
    """The place that a local path, a file:// address or the address of a store names."""
    if not is_url(location):
        return Path(location)
    parts = urlsplit(location)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    shown = f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}{parts.path}".rstrip("/")
    told = [name for name, _ in parse_qsl(parts.query) if SECRET.search(name)]
    if ":" in parts.netloc.rpartition("@")[0] or told:
        raise InputError(
            f"cache: expected an address without credentials, found some in that of {shown}; an address is kept in "
            "logs and run folders: give them in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)"
        )
    address = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    query = f"?{parts.query}" if parts.query else ""
    try:
        filesystem, path = stores.FileSystem.from_uri(address + query)
    except Exception as error:  # of pyarrow, or of any library behind fsspec
        raise _no_answer(address, error) from error
    if filesystem.type_name == "hdfs":
        raise InputError(
            f"cache: expected an object store or a local path, found {address}; mount it and give its path"
        )
    return RemotePath(
        filesystem=_bounded(filesystem, **(patience or PATIENT)), path=path.rstrip("/"), address=address, query=query
    )


def one_location(location: str, what: str) -> Location:
    """The place of an address, or the one existing path that a name or glob stands for."""
    return open_location(location) if is_url(location) else files.one_path(location, what)


def check_url(location: str, what: str, *, writing: bool) -> None:
    """Refuse, within seconds, an address where no cache can be written, or where there is none to read."""
    if isinstance(place := open_location(location, patience=BRISK), Path):
        return
    if place.filesystem.type_name in ("s3", "gcs", "abfs"):
        bucket = place.path.split("/")[0]
        with _answering(place):
            found = place.filesystem.get_file_info(bucket)
        if found.type == stores.FileType.NotFound:
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
    """Write plain data as JSON for people, whole or not at all."""
    if isinstance(place, Path):
        files.write_json(place, value)
    else:
        place.write_text(json.dumps(value, indent=2) + "\n")


def upload(local: Path, remote: RemotePath) -> None:
    """Put a file as an object and check its size; an exception on the way may leave a part of it behind."""
    with _answering(remote, needs_it=False):
        _make_folder(remote.parent)
        with local.open("rb") as file, remote.filesystem.open_output_stream(remote.path) as stream:
            shutil.copyfileobj(file, stream, CHUNK_BYTES)
    expected, found = local.stat().st_size, _info(remote).size
    if found != expected:
        raise InputError(
            f"{remote}: expected {expected} bytes after the upload, found {found}; run the same command again"
        )


def download(remote: RemotePath, local: Path) -> None:
    """Fetch an object into a file; FileNotFoundError if there is none."""
    with _answering(remote), remote.filesystem.open_input_stream(remote.path) as stream, local.open("wb") as file:
        shutil.copyfileobj(stream, file, CHUNK_BYTES)


def modified(place: Location) -> float:
    """When a file or object was last written, seconds, by the clock of its disk or store."""
    if isinstance(place, Path):
        return place.stat().st_mtime
    info = _info(place)
    if info.type == stores.FileType.NotFound:
        raise FileNotFoundError(str(place))
    if info.mtime_ns is not None:
        return float(info.mtime_ns) / 1e9
    with _answering(place):  # pyarrow does not ask fsspec for it
        return float(place.filesystem.handler.fs.modified(place.path).timestamp())


def age_seconds(place: Location) -> float:
    """How long ago a file or object was last written, against one written just now beside it: one clock only."""
    now = sibling(place, "now")
    try:
        now.write_text("")
        return modified(now) - modified(place)
    finally:
        now.unlink(missing_ok=True)


def sibling(place: Location, ending: str) -> Location:
    """A name of its own in the same folder, which listings pass over."""
    return place.parent / f".{place.name}.{secrets.token_hex(4)}.{ending}"


def names(folder: Location) -> list[str]:
    """The names of the files in a folder; none if there is no folder."""
    if isinstance(folder, Path):
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    with _answering(folder):
        _forget_listings(folder)
        found = folder.filesystem.get_file_info(stores.FileSelector(folder.path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == stores.FileType.File)


# ---------------------------------------------------------------------------------------- inside


@contextlib.contextmanager
def _answering(place: RemotePath, *, needs_it: bool = True) -> Iterator[None]:
    """Whatever the store, or the library behind it, has against a request becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if needs_it and isinstance(error, FileNotFoundError):
            raise
        raise _no_answer(str(place), error) from error


def _no_answer(address: str, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:400]
    return InputError(
        f"cache: expected {address} to be served, found: {reason}; check the address, AWS_ENDPOINT_URL and the "
        "credentials in the environment, then run the same command again"
    )


def _bounded(filesystem: Any, *, attempts: int, connect_seconds: float, answer_seconds: float) -> Any:
    """The same filesystem with bounds on its patience, which an address cannot express; S3 only."""
    if filesystem.type_name != "s3":
        return filesystem
    settings = filesystem.__reduce__()[1][0]
    return stores.S3FileSystem(
        **settings
        | {
            "retry_strategy": stores.AwsStandardS3RetryStrategy(max_attempts=attempts),
            "connect_timeout": connect_seconds,
            "request_timeout": answer_seconds,
            "allow_delayed_open": True,  # a small object is one PUT then, not three requests
        }
    )


def _put(place: RemotePath, content: bytes) -> None:
    with place.filesystem.open_output_stream(place.path) as stream:
        stream.write(content)


def _info(place: RemotePath) -> Any:
    with _answering(place):
        _forget_listings(place)
        return place.filesystem.get_file_info(place.path)


def _make_folder(place: RemotePath) -> None:
    if place.filesystem.type_name.startswith("py::"):  # what fsspec knows may have folders
        place.filesystem.create_dir(place.path, recursive=True)


def _forget_listings(place: RemotePath) -> None:
    if place.filesystem.type_name.startswith("py::"):  # fsspec answers from memory, and others write too
        place.filesystem.handler.fs.invalidate_cache()
