"""Prompts that the teacher completes: what is captured is what a plain forward over its own words says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers

from pipeline.audit import commands as audit
from pipeline.audit.verify import findings
from pipeline.capture.driver import run
from pipeline.config.schema import AuditConfig, CompletionConfig, CompletionMode, Kind, ModelConfig, Targets, TextConfig
from pipeline.core.types import UNKNOWN_TARGET, InputError
from pipeline.models.tokenizer import load_tokenizer
from support.commands import config_of, script, train_arguments
from support.tiny import write_lines

PROMPTS = [
    "the weak",
    "a shard exists only if",
    "gold",
    "position s has read",
    "the tail of the distribution",
    "speaks",
]


def completing(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    files = write_lines(folder / "prompts.jsonl", rows)
    options = {"how": CompletionMode.greedy, "max_new_tokens": 9, "batch_records": 4, **changes}
    return {
        "corpus": TextConfig(files=[str(files)], targets=Targets.completion),
        "complete": CompletionConfig(**options),
        "temperatures": [1.0],
        "records_per_shard": 4,
    }


def rows_of(cache: Path) -> list[dict[str, Any]]:
    return pl.read_parquet(cache / "shards" / "*.parquet").rows(named=True)


def spoken_by_record(cache: Path) -> dict[int, tuple[list[int], list[int], list[float], list[int]]]:
    """Of each record: the tokens up to its end, the weak ids, the entropies, the first kept id at each target."""
    found = {}
    for row in rows_of(cache):
        start = n = 0
        k = len(row["topk_ids"]) // len(row["target_positions"])
        for record_id, length in zip(row["record_ids"], row["segment_lengths"], strict=True):
            count = sum(start <= s < start + length for s in row["target_positions"])
            here = slice(n, n + count)
            found[record_id] = (
                row["input_ids"][start : start + length],
                row["weak_ids"][here],
                row["entropy"][here],
                row["topk_ids"][::k][here],
            )
            start, n = start + length, n + count
    return found


def test_greedy_is_transformers_own_generation(teacher: Path, tmp_path: Path) -> None:
    """Batched, padded at the left and cached, against one prompt at a time through plain `generate`."""
    cache = run(config_of(teacher, tmp_path, tmp_path, **completing(tmp_path, [{"prompt": p} for p in PROMPTS])))
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher).eval()
    tokenizer = load_tokenizer(teacher)
    spoken = spoken_by_record(cache)
    assert sorted(spoken) == list(range(len(PROMPTS)))
    assert findings(cache) == []
    for record_id, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        forbidden = list(range(len(tokenizer), model.config.vocab_size))  # padding rows of the head say nothing
        theirs = model.generate(
            ids, max_new_tokens=9, do_sample=False, pad_token_id=1, suppress_tokens=forbidden, use_cache=True
        )[0].tolist()
        tokens, weak_ids, entropies, first_ids = spoken[record_id]
        assert tokens == theirs
        assert weak_ids == first_ids == theirs[ids.shape[1] :]
        with torch.no_grad():
            logits_SV = model(input_ids=torch.tensor([tokens])).logits[0, ids.shape[1] - 1 : -1, : len(tokenizer)]
        expected = torch.distributions.Categorical(logits=logits_SV).entropy()
        assert torch.allclose(torch.tensor(entropies), expected, atol=5e-3)


def test_sampling_follows_its_seed_and_a_redone_shard_is_byte_identical(teacher: Path, tmp_path: Path) -> None:
    rows = [{"prompt": p} for p in PROMPTS]
    caches = {}
    for seed in (0, 1):
        settings = completing(tmp_path, rows, how=CompletionMode.sample, temperature=2.0, seed=seed)
        caches[seed] = run(config_of(teacher, tmp_path, tmp_path, **settings))
        shard = caches[seed] / "shards" / "00001.parquet"
        before = shard.read_bytes()
        for path in shard.parent.glob("00001.*"):
            path.unlink()
        assert run(config_of(teacher, tmp_path, tmp_path, **settings)) == caches[seed]
        assert shard.read_bytes() == before
    said = [[words for _, words, _, _ in spoken_by_record(cache).values()] for cache in caches.values()]
    assert said[0] != said[1]


def test_an_end_token_ends_and_is_captured(teacher: Path, tmp_path: Path) -> None:
    """Sampled hot enough, some completion says the end token early; nothing is kept after it."""
    rows = [{"prompt": f"{p} {i}"} for p in PROMPTS for i in range(30)]
    settings = completing(
        tmp_path, rows, how=CompletionMode.sample, temperature=50.0, max_new_tokens=30, batch_records=90
    )
    cache = run(config_of(teacher, tmp_path, tmp_path, **{**settings, "records_per_shard": 200}))
    words = [words for _, words, _, _ in spoken_by_record(cache).values()]
    ended = [w for w in words if 1 in w]
    assert ended
    assert all(w.index(1) == len(w) - 1 for w in ended)
    assert all(len(w) == 30 or 1 in w for w in words)


def test_records_with_a_completion_stay_as_they_are(teacher: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "the weak"}, {"prompt": "a shard", "completion": " exists only if it is whole"}]
    cache = run(config_of(teacher, tmp_path, tmp_path, **completing(tmp_path, rows)))
    spoken = spoken_by_record(cache)
    known = {row["record_ids"][0]: row["target_ids"] for row in rows_of(cache)}
    assert set(spoken[1][1]) == {UNKNOWN_TARGET}
    assert UNKNOWN_TARGET not in known[1]
    assert UNKNOWN_TARGET not in spoken[0][1]
    assert set(known[0]) == {UNKNOWN_TARGET}


@pytest.mark.parametrize("kind", [Kind.sampled, Kind.hybrid])
def test_other_kinds_complete_too(kind: Kind, teacher: Path, tmp_path: Path) -> None:
    settings = completing(tmp_path, [{"prompt": p} for p in PROMPTS])
    said = [
        [
            words
            for row in rows_of(run(config_of(teacher, tmp_path, tmp_path, **settings, **more)))
            for words in row["weak_ids"]
        ]
        for more in ({}, {"kind": kind, "k": 3, "draws": 5})
    ]
    assert said[0] == said[1]


def test_the_window_bounds_a_completion(teacher: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "x " * 20}, {"prompt": "the"}]
    cache = run(config_of(teacher, tmp_path, tmp_path, **completing(tmp_path, rows, max_new_tokens=100)))
    assert all(len(row["input_ids"]) <= 48 for row in rows_of(cache))
    with pytest.raises(InputError, match=r"line 1: expected a prompt of 1 to 47 tokens \(the window less one\), found"):
        run(config_of(teacher, tmp_path, tmp_path, **completing(tmp_path, [{"prompt": "x " * 40}])))
    settings = completing(tmp_path, rows)
    settings["corpus"].targets = Targets.all
    with pytest.raises(InputError, match=r"complete.how=greedy: expected corpus.targets=completion"):
        run(config_of(teacher, tmp_path, tmp_path, **settings))


def test_a_whole_forward_says_what_was_captured_word_by_word(teacher: Path, tmp_path: Path) -> None:
    """Captured from a batch with a KV cache, replayed over packed sequences."""
    cache = run(config_of(teacher, tmp_path, tmp_path, **completing(tmp_path, [{"prompt": p} for p in PROMPTS])))
    teacher_options = ModelConfig(path=str(teacher))
    assert audit.run("replay", AuditConfig(cache=str(cache), teacher=teacher_options, rows=3)) == 0


def test_a_student_learns_from_what_was_said(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    cache = run(config_of(teacher, tmp_path, tmp_path, **completing(tmp_path, [{"prompt": p} for p in PROMPTS])))
    script("train", *train_arguments(student, data, str(cache), steps=2), cwd=tmp_path)
    assert list(tmp_path.glob("runs/*/result.json"))
