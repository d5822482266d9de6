"""A cache in a bucket is the cache in a folder, whatever happens on the way; moto serves S3 on loopback."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
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
from pipeline.cache.shards import ShardReader, shard_writer
from pipeline.capture.driver import run
from pipeline.config.schema import CaptureConfig, Dtype, ModelConfig, Targets, TextConfig
from pipeline.core import object_store as store
from pipeline.core.files import file_hash
from pipeline.core.object_store import Location, RemotePath, open_location
from pipeline.core.types import InputError
from pipeline.monitoring.metrics import MetricsFile
from support.commands import ROOT, capture_arguments, script, train_arguments
from support.tiny import prompts, write_lines

SECRET = "s3cr3t-of-the-bucket"


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A bucket named `bucket`, as boto3 sees it; this process and its children find it by the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
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
    place = open_location(address)
    assert isinstance(place, RemotePath)
    return place


def objects(bucket: Any, prefix: str) -> dict[str, bytes]:
    """What lies below a prefix; not the markers of folders, which end in a slash."""
    found = bucket.objects.filter(Prefix=f"{prefix}/")
    return {o.key[len(prefix) + 1 :]: o.get()["Body"].read() for o in found if not o.key.endswith("/")}


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
def near(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local capture by this process, whose bits another one of it repeats."""
    made = run(config_of(teacher, data, caches_dir=str(tmp_path_factory.mktemp("near"))))
    assert isinstance(made, Path)
    return made


def rows(reader: ShardReader) -> list[tuple[bytes, list[int], list[float]]]:
    found = [reader.row(block, r) for block, count in enumerate(reader.blocks) for r in range(count)]
    return [(sequence.key, c.top.ids_NK.tolist(), c.top.log_tail_NC.tolist()) for sequence, c in found]


# ------------------------------------------------------------------------------------------ the cache


def test_a_bucket_holds_what_a_folder_holds(bucket: Any, captured: RemotePath, cache: Path, tmp_path: Path) -> None:
    found = objects(bucket, "tiny")
    shards = sorted((cache / "shards").glob("*.parquet"))
    named = [f"shards/{path.stem}-{file_hash(path)[:12]}.parquet" for path in shards]
    infos = [f"shards/{path.stem}.json" for path in shards]
    assert sorted(found) == sorted(["manifest.json", *infos, *named])  # no claim, no probe, nothing half
    for path, name, info in zip(shards, named, infos, strict=True):
        assert found[name] == path.read_bytes()
        expected = json.loads(path.with_suffix(".json").read_text()) | {"file": Path(name).name}
        assert json.loads(found[info]) == expected
    assert json.loads(found["manifest.json"]) == json.loads((cache / "manifest.json").read_text())
    assert rows(ShardReader(cache)) == rows(ShardReader(captured, downloads=Downloads(folder=tmp_path, limit_bytes=1)))


def test_the_same_command_again_puts_no_shard(bucket: Any, captured: RemotePath, teacher: Path, data: Path) -> None:
    before = {o.key: o.last_modified for o in bucket.objects.filter(Prefix="tiny/shards/0")}
    time.sleep(1.1)  # S3 counts seconds
    assert run(config_of(teacher, data, cache="s3://bucket/tiny")) == captured
    assert {o.key: o.last_modified for o in bucket.objects.filter(Prefix="tiny/shards/0")} == before


def test_training_from_a_bucket_is_training_from_a_folder(
    captured: RemotePath, cache: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    """Through downloads that hold one shard at a time; even the run's name is the same."""

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
    assert len(kept) == 1
    assert kept[0].name == file_hash(kept[0])


def test_an_exact_address_made_of_something_else_is_refused(captured: RemotePath, teacher: Path, data: Path) -> None:
    with pytest.raises(InputError, match=r"s3://bucket/tiny was made of something else.*\n  k: expected 9, found 8"):
        run(config_of(teacher, data, cache=str(captured), k=9))


def test_an_exact_folder(teacher: Path, data: Path, near: Path, tmp_path: Path) -> None:
    assert run(config_of(teacher, data, cache=str(tmp_path / "here"))) == tmp_path / "here"
    assert run(config_of(teacher, data, cache=(tmp_path / "here").as_uri())) == tmp_path / "here"
    assert rows(ShardReader(tmp_path / "here")) == rows(ShardReader(near))


def test_what_fsspec_knows(teacher: Path, data: Path, near: Path, tmp_path: Path) -> None:
    made = run(config_of(teacher, data, caches_dir="fsspec+memory://caches", name="with space"))
    assert str(made) == f"fsspec+memory://caches/with space-{manifests.load_manifest(near).fingerprint[:12]}"
    assert pickle.loads(pickle.dumps(made)) == made
    assert store.names(made / "shards") == [
        name for i, path in enumerate(sorted((near / "shards").glob("*.parquet")))
        for name in (f"{i:05d}-{file_hash(path)[:12]}.parquet", f"{i:05d}.json")
    ]  # fmt: skip
    folder = Downloads(folder=tmp_path, limit_bytes=1 << 30)
    assert rows(ShardReader(made, downloads=folder)) == rows(ShardReader(near))


def test_a_name_with_a_space_reaches_a_worker(bucket: Any) -> None:
    place = remote("s3://bucket/some%20folder/") / "my name"
    place.write_text("x")
    assert place.path == "bucket/some folder/my name"
    assert pickle.loads(pickle.dumps(place)).read_text() == "x"


def test_a_local_info_of_before_names_were_written(cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cache, tmp_path / "copy")
    for path in (copy / "shards").glob("*.json"):
        plain = json.loads(path.read_text())
        assert plain.pop("file") == f"{path.stem}.parquet"
        path.write_text(json.dumps(plain))
    assert rows(ShardReader(copy)) == rows(ShardReader(cache))


# ----------------------------------------------------------------------------------------- under fire


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_lines(folder / "corpus.jsonl", prompts(150, labeled=False))
    return folder


def test_a_killed_capture_and_then_two_at_once(bucket: Any, teacher: Path, many: Path, tmp_path: Path) -> None:
    changes = {"records_per_shard": 5, "batch_sequences": 1, "lease_seconds": 2}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # so that every process computes the same bits

    def start(cache: str, num_workers: int = 1) -> subprocess.Popen:
        arguments = capture_arguments(teacher, many, cache=cache, num_workers=num_workers, **changes)
        command = [sys.executable, str(ROOT / "scripts" / "capture.py"), *arguments]
        with (tmp_path / "output.txt").open("a") as output:
            return subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, env=environment)

    undisturbed, killed = start(f"{tmp_path}/local"), start("s3://bucket/killed")
    while len([name for name in store.names(remote("s3://bucket/killed") / "shards") if name.endswith(".json")]) < 10:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    done = len([name for name in store.names(remote("s3://bucket/killed") / "shards") if name.endswith(".json")])
    assert undisturbed.wait(120) == 0
    assert [process.wait(120) for process in [start("s3://bucket/killed", n) for n in (1, 2)]] == [0, 0]
    said = (tmp_path / "output.txt").read_text()
    assert SECRET not in said
    assert "of 30 shards into s3://bucket/killed" in said
    assert done < 30
    local = tmp_path / "local" / "shards"
    expected = {f"{p.stem}-{file_hash(p)[:12]}.parquet": p.read_bytes() for p in local.glob("*.parquet")}
    found = objects(bucket, "killed/shards")
    assert {name: content for name, content in found.items() if name.endswith(".parquet")} == expected
    assert {name for name in found if name not in expected} == {p.name for p in local.glob("*.json")}


def overtaken_commit(cache: RemotePath, mine: Path, theirs: Path, at: int, patch: pytest.MonkeyPatch) -> bool:
    """Commit `mine`, with a whole commit of `theirs` just before its request number `at`; False if it made fewer."""
    waiting, requests = [theirs], 0

    def overtaken(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal requests
            requests += 1
            if requests > at and waiting:
                manifests.commit_shard(cache, waiting.pop(), 0)
            return method(*arguments, **named)

        return call

    for name in ("exists", "write_text"):
        patch.setattr(RemotePath, name, overtaken(getattr(RemotePath, name)))
    patch.setattr(manifests, "upload", overtaken(store.upload))
    manifests.commit_shard(cache, mine, 0)
    return not waiting


def test_two_that_commit_different_bits_leave_an_info_that_is_right(
    bucket: Any, teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is overtaken at every request of its commit in turn; the shards differ, as those of two GPUs may."""
    shards = [run(config_of(teacher, data, caches_dir=str(tmp_path), k=k)) / "shards" / "00000.parquet" for k in (3, 4)]
    for at in range(4):  # asks, uploads, asks again, vouches
        cache = remote(f"s3://bucket/race-{at}")
        copies = [Path(shutil.copy(str(shard), tmp_path / f"{i}.tmp")) for i, shard in enumerate(shards)]
        with monkeypatch.context() as patch:
            assert overtaken_commit(cache, copies[0], copies[1], at, patch)
        info = manifests.shard_info(cache, 0)
        assert info is not None
        content = objects(bucket, f"race-{at}/shards")[info.file]
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (info.sha256, info.bytes)


def test_an_upload_cut_short_is_not_vouched_for(
    bucket: Any, captured: RemotePath, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow publishes what it has when a stream is closed by an exception, so a part may lie there."""
    place = remote("s3://bucket/short")
    temporary = tmp_path / "shard.tmp"
    for trouble in (None, OSError("No space left on device"), KeyboardInterrupt()):
        shutil.copy(cache / "shards" / "00000.parquet", temporary)

        def cut(source: Any, target: Any, length: int, trouble: BaseException | None = trouble) -> None:
            target.write(source.read(100))
            if trouble is not None:
                raise trouble

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfileobj", cut)
            with pytest.raises((InputError, KeyboardInterrupt), match="bytes after the upload, found 100|No space|^$"):
                manifests.commit_shard(place, temporary, 0)
        assert manifests.shard_info(place, 0) is None
        assert [len(content) for content in objects(bucket, "short/shards").values()] == [100]
    manifests.commit_shard(place, temporary, 0)
    info = manifests.shard_info(place, 0)
    assert info is not None
    assert hashlib.sha256(objects(bucket, "short/shards")[info.file]).hexdigest() == info.sha256


def test_a_capture_that_lost_its_address_to_another_stops(
    bucket: Any, captured: RemotePath, teacher: Path, data: Path, tmp_path: Path
) -> None:
    """Two captures begin at one address at once: the manifest names one, and the other commits nothing."""
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
    reader.row(0, 0)  # another shard: whole
    first = manifests.shard_info(place, 0)
    assert first is not None
    message = rf"s3://bucket/flipped.*{info.file}: expected sha256 .*the shard is damaged: delete it and 00001.json"
    for _ in range(2):  # and no part of it is kept for the next time
        with pytest.raises(InputError, match=message):
            reader.row(len(first.row_groups), 0)
    store.open_location(f"{place}/shards/{info.file}").unlink()
    with pytest.raises(InputError, match="expected sha256 .*, found no file; the shard is damaged"):
        reader.row(len(first.row_groups), 0)


# ------------------------------------------------------------------------------------------ downloads


def test_downloads_stay_within_their_bound(captured: RemotePath, cache: Path, tmp_path: Path) -> None:
    """The least recently used go first, whoever used them; what was evicted is fetched again."""
    expected = rows(ShardReader(cache))
    (one, one_bytes), (_, two_bytes), (three, _) = [
        (file_hash(path), path.stat().st_size) for path in sorted((cache / "shards").glob("*.parquet"))
    ]
    (tmp_path / "thesis.txt").write_text("not ours")

    def kept() -> set[str]:
        return {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} - {"thesis.txt"}

    reader = ShardReader(captured, downloads=Downloads(folder=tmp_path, limit_bytes=1))
    for _ in range(2):
        assert rows(reader) == expected
        assert kept() == {three}
    limit_bytes = one_bytes + two_bytes
    mine, theirs = (ShardReader(captured, downloads=Downloads(folder=tmp_path, limit_bytes=limit_bytes)) for _ in "ab")
    mine.row(0, 0)
    assert kept() == {one, three}
    os.utime(tmp_path / one, (1, 1))
    os.utime(tmp_path / three, (2, 2))
    theirs.row(0, 0)  # a use, if by somebody else
    assert len(mine.blocks) == 3  # a block a shard
    mine.row(1, 0)
    assert three not in kept()
    assert one in kept()
    assert (tmp_path / "thesis.txt").exists()


def test_those_that_want_one_shard_at_once_fetch_it_once(
    captured: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[RemotePath] = []

    def slowly(place: RemotePath, local: Path) -> None:
        fetched.append(place)
        time.sleep(0.2)
        store.download(place, local)

    monkeypatch.setattr(downloads, "download", slowly)
    readers = [ShardReader(captured, downloads=Downloads(folder=tmp_path, limit_bytes=1 << 30)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        keys = [sequence.key for sequence, _ in pool.map(lambda reader: reader.row(0, 0), readers)]
    assert len(set(keys)) == 1
    assert len(fetched) == 1


def test_a_download_that_the_disk_damaged_is_fetched_again(captured: RemotePath, cache: Path, tmp_path: Path) -> None:
    folder = Downloads(folder=tmp_path, limit_bytes=1 << 30)
    expected = rows(ShardReader(captured, downloads=folder))
    (damaged, *_) = (path for path in tmp_path.iterdir() if not path.name.startswith("."))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    left = tmp_path / f".{damaged.name}.1.0123abcd.tmp"
    left.write_bytes(b"somebody was killed")
    os.utime(left, (0, 0))
    assert rows(ShardReader(captured, downloads=folder)) == expected
    assert file_hash(damaged) == damaged.name
    assert not left.exists()


def test_a_folder_for_downloads_that_cannot_be(captured: RemotePath, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reader = ShardReader(captured, downloads=Downloads(folder=tmp_path / "file", limit_bytes=1))
    with pytest.raises(InputError, match="downloads: expected to keep a shard of .*found File exists; make room, or"):
        reader.row(0, 0)


# --------------------------------------------------------------------------------------------- claims


def test_claims_in_a_bucket(bucket: Any) -> None:
    left, place = remote("s3://bucket/claims") / ".0.claim", remote("s3://bucket/claims") / ".1.claim"
    left.write_text("somebody dead")
    with hold_lease(place, lease_seconds=2) as first:
        assert first
        with hold_lease(left, lease_seconds=60) as taken:
            assert not taken
        time.sleep(4)  # past the lease: the holder gives signs of life
        with hold_lease(place, lease_seconds=2) as second:
            assert not second
    with hold_lease(left, lease_seconds=2) as taken:
        assert taken
        left.write_text("a successor")  # as if we had been frozen and overtaken
    assert objects(bucket, "claims") == {".0.claim": b"a successor"}


def test_stale_claims_are_swept_once_the_cache_is_whole(
    bucket: Any, captured: RemotePath, teacher: Path, data: Path
) -> None:
    place = copied(bucket, "tiny", "swept")
    before = objects(bucket, "swept")
    (place / "shards" / ".00001.claim").write_text("somebody dead")
    time.sleep(2.1)
    (place / "shards" / ".00002.claim").write_text("somebody alive")
    run(config_of(teacher, data, cache=str(place), lease_seconds=1))
    assert set(objects(bucket, "swept")) - set(before) == {"shards/.00002.claim"}


# ------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """An endpoint that takes connections and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


REFUSALS = {
    "no bucket": ("s3://nowhere/tiny", "expected the bucket 'nowhere' of s3://nowhere/tiny, found no such bucket;"),
    "nobody there": ("s3://bucket/tiny?endpoint_override=127.0.0.1:9", "expected s3://bucket/tiny?endpoint_override"),
    "silence": ("s3://bucket/tiny?endpoint_override=SILENT&scheme=http", "Timeout was reached"),
    "credentials": (f"s3://somebody:{SECRET}@bucket/tiny", "found some in that of s3://bucket/tiny; an address is"),
    "a token": (f"s3://bucket/tiny?sas_token={SECRET}", "found some in that of s3://bucket/tiny; an address is"),
    "no store": ("weird://bucket/tiny", "expected weird://bucket/tiny to be served, found: Unrecognized filesystem"),
    "not local": ("file://bucket/tiny", "expected file://bucket/tiny to be served"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_in_the_first_seconds(
    name: str, bucket: Any, silent: str, teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    address, message = REFUSALS[name]
    address = f"'{address.replace('SILENT', silent)}'"
    commands = {
        "capture": capture_arguments(teacher, data, cache=address),
        "train": train_arguments(student, data, address),
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
            store.check_url(address, "cache", writing=True)
        server.shutdown()
