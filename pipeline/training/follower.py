"""A run on several nodes, each with a command of its own: node 0 drives it, the commands of the others follow."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from pipeline.config.outcomes import Outcome, State, ended_by
from pipeline.config.schema import TrainConfig
from pipeline.core.progress import log
from pipeline.core.stopping import stop_signals_handled_by
from pipeline.core.types import RunFailed
from pipeline.training.driver import PreparedRun, num_processes, prepare
from pipeline.training.joint import check_same_run, find_folder, watch
from pipeline.training.launch import ranks_command, start_process, worker_command
from pipeline.training.meeting import POLL_SECONDS, Meeting, Report


def run(config: TrainConfig, meeting: Meeting, drive: Callable[[PreparedRun], Outcome]) -> Outcome:
    """Bring one run to its result, by `drive` at node 0; the outcome is the same on all nodes."""
    meeting.next_run()
    try:
        prepared = prepare(config)
        meeting.report(folder=prepared.paths.folder.name, num_processes=num_processes(config))
        if meeting.is_first:
            check_same_run(meeting)
            outcome = drive(prepared)
        else:
            outcome = follow(prepared, meeting)
    except BaseException as error:
        outcome = ended_by(error) if isinstance(error, Exception) else stopped_by(error)
        meeting.end_run(plain(outcome), wait=isinstance(error, Exception))
        raise
    try:
        meeting.end_run(plain(outcome), wait=True)
    except KeyboardInterrupt:  # asked to stop once the run had ended: the others still have to read how
        meeting.end_run(plain(outcome), wait=False)
        raise
    return outcome


def follow(prepared: PreparedRun, meeting: Meeting) -> Outcome:
    """At another node: start the ranks here as often as node 0 starts its own, until the run has ended there."""
    num_starts, folder = 0, prepared.paths.folder
    with stop_signals_handled_by(lambda number, frame: ask_to_stop(meeting)):
        while True:
            first = meeting.first
            if first is not None and first.outcome is not None:
                return outcome_of(first, prepared)
            if first is not None and first.start > num_starts:
                num_starts = first.start
                find_folder(meeting, folder, first.token, num_starts)
                start_ranks(prepared, meeting, first.port)
            if reason := meeting.lost():
                raise RunFailed(
                    f"{folder}: {reason}; the same command on every node continues from the last checkpoint"
                )
            time.sleep(POLL_SECONDS)


def ask_to_stop(meeting: Meeting) -> None:
    """A signal to this command stops the run on all nodes, through node 0."""
    log.info("stop requested: passed on to node 0, which stops the run on all nodes")
    meeting.is_asked_to_stop = True


def start_ranks(prepared: PreparedRun, meeting: Meeting, port: int) -> None:
    """The ranks of this node, from their start to their end."""
    num_here = num_processes(prepared.config)
    command = ranks_command(
        worker_command(prepared.paths),
        num_nodes=meeting.node.count,
        num_processes=num_here,
        node=meeting.node,
        port=port,
    )
    watch(meeting, start_process(prepared.config, command, num_processes=num_here))


# ---------------------------------------------------------------------------------------- outcomes


def outcome_of(first: Report, prepared: PreparedRun) -> Outcome:
    """The outcome that node 0 has reported, as that of this node."""
    assert first.outcome is not None
    fields = first.outcome | {"state": State[first.outcome["state"]], "signals": ()}
    fields["folder"] = str(prepared.paths.folder)
    if fields["state"] is State.failed:
        fields["note"] = f"node 0: {fields['note']}"
    outcome = Outcome(**fields)
    log.info("%s: %s at node 0", prepared.paths.folder, outcome.state.value)
    return outcome


def stopped_by(request: BaseException) -> Outcome:
    """Of a command that was asked to stop before its ranks started."""
    return Outcome(state=State.stopped, note=f"stopped by {request}", asked_to_stop=True)


def plain(outcome: Outcome) -> dict[str, object]:
    """An outcome as JSON data."""
    return dataclasses.asdict(outcome) | {"state": outcome.state.name}
