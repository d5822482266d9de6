"""The members of a pool: checked to be of one corpus and one tokenizer, and read side by side.

A member is a capture, or the captures of a cross-fitted student: k students, each trained without one of k folds
(`leave_out`), have each captured the fold that it has not learnt (`only_fold`). Together these are one member.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache import manifest as manifests
from pipeline.cache.downloads import Downloads
from pipeline.cache.shards import ShardReader
from pipeline.config.schema import DownloadsConfig
from pipeline.core.files import is_url, matching_paths
from pipeline.core.folds import Fold, fold_of, parse_fold
from pipeline.core.object_store import Location, one_location
from pipeline.core.types import Captured, InputError, Manifest, ShardInfo, TokenSequence

SAME = ("vocabulary_size", "num_records", "num_shards", "records_per_shard")  # fields of all members' manifests
OWN = ("teacher_weights", "only_fold")  # in what the captures of a cross-fitted student may differ

POSITIONS_AT_ONCE = 4096  # pooled in one call: their tensors stay small

Row = tuple[TokenSequence, Captured]

JoinedRow = tuple[TokenSequence, list[Captured]]
"""A sequence with what each member captured."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemberCache:
    """One cache of a pool."""

    location: Location
    manifest: Manifest
    infos: Sequence[ShardInfo]
    """Of each shard."""
    reader: ShardReader

    @property
    def fold(self) -> Fold | None:
        """The only fold that was captured; None: all."""
        only_fold = self.manifest.made_of.get("only_fold")
        return None if only_fold is None else parse_fold(only_fold, "only_fold")

    def rows(self, shard: int) -> Iterator[Row]:
        """The sequences of a shard, in order."""
        first = sum(len(info.row_groups) for info in self.infos[:shard])
        for block, size in enumerate(self.infos[shard].row_groups, start=first):
            for row in range(size):
                yield self.reader.row(block, row)

    def plan_rows(self, shard: int) -> list[int]:
        """Of a capture of one fold: the place of each sequence of a shard among those of all folds."""
        found: list[int] = json.loads(self.reader.footer(self.infos[shard]).metadata[b"plan_rows"])
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One member of a pool."""

    caches: tuple[MemberCache, ...]
    """One capture of all sequences, or k of one fold each, fold j at j."""
    option: str = "members"
    """That named it, for messages."""

    @property
    def location(self) -> Location:
        """Of the first cache, for messages."""
        return self.caches[0].location

    @property
    def manifest(self) -> Manifest:
        """Of the first cache; those of the others agree in all that a reader needs."""
        return self.caches[0].manifest

    @property
    def fingerprints(self) -> str | list[str]:
        """That of the cache, or those of the k caches."""
        found = [cache.manifest.fingerprint for cache in self.caches]
        return found if len(found) > 1 else found[0]

    def num_skipped(self, shard: int) -> int:
        """Malformed records of a shard that were skipped."""
        return self.caches[0].infos[shard].num_skipped

    def rows(self, shard: int) -> Iterator[Row]:
        """The sequences of a shard, in the order of the plan, each from the cache of its fold.

        InputError where a cache lacks a sequence of the plan, or holds one of another fold.
        """
        if len(self.caches) == 1:
            yield from self.caches[0].rows(shard)
            return
        streams = [cache.rows(shard) for cache in self.caches]
        places = [(place, j) for j, cache in enumerate(self.caches) for place in cache.plan_rows(shard)]
        for expected, (place, j) in enumerate(sorted(places)):
            sequence, captured = next(streams[j], (None, None))
            if place != expected or sequence is None or captured is None or fold_of(sequence.key, len(streams)) != j:
                raise InputError(
                    f"{self.option}: expected each sequence in the capture of its fold, found another at row "
                    f"{expected} of shard {shard} in {self.caches[j].location}; check it with scripts/audit.py verify"
                )
            yield sequence, captured


def open_members(addresses: Sequence[str], downloads: DownloadsConfig, *, what: str = "members") -> list[Member]:
    """The members' caches; InputError, which names the option `what`, for one that does not fit the first.

    An address is a cache, or a glob of the k captures of a cross-fitted student. Each must be complete, and of the
    first one's corpus and tokenizer.
    """
    members = [_open_member(address, downloads, what) for address in addresses]
    first = members[0]
    for member in members:
        for cache in member.caches:
            _check_kind(cache, what)
        expected, found = first.manifest.made_of["tokenizer"], member.manifest.made_of["tokenizer"]
        values = [("tokenizer", expected, found)]
        values += [(name, getattr(first.manifest, name), getattr(member.manifest, name)) for name in SAME]
        for name, expected, found in values:
            if found != expected:
                raise InputError(
                    f"{what}: expected captures of one corpus with one tokenizer, found {name} {expected} in "
                    f"{first.location} and {found} in {member.location}; capture with the same corpus and options"
                )
    return members


def _open_member(address: str, downloads: DownloadsConfig, what: str) -> Member:
    locations: list[Location] = [] if is_url(address) else [*matching_paths(address)]
    if len(locations) < 2:
        locations = [one_location(address, what)]
    caches = [_open_cache(location, downloads) for location in locations]
    if len(caches) == 1 and caches[0].fold is None:
        return Member(caches=(caches[0],), option=what)
    by_fold: dict[Fold, MemberCache] = {}
    for cache in caches:
        if cache.fold is None or cache.fold.of != (caches[0].fold or cache.fold).of or cache.fold in by_fold:
            found = ", ".join(f"{one.location} ({one.fold or 'all sequences'})" for one in caches)
            raise InputError(
                f"{what}: expected {address!r} to match one capture, or one of each fold of a cross-fitted student, "
                f"found {found}; narrow it"
            )
        by_fold[cache.fold] = cache
    folds = [Fold(number=number, of=next(iter(by_fold)).of) for number in range(next(iter(by_fold)).of)]
    if missing := [str(fold) for fold in folds if fold not in by_fold]:
        raise InputError(
            f"{what}: expected a capture of each of {len(folds)} folds, found none of {', '.join(missing)} in "
            f"{address!r}; capture with only_fold={missing[0]}, or widen the glob"
        )
    member = Member(caches=tuple(by_fold[fold] for fold in folds), option=what)
    _check_one_plan(member, what)
    return member


def _open_cache(location: Location, downloads: DownloadsConfig) -> MemberCache:
    reader = ShardReader(location, downloads=Downloads(folder=Path(downloads.dir), limit_bytes=downloads.bytes))
    infos = manifests.committed_shards(location, reader.manifest)
    return MemberCache(location=location, manifest=reader.manifest, infos=infos, reader=reader)


def _check_one_plan(member: Member, what: str) -> None:
    """Refuse captures of folds that were made with other options, or of other texts, and those of trees of choices."""
    first = member.caches[0]
    if first.manifest.made_of.get("targets") == "choices":
        raise InputError(
            f"{what}: expected captures without targets=choices for a cross-fitted student, found them in "
            f"{first.location}: the sequences of one record's choices lie in several folds, so that a student has "
            "learnt a part of what it is asked; pool whole captures, or use targets=next"
        )
    for cache in member.caches[1:]:
        for name in sorted({*first.manifest.made_of, *cache.manifest.made_of} - {*OWN}):
            expected, found = first.manifest.made_of.get(name), cache.manifest.made_of.get(name)
            if found != expected:
                raise InputError(
                    f"{what}: expected the folds of a cross-fitted student to be captured with the same corpus and "
                    f"options, found {name} {expected} in {first.location} and {found} in {cache.location}; capture "
                    "one of them again"
                )


def _check_kind(cache: MemberCache, what: str) -> None:
    if cache.manifest.kind != "topk":
        raise InputError(
            f"{what}: expected captures of kind topk, found {cache.manifest.kind} in {cache.location}: tokens that "
            "were not drawn have no probability there; capture with kind=topk"
        )


def rows_of(members: Sequence[Member], shard: int) -> Iterator[JoinedRow]:
    """The sequences of a shard with what each member captured; InputError where the sequences differ."""
    missing = (None, None)
    streams = itertools.zip_longest(*(member.rows(shard) for member in members), fillvalue=missing)
    for number, rows in enumerate(streams):
        first = rows[0][0]
        for member, (sequence, captured) in zip(members, rows, strict=True):
            if first is None or sequence is None or captured is None or sequence.key != first.key:
                raise InputError(
                    f"{member.option}: expected the same sequences in the same order, found another row {number} of "
                    f"shard {shard} in {member.location}; capture with the same corpus, window and options"
                )
        assert first is not None
        yield first, [captured for _, captured in rows if captured is not None]


def groups(rows: Iterator[JoinedRow]) -> Iterator[list[JoinedRow]]:
    """Rows with together at least POSITIONS_AT_ONCE positions."""
    group: list[JoinedRow] = []
    num_positions = 0
    for row in rows:
        group.append(row)
        num_positions += len(row[0].target_ids_N)
        if num_positions >= POSITIONS_AT_ONCE:
            yield group
            group, num_positions = [], 0
    if group:
        yield group
