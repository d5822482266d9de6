"""What `--help` prints: the values that the same command would use, choices, only what this script has."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

from pipeline.config.commands import ROOTS
from pipeline.config.help import help_text, help_words
from pipeline.config.options import choices_of, option_types, options
from support.commands import ROOT, composed, script


def shown_values(root: str, *arguments: str) -> dict[str, str]:
    """Each option with what stands behind its name."""
    lines = help_text(root, "A story.", arguments).split("Options (name=value")[1].splitlines()
    found = [re.fullmatch(r"  ([\w.]+) = (.*?)(?:   \(.*\))?", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def test_the_values_are_those_that_the_command_would_use() -> None:
    plain = shown_values("train")
    assert (plain["window"], plain["student.path"], plain["gold.files"]) == (
        "512",
        "must be given",
        "must be given where gold is used",
    )
    arguments = ["study=demo", "experiment=gold_only", "optimizer.warmup_fraction=0.2"]
    shown, config = shown_values("train", *arguments), composed("train", *arguments)
    for name in option_types(ROOTS["train"]):
        *parents, last = name.split(".")
        section = functools.reduce(lambda node, part: getattr(node, part, None), parents, config)
        if section is None:  # a null section: its options are the declared ones
            continue
        value = getattr(section, last)
        if isinstance(value, Enum):
            assert shown[name] == value.name, name
        elif isinstance(value, bool) or value is None:
            assert shown[name] == {True: "true", False: "false", None: "null"}[value], name
        elif isinstance(value, (int, float, str)):
            assert shown[name] == str(value), name
    assert (shown["window"], shown["global_batch"], shown["steps"], shown["epochs"]) == ("64", "16", "24", "null")
    assert shown["gold.files"] == "[data/demo/gold.jsonl]"
    assert shown["student.adapter.rank"] == "16"  # what it would be
    assert shown["scoring.few_shot_from.files"] == "must be given where scoring.few_shot_from is used"


@pytest.mark.parametrize("root", sorted(ROOTS))
def test_the_names_of_every_enum_and_only_the_groups_of_this_script(root: str) -> None:
    text = help_text(root, "A story.", [])
    for name, hint in option_types(ROOTS[root]).items():
        if choices := choices_of(hint):
            assert re.search(rf"^  {name} = .*   \({re.escape(' | '.join(choices))}\)$", text, re.MULTILINE), name
    groups = set(re.findall(r"^  ([\w@]+) = \S+   \(.*\)$", text.split("Options (")[0], re.MULTILINE))
    expected = {
        "train": {"model@student", "text@gold", "text@dev", "text@test", "loss", "deepspeed", "adapter", "experiment"},
        "capture": {"model@teacher", "text@corpus"},
        "evaluate": {"model", "text"},
        "audit": {"model@teacher"},
        "submit": {"cluster"},
        "search": {"search"},
    }.get(root, set())
    assert groups == expected | {"study"}
    assert ("A name with @ is a place: " in text) == any("@" in group for group in groups)


def test_words_after_help_choose_options() -> None:
    shown = help_text("train", "A story.", ["--help", "loss.kd.ramp"]).splitlines()
    names = [line.split(" = ")[0].strip() for line in shown if " = " in line]
    assert names == [f"loss.kd.ramp.{name}" for name in option_names("RampConfig")]
    assert "A story." not in shown
    assert "Xiao & Zhu, Foundations of Large Language Models, eq. 4.13" in help_text("train", "", ["--help", "lambda"])
    assert "optimizer.learning_rate = " in help_text("train", "", ["help=lr"])
    assert help_text("train", "", ["--help", "zzqq"]).startswith("No option of train has zzqq in its name")
    assert help_words(["seed=1"]) is None
    assert help_words(["study=demo", "--help", "loss.kd", "seed=1", "-m"]) == ["loss.kd"]
    assert help_words(["help=lr", "-h"]) == ["lr"]


def option_names(schema: str) -> list[str]:
    from pipeline.config import schema as schemas

    return [name for name, _, _ in options(getattr(schemas, schema))]


def test_options_that_do_not_compose_leave_the_declared_defaults_and_the_reason() -> None:
    text = help_text("train", "A story.", ["loss.kd.divergence=foo"])
    assert "(declared defaults, because these options do not compose: loss.kd.divergence: expected one of" in text
    assert "  window = 512\n" in text


def test_a_sweep_shows_its_first_value() -> None:
    assert shown_values("train", "seed=7,8", "experiment=weak_only,combined")["seed"] == "7"
    assert shown_values("train", "seed=7,8", "experiment=weak_only,combined")["role"] == "weak_only"


def test_an_experiment_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\ngold_fraction: 0.25\n")
    done = script("train", "--help", "--config-dir", str(tmp_path), "experiment=mine", cwd=tmp_path)
    assert "  gold_fraction = 0.25\n" in done.stdout
    assert re.search(r"^  experiment = mine   \(.* \| mine \| .*\)$", done.stdout, re.MULTILINE)


def test_help_needs_neither_torch_nor_the_files_of_a_study(tmp_path: Path) -> None:
    code = "import sys; sys.argv[1:] = ['--help', 'study=demo']; import runpy; "
    code += f"runpy.run_path({str(ROOT / 'scripts' / 'train.py')!r}, run_name='__main__'); "
    code += "print('loaded:', sorted({'torch', 'pyarrow', 'transformers', 'numpy', 'polars'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: []\n")
