"""Every YAML composes into its dataclass; contradictory and renamed options are refused at once."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.commands import ROOTS
from pipeline.config.groups import CONF_DIR
from pipeline.config.help import help_text
from pipeline.config.options import identity_options, load_config, options, save_config
from pipeline.config.overrides import check_override_names
from pipeline.config.schema import Control, Targets, TrainConfig
from pipeline.config.validate import check_capture
from pipeline.config.validate_packages import OLDEST_DEEPSPEED, check_deepspeed
from pipeline.config.validate_train import check_train
from pipeline.core.types import InputError
from support.commands import ROOT, composed, script


def yaml_choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


# Where each group is used: every file of a group is composed there.
OWN = {"model": "path=some/folder", "text": "files=[some.jsonl]"}  # what own.yaml leaves to the user
USES = [
    ("train", "experiment", "experiment"),
    ("train", "loss", "loss"),
    ("train", "deepspeed", "deepspeed"),
    ("train", "adapter", "adapter"),
    ("train", "model@student", "model"),
    ("capture", "model@teacher", "model"),
    ("evaluate", "model", "model"),
    ("capture", "text@corpus", "text"),
    ("train", "text@gold", "text"),
    ("train", "text@dev", "text"),
    ("train", "text@test", "text"),
    ("evaluate", "text", "text"),
    ("submit", "cluster", "cluster"),
    ("search", "search", "search"),
]


# What a root leaves to the user, beside a study.
LEFT = {
    "import": ["name=theirs", "source=some/folder", "format=distillkit", "tokenizer=some/teacher"],
    "evaluate": ["model.path=some/folder"],
    "pool": ["name=pool", "members=[some/cache]"],
}


def of_demo(root: str, *overrides: str) -> Any:
    return composed(root, "study=demo", *LEFT.get(root, []), *overrides)


@pytest.mark.parametrize("root", sorted(ROOTS))
def test_roots_compose(root: str) -> None:
    assert isinstance(of_demo(root), ROOTS[root])


@pytest.mark.parametrize(
    ("root", "key", "group", "choice"),
    [(root, key, group, choice) for root, key, group in USES for choice in yaml_choices(group)],
)
def test_every_yaml_composes_and_holds_together(root: str, key: str, group: str, choice: str) -> None:
    own_path = [f"{key.split('@')[-1]}.{OWN[group]}"] if choice == "own" else []
    config = of_demo(root, f"{key}={choice}", *own_path)
    if root == "capture":
        check_capture(config)
    if root == "train" and key != "loss":
        check_train(config)


def test_no_yaml_is_left_out() -> None:
    used = {group for _, _, group in USES}
    assert {path.name for path in CONF_DIR.iterdir() if path.is_dir()} == used | {"study"}  # tests/config/test_study.py
    assert {path.stem for path in CONF_DIR.glob("*.yaml")} == set(ROOTS) | {"hydra_defaults"}


def test_experiments_are_named_as_their_files() -> None:
    for name in yaml_choices("experiment"):
        assert of_demo("train", f"experiment={name}").name == name.removesuffix("_as_is")


@pytest.mark.parametrize("choice", yaml_choices("loss"))
def test_a_loss_on_the_command_line_replaces_the_one_of_every_experiment(choice: str) -> None:
    """No experiment sets single weights, which would stay."""
    expected = of_demo("train", "experiment=gold_only", f"loss={choice}").loss
    for name in yaml_choices("experiment"):
        loss = of_demo("train", f"experiment={name}", f"loss={choice}").loss
        if name in ("shuffled", "smoothed"):
            assert loss.kd.control.name == name
            loss.kd.control = Control.none
        assert loss == expected


def test_the_weights_of_the_demo() -> None:
    for overrides in (["experiment=combined"], []):
        loss = of_demo("train", *overrides).loss
        assert (loss.lm.weight, loss.kd.weight) == (0.3, 1.0)
    weights = of_demo("train", "experiment=combined", "loss=weak").loss
    assert (weights.lm.weight, weights.kd.weight) == (0.0, 1.0)


def test_every_option_has_a_sentence_and_help_shows_it() -> None:
    for root, schema in ROOTS.items():
        shown = help_text(root, "A story.", [])
        for name, _, sentence in options(schema):
            assert len(sentence) > 8
            assert f"  {name} = " in shown
            assert sentence in shown


def test_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    more = ["+deepspeed.overrides.wall_clock_breakdown=true", "+more_tests={news: {files: [a.jsonl], targets: next}}"]
    config = of_demo("train", "experiment=combined", *more)
    assert config.more_tests["news"].targets is Targets.next
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", TrainConfig) == config


def test_result_options_leave_out_what_does_not_change_the_result() -> None:
    base = identity_options(of_demo("train"))
    same = ["micro_batch=4", "runs_dir=elsewhere", "launcher.num_processes=2", "checkpoint.every_steps=7"]
    same += ["deepspeed.zero_stage=3", "student.path=/moved", "cache=/moved", "dev.files=[/moved]"]
    same += ["trackers=[tensorboard]", "health.max_skipped_steps=2"]
    for override in same:
        assert identity_options(of_demo("train", override)) == base, override
    for override in ["seed=2", "loss.kd.weight=0.3", "global_batch=32", "student.dtype=float32", "name=other", "k=4"]:
        assert identity_options(of_demo("train", override)) != base, override


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "steps and epochs": ({"steps": 3}, "expected one of steps and epochs, found steps=3"),
    "neither": ({"epochs": None}, "expected one of steps and epochs, found steps=None, epochs=None"),
    "fraction": ({"gold_fraction": 1.5}, "gold_fraction: expected 0 to 1, found 1.5"),
    "no gold": ({"gold": None}, "gold is null; give a gold set or gold_fraction=0"),
    "no cache": ({"cache": None}, "cache is null; give a cache or gold_fraction=1"),
    "batch": ({"global_batch": 0}, "global_batch: expected at least 1, found 0"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(name: str) -> None:
    changes, message = CONTRADICTIONS[name]
    config = dataclasses.replace(of_demo("train", "experiment=combined"), **changes)
    with pytest.raises(InputError) as refused:
        check_train(config)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deepspeed.zero_stage=4"], "deepspeed.zero_stage: expected 0 to 3, found 4"),
        (["student.dtype=float16", "deepspeed.zero_stage=0"], "student.dtype=float16: expected deepspeed.zero_stage 1"),
        (["loss.kd.weight=-1"], "loss weights: expected 0 or more"),
        (["loss.kd.weight=0", "loss.lm.weight=0"], "no term with a weight above 0 reads any text"),
        (["loss.kd.temperature=0"], "kd_temperature: expected more than 0"),
        (["experiment=gold_only", "loss.lm.on=[corpus]"], "no term with a weight above 0 reads any text"),
        (["loss.kd.on=[gold,corpus]"], "loss.kd.on: expected [corpus], because gold carries no output"),
        (["epochs=null", "steps=-1"], "steps: expected at least 0, found -1"),
        (["experiment=zero_shot", "dev=null", "test=null"], "steps=0: expected dev, test or more_tests"),
        (["+more_tests={test: {files: [x]}}"], "more_tests: expected names other than dev and test, found test"),
        (["+more_tests={a/b: {files: [x]}}"], "more_tests: expected a name without /"),
        (["out_of_domain=[news]"], "out_of_domain: expected names of more_tests [], found ['news']"),
        (["epochs=-1"], "epochs: expected more than 0, found -1"),
        (["launcher.num_processes=0"], "num_processes: expected at least 1, found 0"),
        (["optimizer.warmup_fraction=3"], "warmup_fraction: expected 0 to 1, found 3"),
        (
            ["optimizer.schedule=step", "optimizer.step_at_fractions=[0.75,0.5]"],
            "optimizer.step_at_fractions: expected one or more fractions in ascending order",
        ),
        (["optimizer.schedule=step", "optimizer.step_at_fractions=[]"], "warmup_fraction 0.05 and 1, found []"),
        (["optimizer.schedule=step", "optimizer.step_factor=0"], "step_factor: expected more than 0"),
        (["optimizer.max_grad_norm=-1"], "max_grad_norm: expected at least 0, found -1"),
    ],
)
def test_contradictions_from_the_command_line(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        check_train(of_demo("train", *overrides))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss.kd.wieght=1"], "expected the name of an option, found 'loss.kd.wieght'; did you mean loss.kd.weight"),
        (["experiment=combind"], "combind"),
        (["text@dev=null"], "text@dev=null: expected one of ['own']; for none use dev=null"),
        (["global_batch=many"], "many"),
        (["study=demo", "cache=nowhere/*"], "student.path: expected 'data/demo/smollm2-135m' to exist, found"),
        (["gold_fraction=???"], "gold_fraction"),
    ],
)
def test_the_script_refuses_in_the_first_second_and_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    started = time.monotonic()
    done = script("train", *arguments, cwd=tmp_path, check=False)
    assert time.monotonic() - started < 2.5  # 0.3 s on an idle machine
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_of_every_script(tmp_path: Path) -> None:
    for root in ROOTS:
        words = ["study", "preview"] if root == "preview" else [root]
        done = script(*words, "--help", cwd=tmp_path)
        assert "Options (name=value" in done.stdout


# ---------------------------------------------------------------------------------------- old names


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mirrors=[wandb]", "expected trackers, found its old name mirrors; use the new one"),
        (
            "loss.kd.overtaken.every_steps=5",
            "expected loss.kd.adaptive_weight.every_steps, found its old name loss.kd.overtaken.every_steps",
        ),
        ("loss.hard.take=said", "loss.hard.take: expected generated, found its old name said"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(override: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_override_names("train", [override])


def test_an_old_name_in_a_yaml_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    write = (tmp_path / "experiment" / "mine.yaml").write_text
    write("# @package _global_\nmirrors: [wandb]\n")
    arguments = ["--config-dir", str(tmp_path), "experiment=[combined,mine]", "name=x", "--cfg", "job"]
    done = script("train", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith("; mirrors is called trackers now")


def test_the_options_of_an_older_run_are_still_read(tmp_path: Path) -> None:
    config = of_demo("train", "experiment=combined", "trackers=[tensorboard]", "loss.hard.take=generated")
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    for new, old in (("trackers:", "mirrors:"), ("adaptive_weight:", "overtaken:"), ("take: generated", "take: said")):
        assert text.count(new) == 1
        text = text.replace(new, old)
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml", TrainConfig) == config


def test_a_script_of_another_checkout_is_refused(tmp_path: Path) -> None:
    """It would run this checkout's code and configuration."""
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    command = [sys.executable, str(tmp_path / "scripts" / "report.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: expected to run the code of {tmp_path / 'pipeline'}, found {ROOT}/pipeline")


def test_the_command_names_another_checkout_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "pipeline" / "config").mkdir(parents=True)
    (tmp_path / "pipeline" / "config" / "schema.py").touch()
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; sys.argv[1:] = ['report', '--help', 'zz']; "
    code += "from pipeline.__main__ import main; main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.startswith(
        f"warning: this runs the code of {ROOT}/pipeline, and not that of the current folder; "
    )
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=../up"], "name: expected a name without / * ? [ ] and not starting with '.', found '../up'"),
        (["name=''"], "name: expected a name without / * ? [ ] and not starting with '.', found ''"),
        (["name='*'"], "name: expected a name without / * ? [ ] and not starting with '.', found '*'"),
        (["seed=99999999999999999999"], "seed: expected 0 to 2^63 - 1, found 99999999999999999999"),
        (["student.num_layers=0"], "student_num_layers: expected at least 1, found 0"),
    ],
)
def test_names_seeds_and_layers_are_refused_by_the_driver(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_train(of_demo("train", *overrides))


def test_more_entries_than_a_shard_can_count_are_refused() -> None:
    with pytest.raises(InputError, match=re.escape("k and draws: expected a sum of at most 65535, found 65536")):
        check_capture(of_demo("capture", "kind=hybrid", "k=65000", "draws=536"))


def test_a_wrong_value_is_refused_with_its_cause(tmp_path: Path) -> None:
    done = script("train", "optimizer.name=sgd", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "optimizer.name: expected one of adamw | muon, found 'sgd'" in done.stderr


def test_a_deepspeed_that_sums_wrongly_is_refused() -> None:
    """The bound in setup.cfg is that of the check."""
    oldest = ".".join(map(str, OLDEST_DEEPSPEED))
    assert f"    deepspeed>={oldest},<0.20\n" in (ROOT / "setup.cfg").read_text()
    for found in ("0.19.7", "0.18.12+cu128", "0.9.9"):
        with pytest.raises(InputError, match=f"expected release {oldest} or later, .* found {re.escape(found)}"):
            check_deepspeed(found)
    for found in (oldest, "0.19.10", "0.20.0.dev0", "1.0"):
        check_deepspeed(found)
