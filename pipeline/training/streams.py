"""The streams of a run, gold and each cache: which of their rows are read, and how many targets they have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from pipeline.cache.schema import KeysAndTargets, keys_and_targets
from pipeline.cache.sequence_files import MappedSequences
from pipeline.cache.shards import ShardReader
from pipeline.core.folds import Fold
from pipeline.core.types import InputError
from pipeline.data.curriculum import Curriculum, by_entropy
from pipeline.data.left_out import Left, left_without
from pipeline.data.mixture import LazyRows, Rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CorpusCache:
    """A cache of the corpus and what of it is read."""

    reader: ShardReader
    left: Left | None
    """None: all of its rows."""
    curriculum: Curriculum | None
    """Its rows that are left, in parts; None: all, in one part."""

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Of each part the number of rows in each block."""
        return (self.reader.blocks,) if self.curriculum is None else self.curriculum.sizes

    @property
    def num_rows(self) -> int:
        """The sequences of an epoch."""
        return sum(map(sum, self.parts))

    @property
    def mean_targets(self) -> Fraction:
        """Supervised positions a sequence, on average."""
        return self.reader.mean_targets if self.left is None else self.left.mean_targets


def open_corpus(reader: ShardReader, fold: Fold | None, *, curriculum_parts: int) -> CorpusCache:
    """A cache without the fold that is left out, cut into parts by the teacher's entropy if there are several.

    InputError where no sequence is left.
    """
    check_rows(reader, "cache")
    left = None if fold is None else left_without(fold, _rows_of(reader), what=str(reader.cache))
    rows = None if left is None else left.rows
    curriculum = None if rows is None else Curriculum(rows=[rows])
    if curriculum_parts > 1:
        curriculum = by_entropy(reader.mean_entropies(), curriculum_parts, rows=rows)
    return CorpusCache(reader=reader, left=left, curriculum=curriculum)


def open_gold(text: MappedSequences | None, reader: ShardReader | None, fold: Fold | None) -> tuple[Rows, int]:
    """Its sequences, which are read where they are used and not held in memory, and their supervised positions.

    InputError where no sequence is left.
    """
    if reader is not None:
        check_rows(reader, "gold_cache")
        gold, num_targets = LazyRows(sum(reader.blocks), reader.at), reader.num_targets
        blocks = _rows_of(reader)
    elif text is not None:
        gold, num_targets = LazyRows(len(text), lambda row: (text.row(row), None)), text.num_targets
        blocks = text.keys_and_targets()
    else:
        return (), 0
    if fold is None:
        return gold, num_targets
    left = left_without(fold, blocks, what="gold")
    indices = left.indices()
    return LazyRows(len(left), lambda row: gold[int(indices[row])]), left.num_targets


def check_rows(reader: ShardReader, option: str) -> None:
    """InputError for a cache without any sequence: a fold of a small text may be captured as one."""
    if not any(reader.blocks):
        raise InputError(f"{option}: expected sequences, found none in {reader.cache}; give a capture of more records")


def _rows_of(reader: ShardReader) -> Iterator[KeysAndTargets]:
    """The keys of a cache's rows, block by block; no other column but the targets' positions is decoded."""
    for block in range(len(reader.blocks)):
        yield keys_and_targets(reader.table(block, columns=["key", "target_positions"]))
