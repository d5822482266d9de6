"""How the commands of several nodes find each other: by a TCPStore of node 0, or of torchrun, which started them."""

from __future__ import annotations

import secrets
import socket
import time
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.training.nodes import Node

RETRY_SECONDS = 1.0
CONNECT_SECONDS = 20.0
WAIT_SECONDS = 0.2
GONE_SECONDS = 3.0  # a command that waits shows it more often


def meet(node: Node, seconds: float) -> Any:
    """The store, once the commands of all nodes are there; InputError where they are not, in so many seconds.

    A place that another command holds may be that of one that is ending: it is asked for again.
    """
    deadline = time.monotonic() + seconds
    log.info("node %d of %d: meeting the others at %s:%d", node.rank, node.count, node.host, node.port)
    found = "nothing that answers there"
    while (left := deadline - time.monotonic()) > 0:
        try:
            store = _open(node, min(left, CONNECT_SECONDS))
            own = _claim(store, node)
            while time.monotonic() < deadline:
                there = [rank for rank in range(node.count) if store.check([_key(node, rank)])]
                if store.get(_key(node, node.rank)).decode() != own:
                    raise OSError(f"another command with launcher.node_rank={node.rank}")
                if len(there) == node.count:
                    store.set(_key(node, "have met"), "")
                    store.set_timeout(timedelta(seconds=CONNECT_SECONDS))
                    return store
                found = f"only node {', '.join(map(str, there))}"
                store.add(_key(node, node.rank, "waits"), 1)
                time.sleep(WAIT_SECONDS)
        except (
            OSError,
            RuntimeError,
        ) as error:  # refused, unknown name, port in use; the store's own are RuntimeErrors
            found = str(error).partition("\n")[0]
            time.sleep(min(RETRY_SECONDS, left))
    raise InputError(
        f"launcher.num_nodes={node.count}: expected the commands of all nodes at {node.host}:{node.port} within "
        f"{seconds:.0f} s (launcher.rendezvous_seconds), found {found}; start the same command on each node, each with "
        "its launcher.node_rank, and check launcher.rendezvous_host and launcher.rendezvous_port"
    )


def _open(node: Node, seconds: float) -> Any:
    """Open the store at node 0, or connect to it; OSError or RuntimeError where that is not possible yet."""
    is_server = node.rank == 0 and not node.has_store
    if not is_server:  # the store's own attempts cannot be interrupted, and print a trace each time
        socket.create_connection((node.host, node.port), timeout=seconds).close()
    return TCPStore(
        node.host, node.port, is_master=is_server, wait_for_workers=False, timeout=timedelta(seconds=seconds)
    )


def _claim(store: Any, node: Node) -> str:
    """Take the place of this node; returns what stands there then.

    OSError where another command has it, and still waits or has met the others.
    """
    key, waits, own = _key(node, node.rank), _key(node, node.rank, "waits"), secrets.token_hex(8)
    held = store.compare_set(key, "", own).decode()
    if held == own:
        return own
    before = store.add(waits, 0)
    time.sleep(GONE_SECONDS)
    is_gone = store.add(waits, 0) == before and not store.check([_key(node, "have met")])
    if not is_gone or store.compare_set(key, held, own).decode() != own:
        raise OSError(f"another command with launcher.node_rank={node.rank}")
    return own


def _key(node: Node, *words: object) -> str:
    return "/".join(map(str, (node.session, *words)))
