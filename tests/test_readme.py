"""The documents: short where they are read first, and every command, option, file and link in them is right."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from pipeline.config.commands import ROOTS, RunsConfig
from pipeline.config.compose import study_arguments
from pipeline.config.groups import CONF_DIR
from pipeline.config.options import options
from pipeline.config.overrides import check_override_names
from pipeline.config.study import InitConfig
from support.commands import ROOT, composed, script
from support.tiny import write_lines

README, DESIGN = ROOT / "README.md", ROOT / "DESIGN.md"
GUIDES = [README, DESIGN, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS, CACHE_FORMAT = ROOT / "docs" / "options.md", ROOT / "docs" / "cache-format.md"
WRITTEN_BY_READERS = ("runs/", "caches/", "data/", "model/", "shards/", "checkpoints/", "models/", "FOLDER/")
FILE_ENDINGS = (".py", ".md", ".yaml", ".cfg", ".toml")


def code_blocks(document: Path, language: str) -> list[str]:
    """The content of each ```language block."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def prose(document: Path) -> str:
    """The text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The arguments of each `python scripts/NAME.py ...` in a shell block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python scripts/")]


def names_in(document: Path) -> list[str]:
    """Everything between backticks."""
    return re.findall(r"`([^`\n]+)`", prose(document))


# -------------------------------------------------------------------------------------- length and figure


def test_readme_is_short_and_its_first_command_comes_early() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert "scripts/demo" in [line.split("#")[0].strip() for line in lines[:25]]


def test_design_and_contributing_are_short() -> None:
    assert len(DESIGN.read_text().splitlines()) <= 150
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 70


def test_readme_has_a_figure_whose_subgraphs_are_closed() -> None:
    (figure,) = code_blocks(README, "mermaid")
    lines = [line.strip() for line in figure.splitlines()]
    assert lines[0].startswith("flowchart ")
    assert sum(line.startswith("subgraph ") for line in lines) == lines.count("end") > 0
    for opening, closing in ("[]", "()"):
        assert figure.count(opening) == figure.count(closing)


def test_every_decision_is_dated_newest_first_and_at_most_ten_lines() -> None:
    parts = re.split(r"^## ", (ROOT / "docs" / "decisions.md").read_text(), flags=re.MULTILINE)[1:]
    dates = [part[:10] for part in parts]
    assert all(re.fullmatch(r"\d{4}-\d{2}-\d{2}: .+", part.splitlines()[0]) for part in parts)
    assert dates == sorted(dates, reverse=True)
    assert max(len(part.strip().splitlines()[2:]) for part in parts) <= 10


# -------------------------------------------------------------------------------------- links and files


def anchors(document: Path) -> set[str]:
    """The anchors that a code host gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{document.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{document.name}: {target}"


def files_named(document: Path) -> list[str]:
    """Names between backticks, and scripts in shell blocks, that are files of this repository."""
    found = [word for block in code_blocks(document, "bash") for word in re.findall(r"\bscripts/[\w.]+", block)]
    for name in names_in(document):
        word = name.split()[0]
        is_path = "/" in word and (word.endswith(FILE_ENDINGS) or word.startswith(("scripts/", "tests/", ".ci/")))
        is_name = re.fullmatch(r"[/\w.*-]+", word) is not None
        if is_path and is_name and not word.startswith(WRITTEN_BY_READERS) and "://" not in word:
            found.append(word)
    return found


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document: Path) -> None:
    """Relative to the repository, or to `pipeline/` as in CONTRIBUTING.md."""
    not_there = {
        "conf/quiet.yaml",  # the old name, in the decision that renamed it
        "conf/study/NAME.yaml",  # what the reader is to write
        "cluster/ours.yaml",  # the same
        "search/ours.yaml",
        "conf/study/mine.yaml",  # what the reader's `scripts/study.py init` writes
    }
    for name in files_named(document):
        found = [*ROOT.glob(name), *(ROOT / "pipeline").glob(name)]
        assert found or name in not_there, f"{document.name}: {name}"


def test_the_search_for_files_finds_them() -> None:
    assert "pipeline/cache/schema.py" in files_named(CACHE_FORMAT)
    assert "objective/divergences.py" in files_named(ROOT / "CONTRIBUTING.md")
    assert "scripts/demo" in files_named(README)


@pytest.mark.parametrize("document", [*GUIDES, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_no_path_of_a_machine_is_named(document: Path) -> None:
    assert not re.findall(r"(?<![\w.:/*>])/(?:home|root|work|tmp|mnt|Users)/", document.read_text())


# -------------------------------------------------------------------------------------- commands and options

COMMANDS = [
    pytest.param(arguments, id=f"{document.name}-{number}")
    for document in GUIDES
    for number, arguments in enumerate(one for block in code_blocks(document, "bash") for one in commands(block))
]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_command_composes(arguments: list[str]) -> None:
    """Every option and group of every command exists, and every value of a sweep has the right type."""
    root = Path(arguments[1]).stem
    if root == "audit":
        root = "capture" if arguments[2] == "plan" else "audit"
    overrides = [word for word in arguments[2:] if "=" in word and not word.startswith("-")]
    if arguments[2:3] == ["preview"]:
        root = "preview"
    if arguments[2:3] == ["init"]:
        assert {word.partition("=")[0] for word in overrides} <= {item.name for item in dataclasses.fields(InitConfig)}
        return
    overrides = [word.replace("study=mine", "study=demo") for word in overrides]  # the reader's own
    if issubclass(ROOTS[root], RunsConfig):
        composed(root, *study_arguments(overrides, ROOTS[root]))
        return
    check_override_names(root, overrides)
    overrides = [word for word in overrides if not word.startswith("hydra")]  # launchers are installed by an extra
    fixed, sweeps = [], []
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        if override.is_sweep_override():
            sweeps.append([f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()])
        else:
            fixed.append(text)
    assert not sweeps or "-m" in arguments
    composed(root, *fixed, *(values[0] for values in sweeps))
    for values in sweeps:
        for value in values[1:]:
            composed(root, *fixed, value)


def test_the_study_in_one_file_composes(tmp_path: Path) -> None:
    """The study of docs/options.md, from a folder of one's own, with each ready experiment."""
    (content,) = code_blocks(OPTIONS, "yaml")
    file = tmp_path / "topics.yaml"
    file.write_text(content)
    for experiment in ("teacher", "zero_shot", "gold_only", "weak_only", "combined", "ceiling"):
        config = composed("train", f"study={file}", f"experiment={experiment}")
        model = "models/weak" if experiment == "teacher" else "models/strong"
        assert (config.name, config.student.path, config.runs_dir) == (experiment, model, "runs/topics")
    assert config.gold.files == ["data/topics/corpus-labeled.jsonl"]
    assert config.more_tests["news"].files == ["data/topics/news.jsonl"]


def option_names(document: Path) -> list[str]:
    """The options between backticks: NAME=VALUE anywhere, and what has a dot and no other punctuation."""
    found = []
    for name in names_in(document):
        word = name.split()[0].strip("'").removeprefix("+")
        key = word.split("=")[0]
        if re.fullmatch(r"[a-z][a-z_0-9]*(\.[a-z_0-9]+)*", key) and ("=" in word or "." in key):
            found.append(key)
    return found


@pytest.mark.parametrize("document", [README, OPTIONS, ROOT / "docs" / "costs.md"], ids=lambda path: path.name)
def test_every_option_that_is_named_exists(document: Path) -> None:
    names = {name for root in ROOTS.values() for name, _, _ in options(root)}
    sections = {name[:dot] for name in names for dot, letter in enumerate(name) if letter == "."}
    groups = {folder.name for folder in CONF_DIR.iterdir() if folder.is_dir()}
    for name in option_names(document):
        is_file = name == "log.txt" or name.endswith((".md", ".py", ".jsonl", ".json", ".yaml", ".parquet", ".html"))
        is_free = name.startswith(("deepspeed.overrides.", "hydra.", "search."))
        # a text's options are named by the last parts: targets, end_token
        is_part = any(option.endswith(f".{name}") for option in names)
        assert name in names | sections | groups or is_file or is_free or is_part, f"{document.name}: {name}"


def test_the_search_for_options_finds_them() -> None:
    assert {"loss.kd.gate.keep_fraction", "gold_fraction_of", "checkpoint.keep"} <= set(option_names(OPTIONS))


@pytest.mark.slow(minutes=1)
def test_your_own_data_and_models(student: Path, teacher: Path, tmp_path: Path) -> None:
    """The three commands for one's own data, with our tiny models in the place of STRONG and WEAK."""
    (block,) = (b for b in code_blocks(README, "bash") if "STRONG" in b)
    corpus = [{"prompt": f"the weak model supervises {i}:"} for i in range(60)]
    write_lines(tmp_path / "corpus.jsonl", corpus)
    for split, count in (("gold", 12), ("test", 20)):
        rows = [{"prompt": f"{split} {i}:", "completion": [" one", " two"][i % 2]} for i in range(count)]
        write_lines(tmp_path / f"{split}.jsonl", rows)
    for _, path, *given in commands(block):
        words = [word.replace("WEAK", str(teacher)).replace("STRONG", str(student)) for word in given]
        place = [] if "init" in words else ["--config-dir", "."]
        done = script(Path(path).stem, *words, *place, cwd=tmp_path)
    assert "combined" in done.stdout
    assert (tmp_path / "study" / "mine.yaml").exists()
    assert len(list(tmp_path.glob("runs/mine/*/result.json"))) == 5  # teacher, zero_shot and three that are trained
    assert (tmp_path / "runs" / "mine" / "report" / "report.html").exists()


def test_a_tokens_top_entries_as_text(cache: Path, teacher: Path, tmp_path: Path) -> None:
    """The five lines of docs/cache-format.md: plain polars, no code of ours."""
    (block,) = code_blocks(CACHE_FORMAT, "python")
    assert "pipeline" not in block
    block = block.replace("caches/demo/demo-*", str(cache)).replace("data/demo/smollm2-135m", str(teacher))
    block = block.replace(", 64\n", ", 8\n")
    assert len(block.split("\n")) <= 8  # short enough to be typed
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 2
    assert ", 0.0), (" in done.stdout
