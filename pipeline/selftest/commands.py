"""`scripts/selftest.py`: make the place, run the checks one after another, print a line for each."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from pipeline.config.commands import SelftestConfig
from pipeline.config.schema import Dtype, Offload
from pipeline.core.files import write_json
from pipeline.core.runtime import RECORDED_LIBRARIES, environment, hardware, release_memory
from pipeline.core.stopping import Stopped
from pipeline.core.types import InputError
from pipeline.selftest import capture_checks, model_checks, speed_checks, training_checks
from pipeline.selftest.outcomes import Finding, Outcome, Row, judged, line, line_of
from pipeline.selftest.place import Place, build

Check = Callable[[Place], Finding]

CHECKS: dict[str, Check] = {
    "capture_cpu": capture_checks.cpu,
    "capture_gpu": partial(capture_checks.gpu, dtype=Dtype.float32),
    "capture_gpu_bf16": partial(capture_checks.gpu, dtype=Dtype.bfloat16),
    "capture_other_gpu": partial(capture_checks.other_gpu, dtype=Dtype.bfloat16),
    "copies": capture_checks.copies,
    "packing_default": partial(model_checks.packing, kernel=None),
    "packing_eager": partial(model_checks.packing, kernel=model_checks.EAGER),
    "packing_sdpa": partial(model_checks.packing, kernel=model_checks.SDPA),
    "packing_sdpa_segments": partial(model_checks.packing, kernel=model_checks.SDPA_SEGMENTS),
    "packing_flex": partial(model_checks.packing, kernel=model_checks.FLEX),
    "packing_flash": partial(model_checks.packing, kernel=model_checks.FLASH),
    "fused_head": partial(model_checks.fused_head, dtype=Dtype.float32),
    "fused_head_bf16": partial(model_checks.fused_head, dtype=Dtype.bfloat16),
    "all_reduce": training_checks.all_reduce,
    "zero_1": partial(training_checks.zero, zero_stage=1),
    "zero_2": partial(training_checks.zero, zero_stage=2),
    "zero_3": partial(training_checks.zero, zero_stage=3),
    "zero_2_offload": partial(training_checks.zero, zero_stage=2, offload=Offload.cpu),
    "zero_3_offload": partial(training_checks.zero, zero_stage=3, offload=Offload.cpu),
    "resume": training_checks.resume,
    "tied_head": training_checks.tied_head,
    "speed_capture": speed_checks.capture,
    "speed_training": speed_checks.training,
    "memory": speed_checks.memory,
}
"""Every check, by the name in the table, in the order in which they run."""

SHOWN_LINES = 30  # of the output of what failed


def run(config: SelftestConfig) -> int:
    """Print the table; returns 1 if a check failed."""
    names = chosen(config.checks)
    versions = environment()["versions"]
    print(f"selftest on {hardware()}; {', '.join(f'{name} {versions[name]}' for name in RECORDED_LIBRARIES)}")
    print(line("check", "result", "figures (limit)", "seconds"), flush=True)
    with tempfile.TemporaryDirectory(prefix="selftest-") as folder:
        output = Path(folder) / "output.txt"
        rows = []
        for row in results(names, Path(folder), output):
            print(line_of(row), flush=True)
            rows.append(row)
            if row.outcome is Outcome.FAIL:
                print(last_lines(output), file=sys.stderr, flush=True)
    counts = ", ".join(f"{sum(row.outcome is one for row in rows)} {one.name}" for one in Outcome)
    print(f"{counts}; {sum(row.seconds for row in rows):.0f} s")
    if config.out is not None:
        write_json(Path(config.out), [dataclasses.asdict(row) | {"outcome": row.outcome.name} for row in rows])
    return int(any(row.outcome is Outcome.FAIL for row in rows))


def chosen(checks: Sequence[str]) -> list[str]:
    """The names of the checks to run; InputError for one that is not known."""
    if unknown := sorted({*checks} - CHECKS.keys()):
        raise InputError(f"checks: expected any of {', '.join(CHECKS)}, found {', '.join(unknown)}; correct the name")
    return [name for name in CHECKS if not checks or name in checks]


def results(names: Sequence[str], folder: Path, output: Path) -> Iterator[Row]:
    """The rows, as they are found; what the checks print goes into the file `output`."""
    place: Place | None = None

    def prepared() -> Finding:
        nonlocal place
        place = build(folder / "place")
        figures = f"{len(place.sequences)} windows of {place.size.positions} tokens; a model of {place.size.layers} "
        return judged(True, f"{figures}layers, hidden size {place.size.hidden}")

    yield row_of("prepare", prepared, output)
    if place is not None:
        for name in names:
            yield row_of(name, partial(CHECKS[name], place), output)


def row_of(name: str, check: Callable[[], Finding], output: Path) -> Row:
    """Run one check: one that raises has failed, with the message as its figures."""
    started = time.perf_counter()
    with output_in(output):
        try:
            finding = check()
        except Stopped:  # by Ctrl-C or a signal, which a driver has received
            raise
        except Exception as error:
            finding = judged(False, f"{type(error).__name__}: {error}")
        if finding.outcome is not Outcome.SKIPPED:
            release_memory()
    seconds = time.perf_counter() - started
    return Row(check=name, outcome=finding.outcome, figures=finding.figures, seconds=seconds)


@contextlib.contextmanager
def output_in(file: Path) -> Iterator[None]:
    """Send the output of this process, and of those that it starts, into a file."""
    saved = {number: os.dup(number) for number in (1, 2)}
    with file.open("wb") as opened:
        try:
            for number in saved:
                _flush()
                os.dup2(opened.fileno(), number)
            yield
        finally:
            _flush()
            for number, before in saved.items():
                os.dup2(before, number)
                os.close(before)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def last_lines(file: Path) -> str:
    """The end of what a check printed."""
    return "\n".join(file.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
