"""The pool of a study: its jobs, what is refused before any run, and a whole study of tiny models by one command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from hydra import initialize_config_dir

from pipeline.cache.shards import ShardReader
from pipeline.config.commands import StudyConfig, StudyPoolConfig
from pipeline.config.compose import open_study
from pipeline.config.groups import CONF_DIR
from pipeline.config.schema import PoolKind, PoolStudents
from pipeline.core.types import InputError
from pipeline.data.text_files import open_text
from pipeline.data.tokenize import load_labeled_sequences
from pipeline.models.tokenizer import open_tokenizer
from pipeline.study.forecast import Composer
from pipeline.study.members import check_pool, gold_captures, own_options, pool_words
from pipeline.study.plan import fold_jobs, student_jobs
from support.commands import composed, script
from support.tiny_study import write_tiny_study

DEMO = open_study("demo", None)


def config_of(**options: Any) -> StudyConfig:
    return StudyConfig(study="demo", **{"experiments": ["combined", "pooled"], **options})


# --------------------------------------------------------------------------------------------- plan


def test_each_fold_has_one_student_with_the_options_of_all_students() -> None:
    config = config_of(folds=3, seeds=[5, 6], overrides=["loss.kd.weight=2"])
    jobs = fold_jobs(config, DEMO)
    assert [job.label for job in jobs] == [f"cross_fit kd_weight=2 leave_out={fold}/3 seed 1" for fold in range(3)]
    assert [job.label for job in student_jobs(config, DEMO)][2:] == [
        "pooled kd_weight=2 seed 5",
        "pooled kd_weight=2 seed 6",
    ]
    of_gold = config_of(folds=2, pool=StudyPoolConfig(students=PoolStudents.gold_only))
    assert [job.label for job in fold_jobs(of_gold, DEMO)] == [
        "cross_fit_gold leave_out=0/2 seed 1",
        "cross_fit_gold leave_out=1/2 seed 1",
    ]
    assert fold_jobs(config_of(experiments=["combined"]), DEMO) == []
    assert fold_jobs(config_of(experiments=None), DEMO) == []


def test_a_grid_is_of_pooled_where_combined_is_not_asked_for() -> None:
    jobs = student_jobs(config_of(experiments=["pooled"], grid=["kd_weight:1,3"]), DEMO)
    assert [job.label for job in jobs][1:] == ["pooled kd_weight=1 seed 1", "pooled kd_weight=3 seed 1"]
    both = student_jobs(config_of(grid=["kd_weight:3"]), DEMO)
    assert [job.label for job in both] == ["combined seed 1", "pooled seed 1", "combined kd_weight=3 seed 1"]


def test_members_and_pooled_take_the_settings_of_combined_but_for_their_own(tmp_path: Path) -> None:
    content = yaml.safe_load(DEMO.path.read_text())
    content["experiments"] |= {"cross_fit": {"steps": 7}, "pooled": {"loss.kd.weight": 3}}
    content["train"] |= {"evaluate_every_steps": 10, "epochs": 4}
    content |= {"more_tests": {"news": content["test"]}, "out_of_domain": ["news"]}
    path = tmp_path / "own.yaml"

    def options(experiment: str, *overrides: str) -> Any:
        path.write_text(yaml.safe_dump(content))
        return composed("train", f"study={path}", f"experiment={experiment}", *overrides)

    member, pooled = options("cross_fit", "~more_tests.news"), options("pooled")
    for one in (member, pooled):
        assert (one.gold_fraction, one.loss.lm.weight, one.gold.files) == (0.0625, 0.3, ["data/demo/gold.jsonl"])
    assert (member.role.name, member.steps, member.epochs, member.loss.kd.weight) == ("member", 7, None, 1.0)
    assert (pooled.role.name, pooled.steps, pooled.epochs, pooled.loss.kd.weight) == ("combined", None, 2, 3.0)
    assert (member.dev, member.test, member.more_tests, member.out_of_domain) == (None, None, {}, [])
    assert (member.evaluate_every_steps, pooled.evaluate_every_steps) == (0, 10)
    assert (member.cache, pooled.cache) == ("caches/demo/own-*", "caches/demo/pooled-own-*")
    of_gold, gold_only = options("cross_fit_gold", "~more_tests.news"), options("gold_only")
    assert (of_gold.role.name, of_gold.gold_fraction, of_gold.loss.kd.weight) == ("member", 1.0, 0.0)
    assert of_gold.cache is None
    assert (of_gold.steps, of_gold.epochs) == (gold_only.steps, gold_only.epochs) == (24, None)
    assert (of_gold.gold, of_gold.dev, of_gold.test, of_gold.evaluate_every_steps) == (gold_only.gold, None, None, 0)
    content["experiments"]["combined"]["export"] = {"what": "best"}  # then dev decides which weights are captured
    deciding = options("cross_fit")
    assert (deciding.dev.files, deciding.test, deciding.evaluate_every_steps) == (["data/demo/dev.jsonl"], None, 10)


def test_the_words_that_ask_for_a_pool_again() -> None:
    pool = StudyPoolConfig(kind=PoolKind.logarithmic, weights=[0.25, 0.75], temperature=0.5)
    assert own_options(pool) == {"weights": "[0.25,0.75]", "temperature": "0.5"}
    assert own_options(StudyPoolConfig(students=PoolStudents.gold_only, kind=PoolKind.linear)) == {
        "students": "gold_only",
        "kind": "linear",
    }
    words = pool_words(config_of(folds=3, pool=pool), DEMO)
    asked = "zero_shot,gold_only,weak_only,combined,ceiling,pooled"
    assert words == [f"experiments=[{asked}]", "folds=3", "pool.weights=[0.25,0.75]", "pool.temperature=0.5"]
    assert pool_words(config_of(experiments=None), DEMO) == []


@pytest.fixture(scope="module")
def composer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composer]:
    """Of the tiny study, whose models and texts nothing reads here."""
    folder = tmp_path_factory.mktemp("study")
    path = write_tiny_study(folder, teacher=folder, student=folder, data=folder)
    content = yaml.safe_load(path.read_text())
    content["capture"]["temperatures"] = [1.0, 2.0]
    path.write_text(yaml.safe_dump(content))
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield Composer(open_study(str(path), None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experiments": ["combined"], "folds": 3}, "folds, pool, rounds, stop_after_pool: expected pooled"),
        (
            {"experiments": None, "pool": StudyPoolConfig(temperature=0.5)},
            "folds, pool, rounds, stop_after_pool: expected pooled",
        ),
        ({"experiments": None, "rounds": 2}, "folds, pool, rounds, stop_after_pool: expected pooled"),
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"rounds": 2, "stop_after_pool": True}, "rounds=2: expected stop_after_pool=false, found not so"),
        (
            {"rounds": 2, "pool": StudyPoolConfig(students=PoolStudents.gold_only)},
            "rounds=2: expected pool.students=combined, because what learns gold alone learns from no pool",
        ),
        ({"rounds": 2, "hydra_launcher": "x"}, "rounds=2: expected hydra_launcher=null, which tells no scores"),
        ({"experiments": None, "stop_after_pool": True}, "folds, pool, rounds, stop_after_pool: expected pooled"),
        ({"experiments": ["cross_fit_gold"]}, "experiments: expected students to compare, found cross_fit_gold, a"),
        ({"experiments": ["cross_fit"]}, "experiments: expected students to compare, found cross_fit, a member of a"),
        ({"folds": 1}, "folds: expected 2 or more, because each student leaves one out, found 1"),
        ({"pool": StudyPoolConfig(weights=[0.5, 0.4, 0.1])}, "pool.weights: expected 2 weights of 0 or more whose sum"),
        ({"pool": StudyPoolConfig(kind=PoolKind.linear, temperature=0.5)}, "pool.temperature: expected 1 in a linear"),
        ({"pool": StudyPoolConfig(temperature=3.0)}, "pool.temperature: expected at most 1, or one that is captured"),
        (
            {"pool": StudyPoolConfig(kind=PoolKind.linear), "overrides": ["loss.kd.temperature=2"]},
            "loss.kd.temperature: expected one that the pool has, found 2.0, where it has [1.0]",
        ),
        ({"overrides": ["loss.kd.divergence=reverse_kl"]}, "pooled: expected options that read neither an exact tail"),
        ({"overrides": ["loss.kd.gate.max_entropy=1"]}, "pooled: expected options that read neither an exact tail nor"),
        ({"overrides": ["curriculum_parts=2"]}, "pooled: expected options that read neither an exact tail nor an"),
        (
            {"overrides": ["loss.kd.position_weight.by=entropy"]},
            "pooled: expected options that read neither an exact tail nor an entropy",
        ),
        (
            {"pool": StudyPoolConfig(fit=True), "overrides": ["loss.kd.temperature=2"]},
            "loss.kd.temperature: expected one that the pool has, found 2.0, where it has [1.0]",
        ),
    ],
)
def test_a_pool_that_cannot_be_made_or_read_is_refused(
    composer: Composer, options: dict[str, Any], message: str
) -> None:
    config = config_of(**options)
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        check_pool(config, composer, student_jobs(config, composer.study))


def test_gold_is_captured_in_the_folds_that_training_leaves_out(
    composer: Composer, teacher: Path, data: Path, tmp_path: Path
) -> None:
    """By the same sequences: with other targets each would have another key, asked of a student that knows it."""
    path = write_tiny_study(tmp_path, teacher=teacher, student=teacher, data=data)
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"caches_dir": str(tmp_path / "caches")}))
    study = open_study(str(path), None)
    base = Composer(study).capture(f"teacher.path={teacher}")
    of_teacher, _ = gold_captures(study, base, [], name="x")
    reader = ShardReader(Path(of_teacher))
    asked = [reader.row(block, row)[0].key for block, size in enumerate(reader.blocks) for row in range(size)]
    tokenizer = open_tokenizer(study.file.student)[1]
    learnt = load_labeled_sequences(open_text(study.file.gold, "gold"), tokenizer, window=study.file.window)
    assert sorted(asked) == sorted(sequence.key for sequence in learnt)


def test_weights_from_too_little_gold_are_refused_before_any_run(
    composer: Composer, data: Path, tmp_path: Path
) -> None:
    """And weights beside them; of enough gold the study goes on. `composer` has Hydra's place."""
    path = write_tiny_study(tmp_path, teacher=tmp_path, student=tmp_path, data=data)
    fit, both = StudyPoolConfig(fit=True), StudyPoolConfig(fit=True, weights=[0.5, 0.5])
    jobs = student_jobs(config_of(), composer.study)
    with pytest.raises(InputError, match=r"^pool\.fit_on: expected weights=null, because they are fitted"):
        check_pool(config_of(pool=both), composer, jobs)
    small = Composer(open_study(str(path), None))
    with pytest.raises(InputError, match=r"^pool\.fit: expected 30 or more records of gold, found \d+; give"):
        check_pool(config_of(pool=fit), small, jobs)
    (tmp_path / "gold.jsonl").write_text((data / "gold.jsonl").read_text() * 5)
    content = yaml.safe_load(path.read_text())
    content["gold"]["files"] = [str(tmp_path / "gold.jsonl")]
    path.write_text(yaml.safe_dump(content))
    check_pool(config_of(pool=fit), Composer(open_study(str(path), None)), jobs)


def test_a_pool_that_can_be_made_is_not_refused(composer: Composer) -> None:
    config = config_of(pool=StudyPoolConfig(temperature=0.5), overrides=["loss.kd.temperature=2"])
    check_pool(config, composer, student_jobs(config, composer.study))


def tables_of(folder: Path) -> dict[Path, int]:
    """When each shard and each table of predictions was written."""
    found = [*folder.glob("caches/*/shards/*"), *folder.glob("runs/*/*.parquet"), *folder.glob("runs/*/model/*")]
    return {path: path.stat().st_mtime_ns for path in found if path.parent.name != "report"}


@pytest.mark.slow(minutes=3)
def test_a_pool_by_one_command_that_makes_nothing_twice(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    """Two folds: up to the pool, then its students, then another pool of the same members."""
    path = write_tiny_study(tmp_path, teacher=teacher, student=student, data=data, steps=3)
    path.write_text(path.read_text().replace("k: 8", "k: 150"))  # so that two models keep some token in common
    asked = ["study=tiny", "--config-dir", str(tmp_path), "experiments=combined,pooled", "folds=2", "probe_seconds=0"]
    plan = script("study", *asked, "stop_after_pool=true", cwd=tmp_path).stdout
    assert re.findall(r"^(cross_fit|capture by cross_fit|pool|pooled) +(\d)", plan, re.MULTILINE) == [
        *(("cross_fit", "2"), ("capture by cross_fit", "2"), ("pool", "1"), ("pooled", "1")),
    ]
    runs = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/result.json")}
    assert sorted(name.rpartition("-")[0] for name in runs) == ["cross_fit", "cross_fit", "teacher"]
    assert all(result.get("test") is None for name, result in runs.items() if name.startswith("cross_fit"))
    (pool,) = tmp_path.glob("caches/pooled-tiny-*/manifest.json")
    (cache,) = tmp_path.glob("caches/tiny-*/manifest.json")
    folds = [json.loads(path.read_text()) for path in tmp_path.glob("caches/cross_fit-tiny-*/manifest.json")]
    folds.sort(key=lambda manifest: manifest["made_of"]["only_fold"])
    assert [manifest["made_of"]["only_fold"] for manifest in folds] == ["0/2", "1/2"]
    of_teacher, of_folds = json.loads(pool.read_text())["made_of"]["members"]
    assert of_teacher == json.loads(cache.read_text())["fingerprint"]
    assert of_folds == [manifest["fingerprint"] for manifest in folds]

    before = tables_of(tmp_path)
    students = script("study", *asked, cwd=tmp_path).stdout
    assert before == {path: written for path, written in tables_of(tmp_path).items() if path in before}
    assert len(re.findall("finished before", students)) == 2  # the students of the folds
    assert "pooled - combined" in students
    before = tables_of(tmp_path)
    script("study", *asked, "pool.temperature=0.5", cwd=tmp_path)
    after = tables_of(tmp_path)
    assert before == {path: written for path, written in after.items() if path in before}
    made = {
        path.parent.parent.name.rpartition("-")[0] for path in after.keys() - before.keys() if "model" in path.parts
    }
    assert made == {"pooled"}
    labels = {row["arm"]: row["role"] for row in pl.read_parquet(tmp_path / "runs/report/runs.parquet").to_dicts()}
    pools = dict.fromkeys(("pooled temperature 0.5", "pooled temperature 1"), "combined")
    assert labels == {"teacher": "teacher", "combined": "combined", **pools}


@pytest.mark.slow(minutes=2)
def test_members_that_learn_gold_alone_read_no_cache(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    path = write_tiny_study(tmp_path, teacher=teacher, student=student, data=data, steps=3)
    path.write_text(path.read_text().replace("k: 8", "k: 150"))
    asked = ["study=tiny", "--config-dir", str(tmp_path), "experiments=gold_only,pooled", "folds=2", "probe_seconds=0"]
    made = script("study", *asked, "pool.students=gold_only", cwd=tmp_path).stdout
    assert "pooled - gold_only" in made
    members = sorted(tmp_path.glob("runs/cross_fit_gold-*"))
    identities = [json.loads((folder / "identity.json").read_text()) for folder in members]
    assert len(members) == 2
    assert all("cache" not in identity for identity in identities)
    (pool,) = tmp_path.glob("caches/pooled-tiny-*/manifest.json")
    folds = [json.loads(one.read_text()) for one in tmp_path.glob("caches/cross_fit-tiny-*/manifest.json")]
    assert json.loads(pool.read_text())["made_of"]["members"][1] == [
        one["fingerprint"] for one in sorted(folds, key=lambda one: one["made_of"]["only_fold"])
    ]
    again = script("study", *asked, "pool.students=gold_only", cwd=tmp_path).stdout
    assert len(re.findall("finished before", again)) == 4
