"""Tiny real models: random weights from a config, a byte-level tokenizer trained on a few lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers looks at it

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.config.schema import TextConfig
from pipeline.data.records import Text, open_text

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(2)

LINES = [
    "the weak model supervises the strong one",
    "a shard exists only if it is whole",
    "position s has read tokens zero to s and speaks about the next",
    "gold and corpus are two streams of one objective",
    "the tail of the distribution is kept exactly",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("RUN_SLOW") == "1":
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; RUN_SLOW=1 runs it, as .ci/run does"))


def make_tokenizer(*, vocabulary_size: int = 300, lines: list[str] = LINES) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int, padding: int = 20, **settings: Any
) -> Path:
    """A Llama whose head has more rows than the tokenizer has tokens, as real ones do."""
    torch.manual_seed(seed)
    chosen = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        **settings,
    }
    config = LlamaConfig(vocab_size=len(tokenizer) + padding, bos_token_id=0, eos_token_id=1, **chosen)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "student", tokenizer, seed=1)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "teacher", tokenizer, seed=2, num_hidden_layers=2, padding=3)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


TOPICS = [" one", " two", " three of"]


def prompts(count: int, *, labeled: bool, first: int = 0) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(first, first + count):
        words = LINES[i % len(LINES)].split()
        row: dict[str, Any] = {"prompt": f"{' '.join(words[: 1 + i % len(words)])} {i}:"}
        if labeled:
            row |= {"completion": TOPICS[i % 3], "choices": TOPICS, "answer": i % 3}
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of corpus, gold, dev and test."""
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "corpus.jsonl", prompts(60, labeled=False))
    write_lines(folder / "gold.jsonl", prompts(12, labeled=True, first=60))
    write_lines(folder / "dev.jsonl", prompts(10, labeled=True, first=72))
    write_lines(folder / "test.jsonl", prompts(20, labeled=True, first=82))
    return folder


def text_of(path: Path | str, what: str = "corpus", **settings: Any) -> Text:
    return open_text(TextConfig(files=[str(path)], **settings), what)


def script(name: str, *arguments: str, cwd: Path, check: bool = True, **settings: Any) -> subprocess.CompletedProcess:
    """Run scripts/NAME.py as a user does, from some folder of theirs."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        **settings,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def train_arguments(student: Path, data: Path, cache: str, **changes: Any) -> list[str]:
    """A short fp32 run on the tiny models; `changes` are options, dots written as double underscores."""
    chosen: dict[str, Any] = {
        "experiment": "combined",
        "student.path": student,
        "student.dtype": "float32",
        "student.attention": "sdpa",
        "cache": cache,
        "runs_dir": "runs",
        "window": 48,
        "gold.files": f"[{data}/gold.jsonl]",
        "dev.files": f"[{data}/dev.jsonl]",
        "test.files": f"[{data}/test.jsonl]",
        "scoring.teacher_predictions": "null",
        "global_batch": 4,
        "micro_batch": 2,
        "gold_fraction": 0.25,
        "epochs": "null",
        "steps": 6,
        "optimizer.learning_rate": 0.001,
        "checkpoint.every_steps": 0,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [f"{name}={value}" for name, value in chosen.items()]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Path:
    """A capture of the tiny corpus, made by the script."""
    folder = tmp_path_factory.mktemp("caches")
    script("capture", *capture_arguments(teacher, data), cwd=folder)
    (found,) = folder.glob("caches/tiny-*")
    return found


def capture_arguments(teacher: Path, data: Path, **changes: Any) -> list[str]:
    chosen: dict[str, Any] = {
        "name": "tiny",
        "caches_dir": "caches",
        "teacher.path": teacher,
        "teacher.dtype": "float32",
        "teacher.attention": "sdpa",
        "corpus.files": f"[{data}/corpus.jsonl]",
        "window": 48,
        "k": 8,
        "temperatures": "[1.0,2.0]",
        "records_per_shard": 25,
        "batch_sequences": 4,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [f"{name}={value}" for name, value in chosen.items()]
