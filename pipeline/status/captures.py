"""Caches and plans -> how far they are, and whether a worker is at work.

A worker renews its lease in a thread of its own, so a fresh lease shows that its process lives, and new files that its
work goes on: a fresh lease without a new file for `silent_seconds` is *silent*. A lease that was not renewed for
`lease_seconds` is silent too, unless its process ran on this machine and has ended: then the capture is *stopped*, like
one without leases. An import holds no leases: there the file that it writes is the sign of life.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pipeline.cache import manifest as manifests
from pipeline.cache.leases import holder, process_of
from pipeline.core.processes import has_ended
from pipeline.core.progress import readable_duration
from pipeline.core.types import Manifest, ShardInfo
from pipeline.report.pools import settings_of
from pipeline.status.folders import age_of, newest_write, trouble
from pipeline.status.values import CaptureStatus, Lease

INFO_FILE = re.compile(r"(\d{5,})\.json")
LEASE_FILE = re.compile(r"\.(\d{5,})\.lease")
TEMPORARY_FILE = re.compile(r"\.\d{5,}\.\d+\.[0-9a-f]+\.tmp")
BETWEEN_SHARDS_SECONDS = 10.0  # a worker that has just committed a shard holds no lease for a moment
LAST_SHARDS = 20  # the speed is that of so many
PAUSE = 10.0  # a time between two shards that is so many times that of a shard is a pause, and no sign of speed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shards:
    """What lies in the folder of a cache's shards."""

    infos: Sequence[tuple[float, ShardInfo]]
    """When each was committed, ascending, and what it is."""
    leases: Sequence[Lease]
    ended: frozenset[int]
    """Of the leases, the shards whose worker is known to have ended."""
    temporary: Sequence[float]
    """When each temporary file was written last."""
    changed: float
    """When a file appeared in the folder or left it; the renewal of a lease does not count."""

    @property
    def age_seconds(self) -> float:
        """Since work was seen: a commit, a write into a temporary file, a lease that was taken or released."""
        return age_of(max([self.changed, *(time for time, _ in self.infos), *self.temporary]))


def is_cache(folder: Path) -> bool:
    """Whether a folder is a cache."""
    return (folder / "manifest.json").exists()


def find_capture(folder: Path, *, silent_seconds: float, lease_seconds: float) -> CaptureStatus:
    """One cache from its folder; where its files cannot be read, the state is `unreadable`."""
    try:
        manifest = manifests.load_manifest(folder)
        shards = read_shards(folder)
        state, note = judge(manifest, shards, silent_seconds=silent_seconds, lease_seconds=lease_seconds)
        return described(folder, manifest, shards, state=state, note=note)
    except Exception as error:  # any content may stand in these files, and the other caches are to be shown
        note = trouble(folder, error)
        return CaptureStatus(folder=str(folder), state="unreadable", note=note)


def read_shards(folder: Path) -> Shards:
    """The shards of a cache, with one read for each that is committed."""
    infos, leases, temporary, ended = list[tuple[float, ShardInfo]](), list[Lease](), list[float](), set[int]()
    for path in sorted((folder / "shards").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # released or committed just now
            if match := INFO_FILE.fullmatch(path.name):
                info = manifests.shard_info(folder, int(match[1]))
                infos += [] if info is None else [(path.stat().st_mtime, info)]
            elif match := LEASE_FILE.fullmatch(path.name):
                leases.append(read_lease(path, int(match[1])))
                ended |= {int(match[1])} if has_ended(process_of(path.read_text())) else set()
            elif TEMPORARY_FILE.fullmatch(path.name):
                temporary.append(path.stat().st_mtime)
    infos.sort(key=lambda pair: (pair[0], pair[1].index))
    changed = (folder / "shards").stat().st_mtime
    return Shards(infos=infos, leases=leases, ended=frozenset(ended), temporary=temporary, changed=changed)


def read_lease(path: Path, shard: int) -> Lease:
    """Who holds a lease, and for how long it was not renewed."""
    return Lease(shard=shard, holder=holder(path), age_seconds=age_of(path.stat().st_mtime))


def judge(manifest: Manifest, shards: Shards, *, silent_seconds: float, lease_seconds: float) -> tuple[str, str]:
    """The state of a capture, and a note on it."""
    if len(shards.infos) == manifest.num_shards:
        return "finished", ""
    held = [lease for lease in shards.leases if lease.shard not in shards.ended]
    fresh = [lease for lease in held if lease.age_seconds <= lease_seconds]
    if fresh:
        if shards.age_seconds > silent_seconds:
            return "silent", f"its worker lives, but nothing was written for {readable_duration(shards.age_seconds)}"
        return "running", ""
    if held:
        age = readable_duration(min(lease.age_seconds for lease in held))
        return "silent", f"no lease was renewed for {age}; the same command takes them over"
    last_commit = shards.infos[-1][0] if shards.infos else 0.0
    if age_of(last_commit) <= BETWEEN_SHARDS_SECONDS:
        return "running", ""
    if not shards.leases and age_of(max(shards.temporary, default=0.0)) <= silent_seconds:
        return "running", ""  # an import
    if shards.infos or shards.ended:
        return "stopped", "the same command goes on"
    return "waiting", "no shard yet"


def described(folder: Path, manifest: Manifest, shards: Shards, *, state: str, note: str) -> CaptureStatus:
    """The status of a cache."""
    infos = [info for _, info in shards.infos]
    per_second = shards_per_second([time for time, _ in shards.infos], num_workers=len(shards.leases))
    left, speed = None, None
    if state == "running" and per_second is not None:
        left = (manifest.num_shards - len(infos)) / per_second
        speed = per_second * sum(info.targets for info in infos) / len(infos)
    return CaptureStatus(
        folder=str(folder),
        state=state,
        label=label_of(manifest),
        num_shards=manifest.num_shards,
        num_committed=len(infos),
        leases=tuple(shards.leases),
        num_targets=sum(info.targets for info in infos),
        bytes=sum(info.bytes for info in infos),
        targets_per_second=speed,
        seconds_left=left,
        age_seconds=age_of(shards.infos[-1][0]) if state == "finished" and infos else shards.age_seconds,
        note=note,
    )


def shards_per_second(times: Sequence[float], *, num_workers: int = 1) -> float | None:
    """The speed of the last shards, from the times of their commits, pauses left out; None below two shards.

    Equal workers that began together commit in bursts: a pause is measured by the time of as many commits as workers.
    """
    num_workers = max(num_workers, 1)
    last = times[-max(LAST_SHARDS, 2 * num_workers + 1) :]
    gaps = [later - earlier for earlier, later in itertools.pairwise(last)]
    if not gaps or max(gaps) <= 0.0:
        return None
    rounds = [later - earlier for earlier, later in zip(last, last[num_workers:], strict=False)]
    limit = PAUSE * median(rounds) if rounds else 0.0
    worked = [gap for gap in gaps if gap <= limit] if limit > 0.0 else gaps  # several workers may commit at once
    return len(worked) / sum(worked) if sum(worked) > 0.0 else None


def label_of(manifest: Manifest) -> str:
    """The options that make a cache what it is. A manifest names its teacher by the hash of the weights."""
    made_of = manifest.made_of
    layers = made_of.get("teacher_num_layers")
    if "pool" in made_of:
        names = ("weights", "temperature")
        parts = [f"{made_of['pool']} pool", *(f"{name} {settings_of(made_of)[f'pool.{name}']}" for name in names)]
    else:
        parts = [f"teacher {str(made_of.get('teacher_weights', '?'))[:8]}", str(made_of.get("teacher_dtype", ""))]
        parts += [f"{layers} layers" if layers else ""]
    parts += ["" if manifest.kind == "topk" else manifest.kind, f"k {manifest.k}" if manifest.k else ""]
    parts += [f"draws {manifest.draws}" if manifest.draws else "", f"window {manifest.window}"]
    parts += [f"fold {made_of['only_fold']}"] if "only_fold" in made_of else []
    return "  ".join(part for part in parts if part)


def find_plan(folder: Path, *, silent_seconds: float, lease_seconds: float) -> CaptureStatus | None:
    """A plan that is being made, or was left unfinished; None for one that is made: its cache shows what follows."""
    try:
        return _find_plan(folder, silent_seconds=silent_seconds, lease_seconds=lease_seconds)
    except OSError as error:
        return CaptureStatus(kind="plan", folder=str(folder), state="unreadable", note=trouble(folder, error))


def _find_plan(folder: Path, *, silent_seconds: float, lease_seconds: float) -> CaptureStatus | None:
    unfinished, place = folder / ".unfinished", folder / "lease"
    try:
        age = age_of(newest_write(unfinished))
        num_files = sum(path.suffix == ".parquet" and path.name[0] != "." for path in unfinished.iterdir())
        is_held = place.exists() and not has_ended(process_of(place.read_text()))
        leases = [read_lease(place, 0)] if is_held else []
    except FileNotFoundError:  # made, perhaps just now
        return None
    state, note = "stopped", "the same command goes on"
    if leases:
        is_fresh = leases[0].age_seconds <= lease_seconds
        state, note = ("running", "reading the corpus") if is_fresh else ("silent", "its lease was not renewed")
        if is_fresh and age > silent_seconds:
            state, note = "silent", f"its process lives, but nothing was written for {readable_duration(age)}"
    return CaptureStatus(
        kind="plan",
        folder=str(folder),
        state=state,
        num_committed=num_files,
        leases=tuple(leases),
        age_seconds=age,
        note=note,
    )
