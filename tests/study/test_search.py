"""A search: its space, what it proposes after it was killed, and real runs killed in the middle."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from pipeline.config.commands import SearchConfig
from pipeline.config.compose import open_study
from pipeline.core.types import InputError
from pipeline.study.forecast import Composer
from pipeline.study.search import begun_trials, check_search, folder_of, open_search, summary, trials
from pipeline.study.space import Axis, overrides_of, read_space
from support.commands import ROOT, composed, script, wait_for
from support.tiny import prompts, write_lines
from support.tiny_study import write_tiny_study

SPACE = {
    "loss.kd.weight": Axis(low=0.01, high=10.0, log=True),
    "micro_batch": Axis(low=1, high=4),
    "loss.lm.weight": Axis(values=(0.0, 1.0)),
}


def config_of(folder: Path, **changes: Any) -> SearchConfig:
    return SearchConfig(study=str(folder / "study" / "tiny.yaml"), **{"trials": 9, **changes})


@pytest.fixture
def study_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study's file; of its models and texts only dev is read."""
    write_tiny_study(tmp_path, teacher=tmp_path, student=tmp_path, data=tmp_path)
    write_lines(tmp_path / "dev.jsonl", prompts(4, labeled=True))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def score(values: Any) -> float:
    return values["loss.lm.weight"] - abs(values["loss.kd.weight"] - 1.0) + 0.1 * values["micro_batch"]


def settings_tried(search: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in search.get_trials(states=[optuna.trial.TrialState.COMPLETE])]


def test_the_space_of_a_search_is_read_from_nested_options() -> None:
    search = composed("search", "study=demo").search
    space = read_space(search, [1.0, 2.0])
    assert list(space) == [
        *("loss.kd.weight", "loss.kd.temperature", "gold_fraction", "optimizer.learning_rate"),
    ]
    assert space["loss.kd.temperature"] == Axis(values=(1.0, 2.0))  # all that the cache keeps
    assert space["gold_fraction"].log
    assert space["gold_fraction"].ends == (0.03, 0.5)
    assert overrides_of({"a": 0.123456, "b": 3, "c": "x", "d": True}) == ["a=0.123", "b=3", "c='x'", "d=true"]


@pytest.mark.parametrize(
    "entry", [[], {"low": 1.0}, {"low": 2.0, "high": 1.0}, {"low": 0, "high": 1, "log": True}, "3", None, {"low": "a"}]
)
def test_what_is_no_range_is_refused_by_name(entry: Any) -> None:
    with pytest.raises(InputError, match=r"^search\.loss\.kd\.weight: expected a list of values, or "):
        read_space({"loss": {"kd": {"weight": entry}}}, [1.0])


def test_no_options_to_choose_are_refused() -> None:
    with pytest.raises(InputError, match="search: expected options to choose, found none"):
        read_space({}, [1.0])


@pytest.mark.parametrize("killed_at", [[1], [3, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_killed_it_proposes_what_it_would_have_proposed(study_folder: Path, killed_at: list[int]) -> None:
    """A setting that was begun is tried again, and all later ones are those of a search that was never killed."""
    found = []
    for seed, kills in ((0, []), (0, killed_at)):
        config = config_of(study_folder, seed=seed)
        study = open_study(config.study, None)
        (folder_of(study) / "trials.journal").unlink(missing_ok=True)
        search = open_search(config, study, SPACE)
        for stop in [*kills, None]:
            for number, values in trials(search, SPACE, config):
                if number == stop:
                    break  # as if the process had been killed while this setting was tried
                search.tell(number, score(values))
            search = open_search(config, study, SPACE)
        found.append(settings_tried(search))
    assert len(found[0]) == 9
    assert found[0] == found[1]


def test_two_processes_share_a_search(study_folder: Path) -> None:
    config = config_of(study_folder)
    study = open_study(config.study, None)
    mine, theirs = (open_search(config, study, SPACE) for _ in range(2))
    shared = itertools.zip_longest(trials(mine, SPACE, config), trials(theirs, SPACE, config))
    tried: dict[int, Any] = {}
    for pair in shared:
        for search, one in zip((mine, theirs), pair, strict=True):
            if one is not None and one[0] not in tried:  # else its run is locked: passed over
                tried[one[0]] = one[1]
                search.tell(one[0], score(one[1]))
    assert sorted(tried) == list(range(9))
    assert len({str(values) for values in tried.values()}) == 9


def test_a_failure_and_a_setting_at_work_elsewhere_are_not_proposed_again(study_folder: Path) -> None:
    config = config_of(study_folder)
    study = open_study(config.study, None)
    search = open_search(config, study, SPACE)
    found: list[int] = []
    for number, values in trials(search, SPACE, config):
        if number in found:
            break  # once more at the end
        found.append(number)
        settings = [trial.params for trial in search.get_trials()]
        assert settings.count(values) == 1
        if number % 3 == 0:
            search.tell(number, state=optuna.trial.TrialState.FAIL)
        elif number % 3 == 1:
            search.tell(number, score(values))  # the others stay at work
    assert found == list(range(9))


def test_a_setting_whose_process_was_killed_before_it_had_all_values(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(study_folder, trials=1)
    study = open_study(config.study, None)
    search = open_search(config, study, SPACE)
    search.ask().suggest_float("loss.kd.weight", 0.01, 10.0, log=True)
    assert list(begun_trials(search, SPACE)) == []
    assert search.trials[0].state is optuna.trial.TrialState.RUNNING  # its process may be choosing just now
    monkeypatch.setattr("pipeline.study.search.CHOICE_SECONDS", -1.0)
    assert list(begun_trials(search, SPACE)) == []
    assert search.trials[0].state is optuna.trial.TrialState.FAIL


def test_another_space_seed_file_or_dev_is_another_search(study_folder: Path) -> None:
    config = config_of(study_folder)
    study = open_study(config.study, None)
    names = {
        open_search(one, study, space).study_name
        for one, space in (
            (config, SPACE),
            (config_of(study_folder, seed=1), SPACE),
            (config_of(study_folder, seeds=[1, 2]), SPACE),
            (config_of(study_folder, trials=20), SPACE),  # more trials go on with the same
            (config, {name: axis for name, axis in SPACE.items() if name != "micro_batch"}),
        )
    }
    assert len(names) == 4
    write_lines(study_folder / "dev.jsonl", prompts(5, labeled=True))
    names.add(open_search(config, study, SPACE).study_name)
    file = study_folder / "study" / "tiny.yaml"
    file.write_text(file.read_text().replace("steps: 20", "steps: 21"))
    names.add(open_search(config, open_study(config.study, None), SPACE).study_name)
    assert len(names) == 6


def test_the_summary_shows_the_best_and_what_mattered(study_folder: Path) -> None:
    config = config_of(study_folder, trials=30)
    study = open_study(config.study, None)
    search = open_search(config, study, SPACE)
    for number, values in trials(search, SPACE, config):
        search.tell(number, 10.0 * values["loss.lm.weight"] + 0.01 * values["micro_batch"])
    text = summary(search, study, config)
    best = text.split("  combined: ")[1].splitlines()[0]
    assert yaml.safe_load(best)["loss.lm.weight"] == 1.0
    assert text.splitlines()[3].startswith("10.0")
    share = text.split("explained by: ")[1].split(", ")[0]
    assert share.startswith("loss.lm.weight ")
    assert int(share.split()[1].rstrip("%")) > 90


@pytest.mark.parametrize(("module", "package"), [("optuna", "optuna"), ("sklearn", "scikit-learn")])
def test_a_package_that_is_missing_is_named_before_any_run(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    """The importances need scikit-learn only at the end, when all settings are trained."""
    config = config_of(study_folder)
    study = open_study(config.study, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else name)
    with pytest.raises(InputError, match=f"^search: expected the package {package}, found none"):
        check_search(config, study, Composer(study), SPACE)


@pytest.mark.parametrize("experiment", ["pooled", "cross_fit", "cross_fit_gold"])
def test_what_learns_for_or_from_a_pool_is_not_searched(study_folder: Path, experiment: str) -> None:
    config = config_of(study_folder, experiment=experiment)
    study = open_study(config.study, None)
    with pytest.raises(InputError, match=f"^experiment: expected one that reads .*, found {experiment}"):
        check_search(config, study, Composer(study), SPACE)


def test_without_dev_nothing_is_searched(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    path = write_tiny_study(tmp_path, teacher=teacher, student=student, data=data)
    content = yaml.safe_load(path.read_text())
    del content["dev"]
    path.write_text(yaml.safe_dump(content))
    done = script("search", "study=tiny", "--config-dir", str(tmp_path), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "expected dev, a held-out text by whose score a search decides, found none" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow(minutes=3)
def test_eight_real_settings_with_two_kills(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    write_tiny_study(tmp_path, teacher=teacher, student=student, data=data, steps=6)
    arguments = ["study=tiny", "--config-dir", str(tmp_path), "trials=8"]
    results = tmp_path / "runs" / "search"
    for num_done in (2, 5):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "search.py"), *arguments],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(lambda least=num_done: len(list(results.glob("*/result.json"))) >= least, process, seconds=600)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = script("search", *arguments, cwd=tmp_path)
    assert "8 of 8 settings have a score on dev" in done.stdout
    assert "  combined: {loss.kd.weight: " in done.stdout
    found = [json.loads(path.read_text()) for path in results.glob("*/result.json")]
    assert len(found) == len(list(results.glob("*/config.yaml"))) == 8  # what was killed was continued
    assert all("dev" in result and "test" not in result for result in found)
    assert not list(results.rglob("*.safetensors"))
    again = script("search", *arguments, cwd=tmp_path)
    assert "==> trial" not in again.stdout
    assert again.stdout.split("settings have")[1] == done.stdout.split("settings have")[1]
