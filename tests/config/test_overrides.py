"""The command line before Hydra reads it: names, values, what follows from an option; errors that name the remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config.commands import ROOTS
from pipeline.config.options import option_types
from pipeline.config.overrides import completed_overrides
from pipeline.config.schema import AdapterConfig, Targets, TextConfig
from pipeline.config.synonyms import SYNONYMS
from pipeline.config.validate import check_files
from pipeline.core.types import InputError
from support.commands import composed, script

MINIMAL = {"train": ["student.path=x"], "capture": ["name=x", "teacher.path=x", "corpus.files=[x]"]}

WRONG: dict[str, tuple[str, list[str], str]] = {
    "enum": ("train", ["loss.kd.divergence=foward_kl"], "loss.kd.divergence: expected one of forward_kl | reverse_kl"),
    "enum, near": ("train", ["loss.kd.divergence=foward_kl"], "found 'foward_kl'; did you mean forward_kl?"),
    "enum of a sweep": (
        "train",
        ["optimizer.name=adamw,sgd"],
        "optimizer.name: expected one of adamw | muon, found 'sgd'",
    ),
    "list": (
        "train",
        ["trackers=wandb"],
        "trackers: expected a list of tensorboard | wandb | mlflow, found wandb; write 'trackers=[wandb]'",
    ),
    "list with commas": ("train", ["trackers=wandb,mlflow"], "found wandb,mlflow; write 'trackers=[wandb,mlflow]'"),
    "inside a list": (
        "train",
        ["trackers=[wand]"],
        "expected one of tensorboard | wandb | mlflow, found 'wand'; did you",
    ),
    "whole number": ("train", ["global_batch=many"], "global_batch: expected a whole number, found 'many'"),
    "number": ("train", ["optimizer.learning_rate=fast"], "optimizer.learning_rate: expected a number, found 'fast'"),
    "truth": ("train", ["gold.end_token=maybe"], "gold.end_token: expected true or false, found 'maybe'"),
    "null": (
        "train",
        ["global_batch=null"],
        "global_batch: expected a whole number, found null",
    ),
    "section": ("train", ["student=MODEL"], "expected an option below student; write student.path= or the like"),
    "group without place": (
        "train",
        ["model=own"],
        "expected the place that takes it, found none; write model@student=",
    ),
    "dashes": ("train", ["--steps=10"], "--steps=10: expected options without dashes; write steps=10"),
    "dashes, other name": ("train", ["--learning-rate", "1e-5"], "write optimizer.learning_rate=VALUE"),
    "another script": ("train", ["corpus.files=[x]"], "it is an option of scripts/capture.py, and not of this script"),
    "last part": ("train", ["kd.weigth=1"], "did you mean loss.kd.weight"),
    "gold in use and not": (
        "train",
        ["gold=null", "gold.files=[x]"],
        "gold.files=[x]: expected gold to be in use, found",
    ),
    "no adapter": (
        "train",
        ["adapter=none", "student.adapter.rank=8"],
        "to be in use, found adapter=none; leave out one",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_names_the_choices_or_the_spelling(name: str) -> None:
    root, arguments, message = WRONG[name]
    with pytest.raises(InputError, match=re.escape(message)):
        completed_overrides(root, arguments)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr=1e-5", "optimizer.learning_rate"),
        ("learning_rate=1e-5", "optimizer.learning_rate"),
        ("batch_size=8", "global_batch"),
        ("temperature=2", "loss.kd.temperature"),
        ("kd_weight=1", "loss.kd.weight"),
        ("lambda=1", "loss.kd.weight"),
        ("alpha=1", "loss.kd.weight"),
        ("num_train_epochs=2", "epochs"),
        ("max_length=128", "window"),
        ("seq_len=128", "window"),
    ],
)
def test_what_other_tools_call_an_option(given: str, meant: str) -> None:
    with pytest.raises(InputError) as refused:
        completed_overrides("train", [given])
    assert f"found {given.partition('=')[0]!r}; did you mean {meant}" in str(refused.value)


def test_every_synonym_leads_to_an_option_and_none_is_one_itself() -> None:
    names = {name for schema in ROOTS.values() for name in option_types(schema)}
    for synonym, meant in SYNONYMS.items():
        assert set(meant) <= names, synonym
    shadowed = {synonym for synonym in SYNONYMS if synonym in option_types(ROOTS["train"])}
    assert not shadowed


def test_accepted_values_are_not_refused() -> None:
    """Everything that Hydra and OmegaConf read for these types."""
    accepted = ["loss.kd.divergence=jsd", "trackers=[wandb,mlflow]", "trackers=[]", "global_batch='8'", "epochs=2"]
    accepted += [
        "gold.end_token=yes",
        "optimizer.learning_rate=1e-5",
        "optimizer.learning_rate=1",
        "cache=null",
        "k=null",
    ]
    accepted += [
        "gold.too_long=null",
        "gold.choices=[' a',' b']",
        "window=${global_batch}",
        "seed=range(1,4)",
        "gold=null",
    ]
    accepted += [
        "loss=fading,weak",
        "+deepspeed.overrides.a.b=1",
        "hydra.searchpath=[file://x]",
        "cache_weights=[1,2.5]",
    ]
    for argument in accepted:
        completed_overrides("train", [argument])


# ---------------------------------------------------------------------------------- what follows


def test_of_steps_and_epochs_the_given_one_wins() -> None:
    base = ["student.path=x", "gold.files=[x]", "cache=x"]
    for given, other in (("steps=10", "epochs"), ("epochs=3", "steps"), ("steps=10,20", "epochs")):
        completed, notes = completed_overrides("train", [given])
        assert completed == [given, f"{other}=null"]
        assert notes == [f"{given} replaces {other}: {other}=null"]
    assert (composed("train", *base, "steps=10").steps, composed("train", *base, "steps=10").epochs) == (10, None)
    for both in (["steps=10", "epochs=null"], ["steps=null"], ["steps=2", "epochs=3"]):  # the last is refused later
        assert completed_overrides("train", both) == (both, [])
    assert completed_overrides("capture", ["window=8"]) == (["window=8"], [])


def test_an_option_of_a_null_section_turns_it_on() -> None:
    without = composed("train", *MINIMAL["train"])
    assert (without.gold, without.dev, without.student.adapter) == (None, None, None)
    given = ["gold.files=[g]", "gold.targets=completion", "dev.files=[d]", "student.adapter.rank=4"]
    config = composed("train", *MINIMAL["train"], *given)
    assert config.gold == TextConfig(files=["g"], targets=Targets.completion)
    assert config.dev == TextConfig(files=["d"])
    assert config.student.adapter == AdapterConfig(rank=4)
    assert composed("audit", "cache=x").teacher is None
    assert composed("audit", "cache=x", "teacher.path=t").teacher.path == "t"


def test_the_older_spelling_means_the_same_and_a_section_that_is_there_keeps_its_options() -> None:
    for text in ("gold", "dev", "test"):
        short = composed("train", *MINIMAL["train"], f"{text}.files=[x]", f"{text}.end_token=false")
        long = composed("train", *MINIMAL["train"], f"text@{text}=own", f"{text}.files=[x]", f"{text}.end_token=false")
        assert short == long
    dora = composed("train", *MINIMAL["train"], "adapter=dora", "student.adapter.alpha=64").student.adapter
    assert dora == AdapterConfig(rank=16, alpha=64, dora=True)
    of_study = composed("train", "study=demo", "gold.malformed=skip").gold
    assert (of_study.files, of_study.end_token) == (["data/demo/gold.jsonl"], False)


# ------------------------------------------------------------------------------------------- files


def missing(config: object) -> str:
    with pytest.raises(InputError) as refused:
        check_files(config)
    return str(refused.value)


def test_a_missing_file_is_named_with_the_nearest_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "topics").mkdir(parents=True)
    (tmp_path / "data" / "topics" / "gold.jsonl").touch()
    expected = (
        "files: expected 'data/topics/golt.jsonl' to exist, found nothing there; did you mean data/topics/gold.jsonl?"
    )
    assert missing(TextConfig(files=["data/topics/golt.jsonl"])) == expected
    assert missing(TextConfig(files=["data/topic/*.jsonl"])).endswith("; did you mean data/topics/*.jsonl?")
    assert missing(TextConfig(files=["corpora/x"])).endswith("; the current folder has no corpora, but data")
    for i in range(9):
        (tmp_path / "data" / f"{i}").mkdir()
    assert missing(TextConfig(files=[str(tmp_path / "data" / "news.jsonl")])).endswith(
        f"; {tmp_path}/data has no news.jsonl, but 0, 1, 2, 3, 4, ..."
    )


def test_a_sweep_reports_one_missing_file_once(tmp_path: Path) -> None:
    arguments = ["-m", "seed=1,2,3,4,5,6", "student.path=my/models/strong", "gold.files=[g.jsonl]", "cache=c"]
    done = script("train", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    error, end = done.stderr.strip().splitlines()
    head = "error: 6 of 6 jobs (1, 2, 3, 4, 5, 6): student.path: expected"
    assert error.startswith(head + " 'my/models/strong' to exist, found nothing there; ")
    assert end == "error: expected 6 jobs that can run, found 6 that cannot; none was started"


def test_a_note_is_printed_where_an_option_replaces_another(tmp_path: Path) -> None:
    done = script("train", "steps=10", "student.path=x", cwd=tmp_path, check=False)
    assert done.stderr.splitlines()[0] == "steps=10 replaces epochs: epochs=null"
