"""Tiny real models and data: random weights from a config, a byte-level tokenizer trained on a few lines."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.capture.corpus import TokenizedCorpus
from pipeline.capture.identity import make_manifest
from pipeline.config.schema import CaptureConfig, TextConfig
from pipeline.core.types import Manifest
from pipeline.data.messages import ChatRules
from pipeline.data.text_files import Text, open_text

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


def text_of(path: Path | str, what: str = "corpus", **settings: Any) -> Text:
    return open_text(TextConfig(files=[str(path)], **settings), what)


def manifest_of(config: CaptureConfig, tokenizer: Any, num_records: int, hashes: dict[str, str]) -> Manifest:
    """The manifest of a corpus of JSON lines that is not there."""
    corpus = config.corpus
    text = Text(
        what="corpus",
        files=(Path("x.jsonl"),),
        columns=dataclasses.asdict(corpus.columns),
        targets=corpus.targets.name,
        end_token=corpus.end_token,
        skip_malformed=False,
        chat=ChatRules(template_options={}, date=datetime.date(2024, 7, 26)),
        shape="own",
    )
    found = TokenizedCorpus(num_records=num_records, skipped={}, notes={})
    return make_manifest(config, text, tokenizer, Path("x"), found, hashes)
