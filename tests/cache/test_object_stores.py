"""A cache in a bucket equals the cache in a folder, also after errors; moto serves S3 on the loopback interface."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pipeline.cache import downloads
from pipeline.cache import manifest as manifests
from pipeline.cache.downloads import Downloads
from pipeline.cache.leases import hold_lease
from pipeline.cache.shard_parts import parts_of
from pipeline.cache.shards import ShardReader, shard_writer
from pipeline.capture.driver import run
from pipeline.config.schema import CaptureConfig, Dtype, ModelConfig, Targets, TextConfig
from pipeline.core import object_store
from pipeline.core.files import file_hash
from pipeline.core.object_store import Location, RemotePath, open_location
from pipeline.core.types import InputError
from pipeline.monitoring.metrics import MetricsFile
from support.commands import ROOT, capture_arguments, script, train_arguments
from support.tiny import prompts, write_lines

SECRET = "s3cr3t-of-the-bucket"


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A bucket named `bucket`, opened by boto3; this process and its children find the server by the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "user")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield boto3.resource("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
    server.stop()


@pytest.fixture(scope="module")
def captured(bucket: Any, teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RemotePath:
    """The capture of conftest's `cache`, made by the script at s3://bucket/tiny."""
    arguments = capture_arguments(teacher, data, cache="s3://bucket/tiny")
    done = script("capture", *arguments, cwd=tmp_path_factory.mktemp("nothing"))
    assert done.stdout.strip() == "s3://bucket/tiny"
    assert SECRET not in done.stdout + done.stderr
    return remote("s3://bucket/tiny")


def remote(address: str) -> RemotePath:
    location = open_location(address)
    assert isinstance(location, RemotePath)
    return location


def objects(bucket: Any, prefix: str) -> dict[str, bytes]:
    """The objects below a prefix; not the markers of folders, which end in a slash."""
    listing = bucket.objects.filter(Prefix=f"{prefix}/")
    return {o.key[len(prefix) + 1 :]: o.get()["Body"].read() for o in listing if not o.key.endswith("/")}


def copied(bucket: Any, source: str, to: str) -> RemotePath:
    for name, content in objects(bucket, source).items():
        bucket.put_object(Key=f"{to}/{name}", Body=content)
    return remote(f"s3://bucket/{to}")


def config_of(teacher: Path, data: Path, **changes: Any) -> CaptureConfig:
    chosen: dict[str, Any] = {
        "name": "tiny",
        "teacher": ModelConfig(path=str(teacher), dtype=Dtype.float32, attention="sdpa"),
        "corpus": TextConfig(files=[str(data / "corpus.jsonl")], targets=Targets.next, end_token=False),
        "window": 48,
        "k": 8,
        "temperatures": [1.0, 2.0],
        "records_per_shard": 25,
        "batch_sequences": 4,
        **changes,
    }
    return CaptureConfig(**chosen)


@pytest.fixture(scope="module")
def local_cache(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local capture by this process; another capture by it repeats the same bits."""
    made = run(config_of(teacher, data, caches_dir=str(tmp_path_factory.mktemp("local"))))
    assert isinstance(made, Path)
    return made


def rows(reader: ShardReader) -> list[tuple[bytes, list[int], list[float]]]:
    pairs = [reader.row(block, r) for block, count in enumerate(reader.blocks) for r in range(count)]
    return [(sequence.key, c.top.ids_NK.tolist(), c.top.log_tail_NC.tolist()) for sequence, c in pairs]


# ------------------------------------------------------------------------------------------ the cache


def test_a_bucket_holds_the_files_of_a_folder(bucket: Any, captured: RemotePath, cache: Path, tmp_path: Path) -> None:
    found = objects(bucket, "tiny")
    shards = sorted((cache / "shards").glob("*.parquet"))
    infos = [f"shards/{path.stem}.json" for path in shards]
    named = [f"shards/{json.loads(found[info])['file']}" for info in infos]
    for path, name in zip(shards, named, strict=True):  # index, content, and a token of the upload's own
        assert re.fullmatch(rf"shards/{path.stem}-{file_hash(path)[:12]}-[0-9a-f]{{8}}\.parquet", name)
    assert sorted(found) == sorted(["manifest.json", *infos, *named])  # no lease, no probe, no unfinished upload
    for path, name, info in zip(shards, named, infos, strict=True):
        assert found[name] == path.read_bytes()
        expected = json.loads(path.with_suffix(".json").read_text()) | {"file": Path(name).name}
        assert json.loads(found[info]) == expected
    assert json.loads(found["manifest.json"]) == json.loads((cache / "manifest.json").read_text())
    assert rows(ShardReader(cache)) == rows(ShardReader(captured, downloads=Downloads(folder=tmp_path, limit_bytes=1)))


def test_the_same_command_again_uploads_no_shard(bucket: Any, captured: RemotePath, teacher: Path, data: Path) -> None:
    before = {o.key: o.last_modified for o in bucket.objects.filter(Prefix="tiny/shards/0")}
    time.sleep(1.1)  # S3 counts seconds
    assert run(config_of(teacher, data, cache="s3://bucket/tiny")) == captured
    assert {o.key: o.last_modified for o in bucket.objects.filter(Prefix="tiny/shards/0")} == before


@pytest.mark.slow
def test_training_from_a_bucket_equals_training_from_a_folder(
    captured: RemotePath, cache: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    """The folder of downloads holds as many bytes as one shard; the run's name is the same too."""

    def losses(place: Location, **changes: Any) -> tuple[str, list[dict[str, Any]], str]:
        done = script("train", *train_arguments(student, data, str(place), **changes), cwd=tmp_path)
        (folder,) = (tmp_path / changes["runs_dir"]).iterdir()
        timed = {"seconds", "data_wait_seconds", "tokens_per_second", "data_wait_fraction", "peak_memory_bytes"}
        steps = [{k: v for k, v in row.items() if k not in timed} for row in MetricsFile.read(folder / "metrics.jsonl")]
        return folder.name, steps, done.stderr + "".join(p.read_text() for p in folder.glob("*.yaml"))

    name, steps, _ = losses(cache, runs_dir="local", micro_batch=4)
    assert len(steps) == 6
    largest = max(path.stat().st_size for path in (cache / "shards").glob("*.parquet"))
    through = losses(captured, runs_dir="remote", micro_batch=4, downloads__dir="down", downloads__bytes=largest)
    assert (name, steps) == through[:2]
    assert SECRET not in through[2]
    kept = [path for path in (tmp_path / "down").iterdir() if path.suffix != ".lock"]
    assert 0 < sum(path.stat().st_size for path in kept) <= largest


def test_a_cache_of_other_inputs_at_the_same_address_is_refused(
    captured: RemotePath, teacher: Path, data: Path
) -> None:
    with pytest.raises(InputError, match=r"s3://bucket/tiny was made of something else.*\n  k: expected 9, found 8"):
        run(config_of(teacher, data, cache=str(captured), k=9))


def test_an_exact_folder(teacher: Path, data: Path, local_cache: Path, tmp_path: Path) -> None:
    assert run(config_of(teacher, data, cache=str(tmp_path / "here"))) == tmp_path / "here"
    assert run(config_of(teacher, data, cache=(tmp_path / "here").as_uri())) == tmp_path / "here"
    assert rows(ShardReader(tmp_path / "here")) == rows(ShardReader(local_cache))


def test_a_cache_on_an_fsspec_file_system(teacher: Path, data: Path, local_cache: Path, tmp_path: Path) -> None:
    made = run(config_of(teacher, data, caches_dir="fsspec+memory://caches", name="with space"))
    assert str(made) == f"fsspec+memory://caches/with space-{manifests.load_manifest(local_cache).fingerprint[:12]}"
    assert pickle.loads(pickle.dumps(made)) == made
    num_shards = len(list((local_cache / "shards").glob("*.parquet")))
    infos = [manifests.shard_info(made, index) for index in range(num_shards)]
    files = [name for index, info in enumerate(infos) if info for name in (info.file, f"{index:05d}.json")]
    assert object_store.names(made / "shards") == files
    folder = Downloads(folder=tmp_path, limit_bytes=1 << 30)
    assert rows(ShardReader(made, downloads=folder)) == rows(ShardReader(local_cache))


def test_a_name_with_a_space_reaches_a_worker(bucket: Any) -> None:
    place = remote("s3://bucket/some%20folder/") / "my name"
    place.write_text("x")
    assert place.path == "bucket/some folder/my name"
    assert pickle.loads(pickle.dumps(place)).read_text() == "x"


def test_a_shard_info_without_a_file_name_is_read(cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cache, tmp_path / "copy")
    for path in (copy / "shards").glob("*.json"):
        plain = json.loads(path.read_text())
        assert plain.pop("file") == f"{path.stem}.parquet"
        path.write_text(json.dumps(plain))
    assert rows(ShardReader(copy)) == rows(ShardReader(cache))


# --------------------------------------------------------------------------------- crashes and races


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_lines(folder / "corpus.jsonl", prompts(150, labeled=False))
    return folder


@pytest.mark.slow
def test_a_killed_capture_and_then_two_at_once(bucket: Any, teacher: Path, many: Path, tmp_path: Path) -> None:
    changes = {"records_per_shard": 5, "batch_sequences": 1, "lease_seconds": 2}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # so that every process computes the same bits

    def start(cache: str, num_workers: int = 1) -> subprocess.Popen:
        arguments = capture_arguments(teacher, many, cache=cache, num_workers=num_workers, **changes)
        command = [sys.executable, str(ROOT / "scripts" / "capture.py"), *arguments]
        with (tmp_path / "output.txt").open("a") as output:
            return subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, env=environment)

    undisturbed, killed = start(f"{tmp_path}/local"), start("s3://bucket/killed")
    while (
        len([name for name in object_store.names(remote("s3://bucket/killed") / "shards") if name.endswith(".json")])
        < 10
    ):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    done = len([name for name in object_store.names(remote("s3://bucket/killed") / "shards") if name.endswith(".json")])
    assert undisturbed.wait(120) == 0
    assert [process.wait(120) for process in [start("s3://bucket/killed", n) for n in (1, 2)]] == [0, 0]
    output_text = (tmp_path / "output.txt").read_text()
    assert SECRET not in output_text
    assert "of 30 shards into s3://bucket/killed" in output_text
    assert done < 30
    local = {path.name: path for path in (tmp_path / "local" / "shards").iterdir()}
    found = objects(bucket, "killed/shards")
    infos = {name for name in found if name.endswith(".json")}
    assert infos == {name for name in local if name.endswith(".json")}
    for name in infos:  # each info names an object that exists
        assert json.loads(found[name])["file"].startswith(name.removesuffix(".json"))
        assert json.loads(found[name])["file"] in found
    for name in found.keys() - infos:  # whoever uploaded it, and also where another upload was used: the same bytes
        shard, content_hash, _ = name.split("-")
        assert content_hash == file_hash(local[f"{shard}.parquet"])[:12]
        assert found[name] == local[f"{shard}.parquet"].read_bytes()


def interrupted_commit(cache: RemotePath, first: Path, second: Path, at: int, patch: pytest.MonkeyPatch) -> bool:
    """Commit `first`, with a complete commit of `second` just before its request `at`; False if it made fewer."""
    waiting, requests = [second], 0

    def interrupted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal requests
            requests += 1
            if requests > at and waiting:
                manifests.commit_shard(cache, waiting.pop(), 0)
            return method(*arguments, **named)

        return call

    for name in ("exists", "write_text"):
        patch.setattr(RemotePath, name, interrupted(getattr(RemotePath, name)))
    patch.setattr(manifests, "upload", interrupted(object_store.upload))
    manifests.commit_shard(cache, first, 0)
    return not waiting


def test_two_commits_of_different_bits_leave_a_correct_shard_info(
    bucket: Any, teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second commit comes before each request of the first in turn; the shards differ, as those of two GPUs may."""
    shards = [run(config_of(teacher, data, caches_dir=str(tmp_path), k=k)) / "shards" / "00000.parquet" for k in (3, 4)]
    for at in range(4):  # exists, upload, exists, write the ShardInfo
        cache = remote(f"s3://bucket/race-{at}")
        copies = [Path(shutil.copy(str(shard), tmp_path / f"{i}.tmp")) for i, shard in enumerate(shards)]
        with monkeypatch.context() as patch:
            assert interrupted_commit(cache, copies[0], copies[1], at, patch)
        info = manifests.shard_info(cache, 0)
        assert info is not None
        content = objects(bucket, f"race-{at}/shards")[info.file]
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (info.sha256, info.bytes)


def test_an_unfinished_upload_gets_no_shard_info(
    bucket: Any, captured: RemotePath, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow publishes what was written when an exception closes a stream, so a part of a shard may be there."""
    place = remote("s3://bucket/short")
    temporary = tmp_path / "shard.tmp"
    for error in (None, OSError("No space left on device"), KeyboardInterrupt()):
        shutil.copy(cache / "shards" / "00000.parquet", temporary)

        def cut(source: Any, target: Any, length: int, error: BaseException | None = error) -> None:
            target.write(source.read(100))
            if error is not None:
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfileobj", cut)
            with pytest.raises((InputError, KeyboardInterrupt), match="bytes after the upload, found 100|No space|^$"):
                manifests.commit_shard(place, temporary, 0)
        assert manifests.shard_info(place, 0) is None
        assert {len(content) for content in objects(bucket, "short/shards").values()} == {100}
    manifests.commit_shard(place, temporary, 0)
    info = manifests.shard_info(place, 0)
    assert info is not None
    assert hashlib.sha256(objects(bucket, "short/shards")[info.file]).hexdigest() == info.sha256


def test_a_capture_stops_where_the_manifest_is_of_another(
    bucket: Any, captured: RemotePath, teacher: Path, data: Path, tmp_path: Path
) -> None:
    """Two captures start at one address at once: the manifest is of one of them, and the other commits nothing."""
    other = manifests.load_manifest(run(config_of(teacher, data, caches_dir=str(tmp_path), k=9)))
    place = copied(bucket, "tiny", "lost")
    with pytest.raises(InputError, match="k: expected 9, found 8"), shard_writer(place, other, 7) as writer:
        writer.commit(num_skipped=0)
    assert manifests.shard_info(place, 7) is None


@pytest.mark.parametrize("position", [0, 1000, -1])
def test_a_flipped_byte_is_found_before_a_row_is_used(
    position: int, bucket: Any, captured: RemotePath, tmp_path: Path
) -> None:
    place = copied(bucket, "tiny", f"flipped{position}")
    info = manifests.shard_info(place, 1)
    assert info is not None
    content = bytearray(objects(bucket, "tiny")[f"shards/{info.file}"])
    content[position] ^= 1
    bucket.put_object(Key=f"flipped{position}/shards/{info.file}", Body=bytes(content))
    reader = ShardReader(place, downloads=Downloads(folder=tmp_path, limit_bytes=1 << 30))
    reader.row(0, 0)  # another shard, not damaged
    first = manifests.shard_info(place, 0)
    assert first is not None
    message = rf"s3://bucket/flipped.*{info.file}: expected sha256 .*the shard is damaged: delete it and 00001.json"
    for _ in range(2):  # the damaged download is not kept
        with pytest.raises(InputError, match=message):
            reader.row(len(first.row_groups), 0)
    object_store.open_location(f"{place}/shards/{info.file}").unlink()
    with pytest.raises(InputError, match=rf"{info.file}: expected a shard, found no such file; .* delete 00001.json"):
        reader.row(len(first.row_groups), 0)


# ------------------------------------------------------------------------------------------ downloads


def test_downloads_stay_within_their_limit(captured: RemotePath, cache: Path, tmp_path: Path) -> None:
    """The least recently used are deleted first, whichever reader used them, and downloaded again when needed."""
    expected = rows(ShardReader(cache))
    infos = [manifests.shard_info(cache, index) for index in range(3)]
    (one, footer_one), (two, footer_two), (three, _) = [parts_of(info) for info in infos if info]
    (tmp_path / "thesis.txt").write_text("a file of the user")

    def kept() -> set[str]:
        return {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} - {"thesis.txt"}

    reader = ShardReader(captured, downloads=Downloads(folder=tmp_path, limit_bytes=1))
    for _ in range(2):
        assert rows(reader) == expected
        assert kept() == {three.name}
    limit_bytes = sum(part.end - part.start for part in (one, footer_one, two, footer_two))
    first, second = (ShardReader(captured, downloads=Downloads(folder=tmp_path, limit_bytes=limit_bytes)) for _ in "ab")
    first.row(0, 0)
    assert kept() == {one.name, footer_one.name, three.name}
    for age, part in enumerate((one, footer_one, three), start=1):
        os.utime(tmp_path / part.name, (age, age))
    second.row(0, 0)  # another reader uses shard `one`
    assert len(first.blocks) == 3  # a block a shard
    first.row(1, 0)
    assert kept() == {part.name for part in (one, footer_one, two, footer_two)}
    assert (tmp_path / "thesis.txt").exists()


def test_readers_of_one_shard_at_once_download_it_once(
    captured: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded: list[tuple[RemotePath, int]] = []

    def slow_download(place: RemotePath, local: Path, start: int, end: int) -> None:
        downloaded.append((place, start))
        time.sleep(0.2)
        object_store.download(place, local, start, end)

    monkeypatch.setattr(downloads, "download", slow_download)
    readers = [ShardReader(captured, downloads=Downloads(folder=tmp_path, limit_bytes=1 << 30)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        keys = [sequence.key for sequence, _ in pool.map(lambda reader: reader.row(0, 0), readers)]
    assert len(set(keys)) == 1
    assert len(set(downloaded)) == len(downloaded) == 2  # the row group and the footer


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_downloads_where_there_are_no_locks(
    number: int, captured: RemotePath, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    reader = ShardReader(captured, downloads=Downloads(folder=tmp_path, limit_bytes=1 << 30))
    assert rows(reader) == rows(ShardReader(cache))


def test_a_download_that_the_disk_damaged_is_repeated(captured: RemotePath, cache: Path, tmp_path: Path) -> None:
    folder = Downloads(folder=tmp_path, limit_bytes=1 << 30)
    expected = rows(ShardReader(captured, downloads=folder))
    (damaged, *_) = (path for path in tmp_path.iterdir() if not path.name.startswith("."))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    abandoned = tmp_path / f".{damaged.name}.1.0123abcd.tmp"
    abandoned.write_bytes(b"of a killed process")
    os.utime(abandoned, (0, 0))
    assert rows(ShardReader(captured, downloads=folder)) == expected
    infos = [manifests.shard_info(cache, index) for index in range(3)]
    assert file_hash(damaged)[:16] in {
        part.sha256 for info in infos if info for part in parts_of(info) if part.name == damaged.name
    }
    assert not abandoned.exists()


def test_a_folder_of_downloads_that_cannot_be_created(captured: RemotePath, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reader = ShardReader(captured, downloads=Downloads(folder=tmp_path / "file", limit_bytes=1))
    with pytest.raises(InputError, match="downloads: expected to keep a part of .*found File exists; make room, or"):
        reader.row(0, 0)


# --------------------------------------------------------------------------------------------- leases


def test_leases_in_a_bucket(bucket: Any) -> None:
    abandoned, place = remote("s3://bucket/leases") / ".0.lease", remote("s3://bucket/leases") / ".1.lease"
    abandoned.write_text("a dead worker")
    with hold_lease(place, lease_seconds=2) as first:
        assert first
        with hold_lease(abandoned, lease_seconds=60) as taken:
            assert not taken
        time.sleep(4)  # longer than the lease: the holder has renewed it
        with hold_lease(place, lease_seconds=2) as second:
            assert not second
    with hold_lease(abandoned, lease_seconds=2) as taken:
        assert taken
        abandoned.write_text("a successor")  # as if this process had been frozen, and another took over
    assert objects(bucket, "leases") == {".0.lease": b"a successor"}


def test_stale_leases_are_deleted_once_the_cache_is_complete(
    bucket: Any, captured: RemotePath, teacher: Path, data: Path
) -> None:
    place = copied(bucket, "tiny", "stale")
    before = objects(bucket, "stale")
    (place / "shards" / ".00001.lease").write_text("a dead worker")
    time.sleep(7)
    (place / "shards" / ".00002.lease").write_text("a living worker")
    run(config_of(teacher, data, cache=str(place), lease_seconds=6))  # which it takes less than, on a busy machine too
    assert set(objects(bucket, "stale")) - set(before) == {"shards/.00002.lease"}


# ------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """An endpoint that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


REFUSALS = {
    "no bucket": ("s3://nowhere/tiny", "expected the bucket 'nowhere' of s3://nowhere/tiny, found no such bucket;"),
    "no server": ("s3://bucket/tiny?endpoint_override=127.0.0.1:9", "expected s3://bucket/tiny?endpoint_override"),
    "silence": ("s3://bucket/tiny?endpoint_override=SILENT&scheme=http", "Timeout was reached"),
    "credentials": (f"s3://user:{SECRET}@bucket/tiny", "found some in that of s3://bucket/tiny; an address is"),
    "a token": (f"s3://bucket/tiny?sas_token={SECRET}", "found some in that of s3://bucket/tiny; an address is"),
    "no store": ("weird://bucket/tiny", "expected weird://bucket/tiny to be served, found: Unrecognized filesystem"),
    "not local": ("file://bucket/tiny", "expected file://bucket/tiny to be served"),
}


@pytest.mark.parametrize("writing", [True, False])
@pytest.mark.parametrize("name", REFUSALS)
def test_an_unusable_address_is_refused_within_seconds(name: str, writing: bool, bucket: Any, silent: str) -> None:
    address, message = REFUSALS[name]
    started = time.monotonic()
    with pytest.raises(InputError) as refused:
        object_store.check_url(address.replace("SILENT", silent), "cache", writing=writing)
    assert time.monotonic() - started < 10
    assert message in str(refused.value)
    assert str(refused.value).startswith("cache: expected")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("name", ["no bucket", "credentials"])
def test_the_scripts_refuse_an_unusable_address(
    name: str, bucket: Any, teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    address, message = REFUSALS[name]
    commands = {
        "capture": capture_arguments(teacher, data, cache=f"'{address}'"),
        "train": train_arguments(student, data, f"'{address}'"),
    }
    for stage, arguments in commands.items():
        started = time.monotonic()
        done = script(stage, *arguments, cwd=tmp_path, check=False)
        assert time.monotonic() - started < 10
        assert done.returncode == 2
        assert message in done.stderr
        assert "cache: expected" in done.stderr
        assert SECRET not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_training_from_an_address_without_a_cache(bucket: Any, student: Path, data: Path, tmp_path: Path) -> None:
    done = script("train", *train_arguments(student, data, "s3://bucket/nothing"), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "cache: expected s3://bucket/nothing/manifest.json, found no such file; capture with" in done.stderr


class ReadOnlyStore(BaseHTTPRequestHandler):
    """An S3 endpoint whose buckets exist and refuse every PUT; moto does not check the right to write."""

    def do_HEAD(self) -> None:
        self._answer(200)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Nothing: the requests are none of the test's output."""


def test_a_read_only_bucket_is_refused_for_writing(bucket: Any) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), ReadOnlyStore) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"s3://bucket/readonly?endpoint_override=127.0.0.1:{server.server_port}&scheme=http"
        with pytest.raises(InputError, match="to be served, found: .*ACCESS_DENIED during PutObject operation"):
            object_store.check_url(address, "cache", writing=True)
        server.shutdown()
