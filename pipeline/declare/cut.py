"""One labeled text cut into gold, dev and test: by a hash of each prompt, so that no prompt is in two of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import write_atomically
from pipeline.core.types import InputError
from pipeline.data.records import fields_of, find_shape, row_of
from pipeline.data.text_files import Text, all_records
from pipeline.declare.leaks import prompt_key, prompt_of

MIN_RECORDS = 20  # in all: fewer measure nothing
GOLD_PERCENT, TEST_PERCENT, MAX_TEST, MAX_DEV = 35, 50, 2000, 500
MIN_FOR_DEV = 60  # records from which there is a dev text


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The records of each new text as JSON lines, and where they are to be written."""

    folder: Path
    lines: dict[str, list[str]]
    num_left: int
    """Records in none of them."""

    def files(self) -> dict[str, str]:
        """Name of the text -> its file."""
        return {name: str(self.folder / f"{name}.jsonl") for name in self.lines}


def cut_labeled(text: Text, folder: Path, *, seed: int, gold_records: int | None) -> Cut:
    """Gold, dev and test from a labeled text; the same text and seed always give the same.

    Test gets half of the records and at most 2,000, dev 15 % and at most 500, gold the rest or `gold_records`. Records
    are ordered by blake2b(seed, prompt); those with the same prompt stay together, so sizes may differ a little.
    InputError where there are too few.
    """
    groups = _groups(find_shape(text), seed)
    total = sum(map(len, groups))
    if total < MIN_RECORDS:
        raise InputError(
            f"labeled: expected at least {MIN_RECORDS} records to cut gold and test from, found {total}; label more, "
            "or give gold and test"
        )
    sizes = _sizes(total, gold_records)
    lines, rest = dict[str, list[str]](), iter(groups)
    for name in ("test", "dev", "gold"):
        if not sizes[name]:
            continue
        lines[name] = []
        while len(lines[name]) < sizes[name] and (group := next(rest, None)) is not None:
            lines[name] += group
    if not lines.get("gold"):
        raise InputError("labeled: expected records with different prompts, found too few to cut; give gold and test")
    return Cut(folder=folder, lines=lines, num_left=sum(map(len, rest)))


def _sizes(total: int, gold_records: int | None) -> dict[str, int]:
    test = min(total * TEST_PERCENT // 100, MAX_TEST)
    dev = min(total * (100 - GOLD_PERCENT - TEST_PERCENT) // 100, MAX_DEV) if total >= MIN_FOR_DEV else 0
    most = total - test - dev
    if gold_records is not None and gold_records > most:
        raise InputError(
            f"gold_records: expected at most {most}, because {test} of the {total} labeled records become test and "
            f"{dev} dev, found {gold_records}; use fewer, or give gold and test yourself"
        )
    return {"test": test, "dev": dev, "gold": most if gold_records is None else gold_records}


def _groups(text: Text, seed: int) -> list[list[str]]:
    """The records as JSON lines, those with the same prompt together, in the order of the hash."""
    groups = dict[bytes, list[str]]()
    for raw in all_records(text.files):
        try:
            key = prompt_key(prompt_of(fields_of(raw, text), text))
            groups.setdefault(key, []).append(json.dumps(row_of(raw, text), ensure_ascii=False, default=_unwritable))
        except InputError as error:
            raise InputError(f"{raw[0]}: {error}; fix the record") from None
    order = sorted(groups, key=lambda key: hashlib.blake2b(seed.to_bytes(8, "little") + key).digest())
    return [groups[key] for key in order]


def _unwritable(value: Any) -> str:
    raise InputError(f"expected values that JSON can hold, found {type(value).__name__}; leave that column out")


@contextlib.contextmanager
def written_cut(cut: Cut) -> Iterator[None]:
    """The new texts as files, within the block and after it; where the block fails, what was written is removed.

    A file that is there already must be the same one, and stays. InputError where it is another, before any is written.
    """
    contents = {Path(file): "".join(f"{line}\n" for line in cut.lines[name]) for name, file in cut.files().items()}
    for path, content in contents.items():
        if path.exists() and path.read_text() != content:
            raise InputError(
                f"{path}: expected no such file, or the one that this cut makes, found another; move it away, or give "
                "gold, dev and test"
            )
    is_new_folder, new = not cut.folder.exists(), [path for path in contents if not path.exists()]
    try:
        cut.folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            write_atomically(path, contents[path])
        yield
    except BaseException:  # a KeyboardInterrupt, too
        for path in new:
            path.unlink(missing_ok=True)
        if is_new_folder and cut.folder.is_dir():
            cut.folder.rmdir()
        raise


def cut_sentence(cut: Cut) -> str:
    """How many records each new text has, in one line."""
    counts = ", ".join(f"{name} {len(lines):,}" for name, lines in sorted(cut.lines.items()))
    left = f"; {cut.num_left:,} are left out" if cut.num_left else ""
    return f"{counts} (in {cut.folder}){left}"
