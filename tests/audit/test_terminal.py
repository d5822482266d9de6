"""show and the lines of a terminal: what is printed is what the cache holds, and no text can control the terminal."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.audit import commands, terminal
from pipeline.audit.sampling import samples_of_record
from pipeline.audit.verify import load_manifest
from pipeline.config.commands import AuditConfig
from pipeline.config.schema import ModelConfig
from pipeline.core.progress import readable
from pipeline.core.types import InputError
from support.tiny import prompts


def show_config(cache: Path, teacher: Path, **options: Any) -> AuditConfig:
    return AuditConfig(cache=str(cache), teacher=ModelConfig(path=str(teacher)), **options)


def test_show_prints_the_text_the_targets_and_the_distribution(
    labeled_copy: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run("show", show_config(labeled_copy, teacher, record=31, top=3)) == 0
    printed = capsys.readouterr().out
    row = prompts(60, labeled=True)[31]
    assert row["prompt"] in printed
    targets = "".join(re.findall(r'^  next: "(.*?)"  \(the teacher', printed, re.MULTILINE))
    assert targets.endswith(row["completion"] + "<eos>")
    assert (row["prompt"] + row["completion"] + "<eos>").endswith(targets)
    blocks = printed.strip().split("\n\n")
    assert len(blocks) > 5  # every position of the record, and of no other
    assert all(block.startswith("record 31, position ") for block in blocks)
    for block in blocks:
        percents = [float(line.split("%")[0].strip(" *")) for line in block.splitlines() if "%" in line[:12]]
        assert sum(percents) == pytest.approx(100, abs=0.05)
        assert len(percents) == 5  # three entries, the others, the tail


def test_show_prints_how_likely_a_node_of_the_choices_is(
    choices_cache: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a node inside a choice: how much of the choice was read, and the probability that the cache holds."""
    commands.run("show", show_config(choices_cache, teacher, record=3))
    blocks = capsys.readouterr().out.strip().split("\n\n")
    found = [re.search(r"in a choice: (\d) of its tokens read  \(probability ([\d.]+)%\)", block) for block in blocks]
    shown = sorted((int(match[1]), float(match[2])) for match in found if match)
    expected = []
    for sequence, captured in samples_of_record(choices_cache, load_manifest(choices_cache), 3):
        ends = list(itertools.accumulate(sequence.segment_lengths))
        for s, depth, weight in zip(
            sequence.target_positions_N.tolist(),
            sequence.depths_or_zeros().tolist(),
            captured.weights_or_ones().tolist(),
            strict=True,
        ):
            if depth and sequence.record_ids[next(i for i, end in enumerate(ends) if s < end)] == 3:
                expected.append((depth, round(100 * weight, 2)))
    assert shown == sorted(expected)
    assert len(shown) < len(blocks)  # right after the prompt no choice has begun


def test_random_rows_are_a_function_of_the_seed(cache: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for seed in (1, 1, 2):
        commands.run("show", show_config(cache, teacher, rows=4, seed=seed))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert printed[0].count("record ") == 4


def test_records_that_are_not_there_are_refused(cache: Path, teacher: Path) -> None:
    with pytest.raises(InputError, match="record: expected 0 to 59"):
        commands.run("show", show_config(cache, teacher, record=60))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", '"a\\nb"'),
        ("\x1b[31m", '"\\x1b[31m"'),
        ('"', '"\\""'),
        ("\\", '"\\\\"'),
        ("é日", '"é日"'),
        ("\u202e", '"\\u202e"'),
    ],
)
def test_text_cannot_control_a_terminal(text: str, shown: str) -> None:
    assert terminal.visible(text) == shown


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (18_402, "18.4 kB"), (3.2e9, "3.2 GB"), (5e12, "5 TB")]
)
def test_readable_bytes(size: float, text: str) -> None:
    assert readable(size) == text


@given(st.floats(-1, 2))
def test_a_bar_is_as_long_as_its_fraction(fraction: float) -> None:
    drawn = terminal.bar(fraction, width=10)
    eighths = sum(8 if character == "█" else " ▏▎▍▌▋▊▉".index(character) for character in drawn)
    assert eighths == pytest.approx(80 * min(max(fraction, 0), 1), abs=0.51)
