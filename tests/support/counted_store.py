"""A bucket whose bytes are counted: moto serves S3, and what it sends passes through a socket of ours."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Lock, Thread
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer


@dataclass
class CountedBucket:
    bucket: Any
    """Opened by boto3, beside the counter."""
    num_bytes: int = 0
    """Sent by the store to others, with the heads of its answers."""
    lock: Lock = field(default_factory=Lock)


@contextlib.contextmanager
def counted_bucket(patch: pytest.MonkeyPatch) -> Iterator[CountedBucket]:
    """A bucket named `bucket`; this process finds it by the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    behind = server.get_host_and_port()
    for name, value in {"ACCESS_KEY_ID": "user", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
        patch.setenv(f"AWS_{name}", value)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = boto3.resource("s3", region_name="us-east-1", endpoint_url="http://{}:{}".format(*behind))
    counted = CountedBucket(store.create_bucket(Bucket="bucket"))

    class Passing(BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(behind) as store:
                Thread(target=pass_on, args=(self.request, store), daemon=True).start()
                pass_on(store, self.request, counted)

    with ThreadingTCPServer(("127.0.0.1", 0), Passing) as proxy:
        proxy.daemon_threads = True
        Thread(target=proxy.serve_forever, daemon=True).start()
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*proxy.server_address))
        yield counted
        proxy.shutdown()
    server.stop()


def pass_on(source: socket.socket, target: socket.socket, counted: CountedBucket | None = None) -> None:
    """Pass bytes on until the source ends."""
    with contextlib.suppress(OSError):
        while chunk := source.recv(1 << 16):
            target.sendall(chunk)
            if counted is not None:
                with counted.lock:
                    counted.num_bytes += len(chunk)
        target.shutdown(socket.SHUT_WR)
