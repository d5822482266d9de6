"""The commands of a run's nodes, one a node, while they work together: what each reports, and which one is lost.

Node 0 holds a TCPStore (or torchrun does, which started the commands). Each command writes a report into it, twice a
second, and node 0 reads those of all, the others that of node 0. So a node that was killed, or lost its network, is
noticed within LOST_SECONDS, also where its ranks only wait in NCCL.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config.outcomes import State
from pipeline.config.schema import LauncherConfig
from pipeline.core.progress import log
from pipeline.core.stopping import Stopped
from pipeline.core.types import RunFailed
from pipeline.training.nodes import Node, this_node
from pipeline.training.rendezvous import meet

REPORT_SECONDS = 0.5
LOST_SECONDS = 20.0  # a node whose report is older than this is lost
LEAVE_SECONDS = 10.0  # so long node 0, when it is asked to stop, waits for others to read how the run ended
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a command makes known of the run that it works on; of a sweep, which has several, of the present one."""

    run: int = 0
    """Its number in this command, from 1."""
    folder: str = ""
    """The name of the run's folder, once the inputs are read."""
    num_processes: int = 0
    """Ranks on this node."""
    start: int = 0
    """Of node 0: how often it has started the ranks; of the others, for which of them they are ready."""
    token: str = ""
    """Of node 0: a file in the run's folder, which the others look for."""
    port: int = 0
    """Of node 0: where the ranks meet."""
    exit_code: int | None = None
    """Of torchrun, once the ranks on this node have ended."""
    trouble: str = ""
    """Of node 0: why the ranks of all nodes have to end."""
    outcome: dict[str, Any] | None = None
    """How the run ended, as this command sees it; that of node 0 decides."""
    asks_to_stop: bool = False
    """Whether this command got a signal."""


BLANK = {item.name: item.default for item in dataclasses.fields(Report)}


class Meeting:
    """This command's part of it: its own report, and those of the others."""

    def __init__(self, node: Node, seconds: float) -> None:
        self.node = node
        self._store = meet(node, seconds)
        self._own, self._changes, self._sent, self._beat = Report(), 0, 0, 0
        self._others: dict[int, Report] = {}
        self._beats: dict[int, int] = {}
        self._heard = dict.fromkeys(range(node.count), time.monotonic())
        self._exchanged = time.monotonic()
        self._lost, self._passed_on = "", False
        self.is_asked_to_stop = False  # set by a signal's handler, which may interrupt any line, so it takes no lock
        self._changing, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_reporting, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # ---------------------------------------------------------------- what the command calls

    @property
    def is_first(self) -> bool:
        """Whether this is node 0."""
        return self.node.rank == 0

    @property
    def own(self) -> Report:
        """The report of this command."""
        return self._own

    def report(self, **changes: Any) -> None:
        """Change this command's report; the others see it within a second."""
        with self._changing:
            self._own = dataclasses.replace(self._own, **changes)
            self._changes += 1

    def others(self) -> dict[int, Report]:
        """The reports on the present run, by node: of all others at node 0, of node 0 alone elsewhere."""
        return {rank: report for rank, report in self._others.items() if report.run == self._own.run}

    def all_others(self, condition: Callable[[Report], object]) -> bool:
        """Whether all others have begun with the present run, and their reports meet a condition."""
        reports = self.others()
        return len(reports) == len(self._awaited()) and all(map(condition, reports.values()))

    def lost(self) -> str:
        """Which node is lost, in words; empty while all answer."""
        if not self._lost and time.monotonic() - self._exchanged > LOST_SECONDS:
            return f"node 0 ({self.node.host}) has not answered for {LOST_SECONDS:.0f} s"
        return self._lost

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Until a condition holds; RunFailed where a node is lost before."""
        while not condition():
            if reason := self.lost():
                raise RunFailed(f"{reason}; the same command on every node continues")
            time.sleep(POLL_SECONDS)

    def next_run(self) -> None:
        """Begin with the next run of this command; RunFailed where a node is lost."""
        if reason := self.lost():
            raise RunFailed(f"{reason}; start the same command on every node again")
        self.report(**BLANK | {"run": self._own.run + 1})

    def end_run(self, outcome: dict[str, Any], *, wait: bool) -> None:
        """Make the outcome known; `wait`: until the others have ended this run too, so that each knows how.

        Without it node 0 still gives them a while, because the store ends with its process.
        """
        self.report(outcome=outcome)
        number, leave_at = self._changes, time.monotonic() + (LEAVE_SECONDS if self.is_first else 0.0)

        def is_known() -> bool:
            is_late = not wait and time.monotonic() > leave_at
            return self._sent >= number and (is_late or self.all_others(lambda one: one.outcome))

        with contextlib.suppress(RunFailed):  # who is lost needs no outcome
            self.wait_until(is_known)

    def close(self) -> None:
        """Leave; the store of node 0 ends with its process."""
        self._done.set()
        self._thread.join(LOST_SECONDS)

    @property
    def first(self) -> Report | None:
        """The report of node 0 on the present run, once it has begun with it."""
        return self._own if self.is_first else self.others().get(0)

    def trouble(self) -> str:
        """Why the ranks of this node cannot go on, in words; empty where nothing is known against it."""
        first = self.first
        if reason := self.lost() or (first.trouble if first else ""):
            return reason
        return "the ranks of node 0 failed" if first and not self.is_first and first.exit_code else ""

    def wait_for_others(self, is_ready: Callable[[Report], object]) -> None:
        """At node 0: wait for all others; RunFailed or Stopped where one has ended, RunFailed where one is lost."""

        def are_ready() -> bool:
            for rank, report in self.others().items():
                if report.outcome is not None:
                    note = f"node {rank}: {report.outcome['note']}"
                    if report.outcome["state"] == State.stopped.name:
                        raise Stopped(note, is_finished=False)
                    raise RunFailed(note)
            return self.all_others(is_ready)

        self.wait_until(are_ready)

    # ---------------------------------------------------------------------------- the thread

    def _awaited(self) -> list[int]:
        return [*range(1, self.node.count)] if self.is_first else [0]

    def _keep_reporting(self) -> None:
        while not self._done.wait(REPORT_SECONDS):
            try:
                self._exchange()
            except RuntimeError:  # of the connection; DistStoreError is one
                if not self._done.is_set():
                    self._lost = f"node 0 ({self.node.host}) has ended, or its network has"
                return

    def _exchange(self) -> None:
        self._beat += 1
        with self._changing:
            own, number = self._own, self._changes
        own = dataclasses.replace(own, asks_to_stop=self.is_asked_to_stop)
        self._store.set(self._key(self.node.rank), json.dumps([self._beat, dataclasses.asdict(own)]))
        self._sent = number
        for rank in self._awaited():
            if rank in self._others or self._store.check([self._key(rank)]):
                beat, report = json.loads(self._store.get(self._key(rank)))
                if beat != self._beats.get(rank):
                    self._beats[rank], self._heard[rank] = beat, time.monotonic()
                self._others[rank] = Report(**report)
        self._exchanged = time.monotonic()
        if self.is_first:
            self._watch_others()

    def _watch_others(self) -> None:
        """At node 0: find who is lost, why the ranks have to end, and whether a command was asked to stop."""
        for rank in self._awaited():
            report = self._others.get(rank)
            if time.monotonic() - self._heard[rank] > LOST_SECONDS and not self._lost:
                self._lost = f"node {rank} has not answered for {LOST_SECONDS:.0f} s"
            has_ended = self._own.outcome is not None  # then the other only has to read how
            if report is not None and report.asks_to_stop and not self._passed_on and not has_ended:
                self._passed_on = True
                log.info("node %d was asked to stop", rank)
                os.kill(os.getpid(), signal.SIGTERM)  # as if this node had been asked
        reports = self.others().items()
        failed = [
            f"the ranks of node {rank} failed (exit code {one.exit_code})" for rank, one in reports if one.exit_code
        ]
        failed += [f"node {rank}: {one.outcome['note']}" for rank, one in reports if one.outcome]
        trouble = self._lost or next(iter(failed), "")
        if trouble not in ("", self._own.trouble) and self._own.outcome is None:
            self.report(trouble=trouble)

    def _key(self, rank: int) -> str:
        return f"{self.node.session}/report/{rank}"


@functools.cache
def _meeting(node: Node, seconds: float) -> Meeting:
    """One for all runs of a sweep."""
    return Meeting(node, seconds)


def meeting_of(options: LauncherConfig) -> Meeting | None:
    """The meeting of this process with the commands on the other nodes; None where it is the only command."""
    node = this_node(options, os.environ)
    return None if node is None else _meeting(node, options.rendezvous_seconds)
