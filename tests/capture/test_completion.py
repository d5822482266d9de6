"""Completions: the captured distributions equal those of one forward over the prompt with its completion."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers

from pipeline.audit import commands
from pipeline.audit.replay import replay
from pipeline.audit.sampling import random_samples
from pipeline.audit.verify import findings
from pipeline.cache.manifest import fingerprint, load_manifest
from pipeline.capture import plan
from pipeline.capture.driver import run
from pipeline.config.commands import AuditConfig
from pipeline.config.schema import (
    CompletionConfig,
    CompletionMode,
    Dtype,
    Kind,
    ModelConfig,
    Targets,
    TextConfig,
)
from pipeline.core.progress import Progress
from pipeline.core.types import UNKNOWN_TARGET, InputError, Manifest
from pipeline.models.loading import open_model
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


def completion_options(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Options of a capture that completes these rows; `changes` are options of `complete`."""
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


def captured_by_record(cache: Path) -> dict[int, tuple[list[int], list[int], list[float], list[int]]]:
    """Of each record: its tokens, the weak ids, the entropies, and the first kept id at each target."""
    by_record = {}
    for row in rows_of(cache):
        start = n = 0
        k = len(row["topk_ids"]) // len(row["target_positions"])
        for record_id, length in zip(row["record_ids"], row["segment_lengths"], strict=True):
            count = sum(start <= s < start + length for s in row["target_positions"])
            here = slice(n, n + count)
            by_record[record_id] = (
                row["input_ids"][start : start + length],
                row["weak_ids"][here],
                row["entropy"][here],
                row["topk_ids"][::k][here],
            )
            start, n = start + length, n + count
    return by_record


@pytest.fixture(scope="module")
def greedy_cache(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of the prompts, completed greedily."""
    folder = tmp_path_factory.mktemp("greedy")
    cache = run(config_of(teacher, folder, folder, **completion_options(folder, [{"prompt": p} for p in PROMPTS])))
    assert isinstance(cache, Path)
    return cache


def test_greedy_is_transformers_own_generation(teacher: Path, greedy_cache: Path) -> None:
    """Batched, padded at the left and with a KV cache, against transformers' `generate` for one prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher).eval()
    tokenizer = load_tokenizer(teacher)
    by_record = captured_by_record(greedy_cache)
    assert sorted(by_record) == list(range(len(PROMPTS)))
    assert findings(greedy_cache) == []
    for record_id, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        forbidden = list(range(len(tokenizer), model.config.vocab_size))  # padding rows of the head
        expected_ids = model.generate(
            ids, max_new_tokens=9, do_sample=False, pad_token_id=1, suppress_tokens=forbidden, use_cache=True
        )[0].tolist()
        tokens, weak_ids, entropies, first_ids = by_record[record_id]
        assert tokens == expected_ids
        assert weak_ids == first_ids == expected_ids[ids.shape[1] :]
        with torch.no_grad():
            logits_SV = model(input_ids=torch.tensor([tokens])).logits[0, ids.shape[1] - 1 : -1, : len(tokenizer)]
        expected = torch.distributions.Categorical(logits=logits_SV).entropy()
        assert torch.allclose(torch.tensor(entropies), expected, atol=5e-3)


def test_sampling_depends_on_the_seed_and_a_shard_captured_again_is_the_same_bytes(
    teacher: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": p} for p in PROMPTS]
    caches = {}
    for seed in (0, 1):
        options = completion_options(tmp_path, rows, how=CompletionMode.sample, temperature=2.0, seed=seed)
        caches[seed] = run(config_of(teacher, tmp_path, tmp_path, **options))
        shard = caches[seed] / "shards" / "00001.parquet"
        before = shard.read_bytes()
        for path in shard.parent.glob("00001.*"):
            path.unlink()
        assert run(config_of(teacher, tmp_path, tmp_path, **options)) == caches[seed]
        assert shard.read_bytes() == before
    weak_ids = {
        seed: [weak_ids for _, weak_ids, _, _ in captured_by_record(cache).values()] for seed, cache in caches.items()
    }
    assert weak_ids[0] != weak_ids[1]


def test_equal_prompts_are_sampled_independently(teacher: Path, tmp_path: Path) -> None:
    """Each record has draws of its own; greedily, equal prompts have equal completions, and the old fingerprint."""
    made = {}
    for how in (CompletionMode.sample, CompletionMode.greedy):
        rows = [{"prompt": "the weak"}] * 8
        options = completion_options(tmp_path, rows, how=how, temperature=2.0, max_new_tokens=6)
        cache = run(config_of(teacher, tmp_path, tmp_path, **options, kind=Kind.sampled, draws=3))
        made[how] = (cache, {tuple(weak_ids) for _, weak_ids, _, _ in captured_by_record(cache).values()})
    assert len(made[CompletionMode.sample][1]) == 8
    assert len(made[CompletionMode.greedy][1]) == 1
    complete = {how: load_manifest(cache).made_of["complete"] for how, (cache, _) in made.items()}
    assert complete[CompletionMode.sample].pop("draws_by_record") is True
    for how in made:
        assert complete[how] == {**dataclasses.asdict(options["complete"]), "how": how.name}


def test_an_end_token_ends_a_completion_and_is_captured(teacher: Path, tmp_path: Path) -> None:
    """At a high temperature, some completions generate the end token (1) early; nothing is kept after it."""
    rows = [{"prompt": f"{p} {i}"} for p in PROMPTS for i in range(30)]
    options = completion_options(
        tmp_path, rows, how=CompletionMode.sample, temperature=50.0, max_new_tokens=30, batch_records=90
    )
    cache = run(config_of(teacher, tmp_path, tmp_path, **{**options, "records_per_shard": 200}))
    completions = [weak_ids for _, weak_ids, _, _ in captured_by_record(cache).values()]
    ended = [ids for ids in completions if 1 in ids]
    assert ended
    assert all(ids.index(1) == len(ids) - 1 for ids in ended)
    assert all(len(ids) == 30 or 1 in ids for ids in completions)


def test_records_with_a_completion_keep_it(teacher: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "the weak"}, {"prompt": "a shard", "completion": " exists only if it is whole"}]
    cache = run(config_of(teacher, tmp_path, tmp_path, **completion_options(tmp_path, rows)))
    weak_ids = {record_id: weak_ids for record_id, (_, weak_ids, _, _) in captured_by_record(cache).items()}
    target_ids = {row["record_ids"][0]: row["target_ids"] for row in rows_of(cache)}
    assert set(weak_ids[1]) == {UNKNOWN_TARGET}
    assert UNKNOWN_TARGET not in target_ids[1]
    assert UNKNOWN_TARGET not in weak_ids[0]
    assert set(target_ids[0]) == {UNKNOWN_TARGET}


@pytest.mark.parametrize("kind", [Kind.sampled, Kind.hybrid])
def test_other_kinds_have_the_same_completions(kind: Kind, teacher: Path, greedy_cache: Path, tmp_path: Path) -> None:
    options = completion_options(tmp_path, [{"prompt": p} for p in PROMPTS])
    cache = run(config_of(teacher, tmp_path, tmp_path, **options, kind=kind, k=3, draws=5))
    assert isinstance(cache, Path)
    assert [row["weak_ids"] for row in rows_of(cache)] == [row["weak_ids"] for row in rows_of(greedy_cache)]


def test_the_window_bounds_a_completion(teacher: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "x " * 20}, {"prompt": "the"}]
    cache = run(config_of(teacher, tmp_path, tmp_path, **completion_options(tmp_path, rows, max_new_tokens=100)))
    assert all(len(row["input_ids"]) <= 48 for row in rows_of(cache))
    with pytest.raises(InputError, match=r"line 1: expected a prompt of 1 to 47 tokens \(the window less one\), found"):
        run(config_of(teacher, tmp_path, tmp_path, **completion_options(tmp_path, [{"prompt": "x " * 40}])))
    options = completion_options(tmp_path, rows)
    options["corpus"].targets = Targets.all
    with pytest.raises(InputError, match=r"complete.how=greedy: expected corpus.targets=completion"):
        run(config_of(teacher, tmp_path, tmp_path, **options))


def test_a_replay_over_packed_sequences_agrees(teacher: Path, greedy_cache: Path) -> None:
    """Captured one token at a time with a KV cache, replayed in one forward over packed sequences."""
    teacher_options = ModelConfig(path=str(teacher))
    assert commands.run("replay", AuditConfig(cache=str(greedy_cache), teacher=teacher_options, rows=3)) == 0


@pytest.mark.parametrize(
    ("kind", "how", "by_record"),
    [
        (Kind.sampled, CompletionMode.greedy, True),
        (Kind.hybrid, CompletionMode.sample, True),
        (Kind.sampled, CompletionMode.sample, False),
    ],
)
def test_a_replay_repeats_the_draws_of_completions(
    kind: Kind, how: CompletionMode, by_record: bool, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions were captured before they were packed, known ones after; old caches had no draws by record."""
    if not by_record:
        made = plan.make_manifest

        def of_before(*arguments: Any, **named: Any) -> Manifest:
            manifest = made(*arguments, **named)
            manifest.made_of["complete"].pop("draws_by_record", None)
            return dataclasses.replace(manifest, fingerprint=fingerprint(manifest.made_of))

        monkeypatch.setattr(plan, "make_manifest", of_before)
    rows = [{"prompt": p} for p in PROMPTS[:3] * 3] + [{"prompt": "a shard", "completion": " exists if it is whole"}]
    options = completion_options(tmp_path, rows, how=how, temperature=2.0)
    cache = run(config_of(teacher, tmp_path, tmp_path, **options, kind=kind, k=3, draws=40))
    manifest = load_manifest(cache)
    assert manifest.made_of["complete"].get("draws_by_record", False) == (by_record and how is CompletionMode.sample)
    model = open_model(ModelConfig(path=str(teacher), dtype=Dtype.float32), torch.device("cpu"))
    samples = random_samples(cache, manifest, rows=100, seed=0)
    assert max(len(sequence.record_ids) for sequence, _ in samples) > 1
    progress = Progress("replay", total=0, unit="", log_every_seconds=1)
    results = replay(model, samples, manifest, batch_sequences=2, progress=progress)
    (drawn,) = [result for result in results if result.measure == "draws"]
    assert drawn.mean < 0.01  # other draws would differ by 0.2 on average
    assert all(result.is_within_tolerance for result in results)


def test_a_student_trains_on_completions(student: Path, data: Path, greedy_cache: Path, tmp_path: Path) -> None:
    script("train", *train_arguments(student, data, str(greedy_cache), steps=2), cwd=tmp_path)
    assert list(tmp_path.glob("runs/*/result.json"))
