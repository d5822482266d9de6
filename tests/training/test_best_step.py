"""A run whose best step by dev leaves it: at every ZeRO stage, after kills, on other ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.options import load_config, save_config
from pipeline.config.schema import ExportedStep, TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.types import InputError
from pipeline.training import dev_evaluation, driver
from support.commands import (
    composed,
    prepare_run,
    run_ranks,
    script,
    start,
    train_arguments,
    wait_for_steps,
)
from support.tiny import prompts, write_lines

# the first look is the best for ever, and a step does not know how many are to come
FIRST: dict[str, Any] = {
    "export__what": "best",
    "early_stopping__min_delta": 1e9,
    "evaluate_every_steps": 3,
    "optimizer__schedule": "constant",
    "optimizer__warmup_fraction": 0,
    "checkpoint__every_steps": 2,
    "micro_batch": 1,
}


def weights_of(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_best_steps_weights_leave_at_every_stage_and_on_other_ranks(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """Two ranks: seven steps of which the third is best export, bit by bit, what three steps export.

    So does one of which each look is better than the one before, for six steps; and LoRA. A run of which the first step
    is best, stopped after it on two ranks at ZeRO 1, is brought to its end by one rank at ZeRO 3.
    """

    def prepare(name: str, **changes: Any) -> Path:
        return prepare_run(tmp_path / name, train_arguments(student, data, str(cache), **FIRST | changes))

    told = [{"prompt": row["prompt"], "completion": row["completion"]} for row in prompts(12, labeled=True, first=60)]
    kinds = [("float32", stage) for stage in range(4)] + [("bfloat16", 0), ("bfloat16", 2)]
    pairs = []
    for dtype, stage in kinds:
        how = {"student__dtype": dtype, "deepspeed__zero_stage": stage}
        best = prepare(f"best-{dtype}-{stage}", steps=7, **how)
        pairs.append((best, prepare(f"last-{dtype}-{stage}", steps=3, **how | {"export__what": "last"})))
    lora = {"adapter": "lora", "deepspeed__zero_stage": 2}
    pairs.append(
        (prepare("best-lora", steps=7, **lora), prepare("last-lora", steps=3, **lora | {"export__what": "last"}))
    )
    free = {"dev__files": f"[{write_lines(tmp_path / 'free.jsonl', told)}]", "early_stopping__min_delta": 0}
    later = prepare("best-later", steps=7, **free), prepare("last-later", steps=6, **free | {"export__what": "last"})
    moved = prepare("moved", steps=6, evaluate_every_steps=1)
    first = prepare("first", steps=1, evaluate_every_steps=1)
    (moved / "stop-requested").touch()
    run_ranks(2, [folder for pair in [*pairs, later] for folder in pair] + [moved, first])
    for best, last in pairs:
        assert weights_of(best) == weights_of(last), best.name
        # the last checkpoint and the best one were kept beside each other, and nothing else
        assert {path.name for path in (best / "checkpoints").glob("step-*")} == {"step-00000003", "step-00000007"}
    assert len({weights_of(last) for _, last in pairs}) > 2
    # a better one came, and the best before it went
    assert weights_of(later[0]) == weights_of(later[1])
    assert {path.name for path in (later[0] / "checkpoints").glob("step-*")} == {"step-00000006", "step-00000007"}

    (moved / "stop-requested").unlink()
    assert len(list((moved / "checkpoints").glob("step-*"))) == 1
    config = load_config(moved / "config.yaml", TrainConfig)
    config.deepspeed.zero_stage = 3
    save_config(config, moved / "config.yaml")
    driver.convert_checkpoints(config, RunPaths(folder=moved), 1)
    run_ranks(1, [moved])
    assert weights_of(moved) == weights_of(first)
    kept = {path.name for path in (moved / "checkpoints").glob("step-*")}
    assert kept == {"step-00000001", "step-00000001-universal", "step-00000006"}


@pytest.mark.slow
def test_killed_and_resumed_the_best_is_that_of_an_undisturbed_run(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    def arguments(runs: str) -> list[str]:
        more = {"steps": 40, "evaluate_every_steps": 4, "checkpoint__every_steps": 3, "micro_batch": 2}
        return train_arguments(student, data, str(cache), **FIRST | more, runs_dir=runs)

    output = script("train", *arguments("undisturbed"), cwd=tmp_path).stderr
    assert "3 of them while one is saved" in output
    assert "loading the checkpoint of step 4" in output
    (run,) = (tmp_path / "undisturbed").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["exported_step"], result["best_step"]) == (40, 4, 4)
    assert (
        "The weights of step 4, the best of those evaluated on dev. 40 steps" in (run / "model/README.md").read_text()
    )
    seen = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").open())}
    assert result["dev"]["nll"] == pytest.approx(seen[4]["dev_nll"], rel=1e-5)
    assert result["dev"]["nll"] != pytest.approx(seen[40]["dev_nll"], rel=1e-3)
    assert not (run / "checkpoints").exists()

    process = start(arguments("runs"), tmp_path)
    wait_for_steps(tmp_path / "runs", 10, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    script("train", *arguments("runs"), cwd=tmp_path)
    (resumed,) = (tmp_path / "runs").iterdir()
    assert weights_of(resumed) == weights_of(run)
    assert json.loads((resumed / "result.json").read_text())["exported_step"] == 4


def test_a_best_of_nothing_is_refused() -> None:
    config = composed("train", "study=demo", "export.what=best", "evaluate_every_steps=9")
    assert config.export.what is ExportedStep.best
    dev_evaluation.check(config, 9)
    with pytest.raises(InputError, match="expected evaluate_every_steps of at most the 8 steps of this run, found 9"):
        dev_evaluation.check(config, 8)
