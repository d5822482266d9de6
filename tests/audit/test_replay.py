"""replay: a cache agrees with its teacher, and a changed value or another teacher is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.audit import commands
from pipeline.config.commands import AuditConfig
from pipeline.config.schema import Dtype, ModelConfig
from pipeline.core.types import InputError
from support.damage import ChangeOfList, copy_cache, rewrite_first_row

HALF = np.float16


def replay_config(cache: Path, teacher: Path) -> AuditConfig:
    model = ModelConfig(path=str(teacher), dtype=Dtype.float32, attention="sdpa")
    return AuditConfig(cache=str(cache), teacher=model, rows=100)


def test_a_cache_agrees_with_its_teacher(labeled_copy: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run("replay", replay_config(labeled_copy, teacher)) == 0
    printed = capsys.readouterr().out
    assert ": consistent: " in printed
    assert "same top entry at 100.0% of the positions" in printed


def with_other_first_id(ids: list[int]) -> list[int]:
    return [(ids[0] + 1 if ids[0] + 1 not in ids else ids[0] + 117) % 300, *ids[1:]]


CHANGED_VALUES: dict[str, tuple[dict[str, ChangeOfList], str]] = {  # -> the measure that finds it
    "logit": ({"relative_logits": lambda z: [z[0], HALF(z[1] - 0.2), *z[2:]]}, "kept"),
    "id": ({"topk_ids": with_other_first_id}, "kept"),
    "entropy": ({"entropy": lambda e: [HALF(e[0] + 0.1), *e[1:]]}, "entropy"),
    "log_tail": ({"log_tail": lambda t: [t[0] + 0.05, *t[1:]]}, "log_tail"),
    "next_log_prob": ({"next_log_prob": lambda p: [HALF(p[0] - 0.1), *p[1:]]}, "next_log_prob"),
}


@pytest.mark.parametrize("changed", CHANGED_VALUES)
def test_a_changed_value_is_found(
    labeled_copy: Path, teacher: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, measure = CHANGED_VALUES[changed]
    if "hybrid" in labeled_copy.name and changed in ("logit", "log_tail", "id"):
        # more has to change there, because two draws may fall on other tokens
        changes, measure = {"topk_ids": lambda ids: [*((i + 150) % 300 for i in ids[:4]), *ids[4:]]}, "draws"
    rewrite_first_row(labeled_copy, 2, **changes)
    assert commands.run("replay", replay_config(labeled_copy, teacher)) == 1
    printed = capsys.readouterr().out
    (verdict,) = [line for line in printed.splitlines() if "NOT CONSISTENT" in line]
    measures = verdict.split("NOT CONSISTENT in ")[1].split(" (")[0].split(", ")
    assert measure in measures
    assert [line.split()[0] for line in printed.splitlines() if line.endswith("  exceeded")] == measures


def test_a_changed_weight_is_found(
    choices_cache: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A choices cache agrees with its teacher; then the last weight of the first row moves by 0.01."""
    cache = copy_cache(choices_cache, tmp_path)
    assert commands.run("replay", replay_config(cache, teacher)) == 0
    assert "weights" in capsys.readouterr().out
    rewrite_first_row(cache, 0, weights=lambda weights: [*weights[:-1], weights[-1] + 0.01])
    assert commands.run("replay", replay_config(cache, teacher)) == 1
    assert "NOT CONSISTENT in weights (" in capsys.readouterr().out


def test_another_teacher_is_refused_before_it_loads(cache: Path, teacher: Path, student: Path) -> None:
    with pytest.raises(InputError, match=r"teacher.path: expected the weights"):
        commands.run("replay", replay_config(cache, student))
    for option, value in (("dtype", Dtype.bfloat16), ("num_layers", 1)):
        config = replay_config(cache, teacher)
        setattr(config.teacher, option, value)
        with pytest.raises(InputError, match=f"teacher.{option}"):
            commands.run("replay", config)
    with pytest.raises(InputError, match=r"give teacher.path"):
        commands.run("replay", AuditConfig(cache=str(cache)))
