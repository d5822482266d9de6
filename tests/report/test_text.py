"""What a person reads in a terminal of 80 columns, and in Markdown."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess

import pytest

from pipeline.analysis.values import Interval, LabelSaving, StudyFigures
from pipeline.report.cells import columns, paired_differences, score_text
from pipeline.report.text import WIDTH, command_lines, markdown, table_lines, terminal, wrapped
from support.sample_figures import full_study, healthy, large_study, minimal_study, plain_text_study, too_high

STUDIES = {"full": full_study, "minimal": minimal_study, "plain text": plain_text_study, "large": large_study}


def lines_of(study: StudyFigures) -> list[str]:
    return list(terminal(study, too_high()))


@pytest.mark.parametrize("name", STUDIES)
def test_every_line_fits_80_columns(name: str) -> None:
    lines = lines_of(STUDIES[name]())
    assert [line for line in lines if len(line) > WIDTH] == []
    assert not any("None" in line or "nan" in line for line in lines)


def test_paired_lines_name_the_experiment_on_which_conclusions_rest() -> None:
    """A gate under a name of its own is compared with combined, and not combined with itself."""
    study = full_study()
    arms = tuple(
        dataclasses.replace(one, arm=dataclasses.replace(one.arm, name="gated")) if one.arm.role == "combined" else one
        for one in study.main.arms
    )
    main = dataclasses.replace(study.main, arms=arms)
    found = [row for paired in paired_differences(main) for row in paired.rows]
    assert any(name.startswith("gated - ") for name, _, _ in found)
    assert not any(name.startswith("combined - ") for name, _, _ in found)
    assert any(name.startswith("combined - ") for one in paired_differences(study.main) for name, _, _ in one.rows)


def test_the_verdict_comes_first_and_its_command_can_be_pasted() -> None:
    lines = lines_of(full_study())
    assert lines[0].startswith("KD_TOO_HIGH (heuristic)  The student copies its teacher's errors")
    command = too_high().command + " 'controls=[shuffled, smoothed]' loss.kd.gate.min_confidence=0.6 epochs=4"
    pasted = list(command_lines(command))
    assert len(pasted) > 1
    script = "shown() { printf '%s\\n' \"$@\"; }; shown " + "\n".join(pasted)
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == shlex.split(command)


def test_the_paired_difference_stands_with_its_interval_and_counts() -> None:
    text = "\n".join(lines_of(full_study()))
    assert "(paired, 1,500 records; 3 seeds)" in text
    assert "combined - gold_only  +7.7 points [+6.6, +8.8]" in text
    assert "176 won / 61 lost" in text  # 0.077 * 1500 + 61 = 176.5, rounded to even
    study = full_study()
    arms = [dataclasses.replace(f, arm=dataclasses.replace(f.arm, seeds=(1,))) for f in study.main.arms]
    one = dataclasses.replace(study, main=dataclasses.replace(study.main, arms=tuple(arms)), more=())
    assert "1 seed: seed noise unknown" in "\n".join(lines_of(one))
    assert "(paired, 1,500 records; 3 seeds)" not in "\n".join(lines_of(one))


def test_a_plain_text_study_has_perplexities_and_the_floor() -> None:
    text = "\n".join(lines_of(plain_text_study()))
    assert "21.16 [20.72, 21.61]" in text  # exp(3.052), bounds in ascending order
    assert "combined - gold_only  +0.053 nats [+0.036, +0.070]" in text
    assert "PGR of combined  not given: no ceiling" in text
    assert score_text(Interval(value=-1.0, low=-2.0, high=0.0), "-nll") == "2.718 [1, 7.389]"


def test_a_column_for_each_option_that_varies_and_none_that_is_empty_or_constant() -> None:
    study = large_study(60)
    heads = [column.head for column in columns(study.main, is_wide=False)]
    assert heads[:4] == ["arm", "kd", "T", "lr"]
    assert "ties" in heads
    few = dataclasses.replace(study.main, arms=study.main.arms[2:6])
    heads = [column.head for column in columns(few, is_wide=False)]
    assert heads == ["arm", "accuracy %", "- gold_only", "PGR", "agree %"]  # all have three seeds, none has ties
    wide = [column.head for column in columns(few, is_wide=True)]
    assert set(heads) < set(wide)
    assert {"- weak_only", "- teacher", "ECE", "nll", "imitation %", "excess imitation"} <= set(wide)


def test_a_wide_table_continues_below_with_the_rows_named_again() -> None:
    study = large_study(60)
    lines = list(table_lines(columns(study.main, is_wide=True)))
    blocks = "\n".join(lines).split("\n\n")
    assert len(blocks) > 1
    for block in blocks:
        first, *rows = block.splitlines()
        assert first.startswith("arm")
        assert [int(row.split()[0]) for row in rows] == list(range(1, len(study.main.arms) + 1))
    cells = {cell for column in columns(study.main, is_wide=True)[1:] for cell in column.cells}
    assert all(cell in "\n".join(lines) for cell in cells)  # nothing is lost on the way


def test_control_characters_of_records_are_shown_and_not_sent() -> None:
    """A terminal would obey them; in Markdown a carriage return would begin a new line."""
    hostile = "red\x1b[31m\rtop\x9b2J\u202eend"
    study = full_study()
    judged = dataclasses.replace(too_high(), evidence=(hostile,), headline=hostile)
    text = "\n".join([*terminal(study, judged), *wrapped(hostile)])
    example = dataclasses.replace(study.examples[0], prompt=hostile, truth=hostile)
    page = markdown(dataclasses.replace(study, examples=(example,)), judged)
    for shown in (text, page):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
        assert "x1b[31m top" in shown.replace("\\[", "[")


def test_markdown_holds_all_and_shows_hostile_text_as_it_is() -> None:
    study = full_study()
    example = dataclasses.replace(study.examples[0], prompt="a | b\n[x](http://y) <script> `c` *d* _e_ f_g")
    saving = LabelSaving(
        sizes=(40, 80), scores=(Interval(value=0.7), Interval(value=0.8)), num_gold=80, equivalent=None, note="too few"
    )
    study = dataclasses.replace(study, examples=(example,), label_saving=saving)
    text = markdown(study, healthy())
    assert r"a \| b [x\](http://y) \<script\> \`c\` \*d\* \_e\_ f_g" in text
    assert text.startswith("# demo: HEALTHY\n")
    assert f"```bash\n{healthy().command}\n```" in text
    assert "- combined - gold_only +7.7 points [+6.6, +8.8] (paired, 1,500 records; 3 seeds; 176 won / 61 lost)" in text
    assert "label saving not known: too few" in text
    assert "| 80 | 0.8000 |" in text
    assert "further text, out of domain news headlines" in text
    assert "torch 2.13.0" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in tables[: 2 + len(study.main.arms)]}) == 1
