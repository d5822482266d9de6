"""Inspection of a cache: no wrong byte or value passes, and what is told is what lies there."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audit import commands as audit
from pipeline.audit.row_groups import sequence_keys
from pipeline.audit.summary import Counts, summarize
from pipeline.audit.verify import findings, load_manifest
from pipeline.cache import manifest as manifests
from pipeline.cache.manifest import describe_shard
from pipeline.cache.shards import ShardReader
from pipeline.capture import driver as capture
from pipeline.config.schema import AuditConfig, CaptureConfig, Dtype, Kind, ModelConfig, TextConfig
from pipeline.core.files import write_json
from pipeline.core.progress import readable
from pipeline.core.topk import log_probabilities
from pipeline.core.types import InputError
from pipeline.data.packing import sequence_key
from support.commands import script
from support.tiny import TOPICS, prompts, write_lines


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Of tensors this small a second thread only costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A hybrid cache and one of kind topk, both over records with known completions: a folder of two."""
    folder = tmp_path_factory.mktemp("known")
    write_lines(folder / "corpus.jsonl", prompts(60, labeled=True))
    for kind, chosen in (("topk", {"k": 8, "temperatures": [1.0, 2.0]}), ("hybrid", {"k": 4, "draws": 12})):
        capture.run(
            CaptureConfig(
                name=kind,
                caches_dir=str(folder / "caches"),
                teacher=ModelConfig(path=str(teacher), dtype=Dtype.float32, attention="sdpa"),
                corpus=TextConfig(files=[str(folder / "corpus.jsonl")]),
                kind=Kind[kind],
                window=48,
                records_per_shard=25,
                batch_sequences=4,
                **chosen,
            )
        )
    return folder / "caches"


def copy_of(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / cache.name))


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return copy_of(cache, tmp_path)


@pytest.fixture(params=["topk", "hybrid"])
def each(request: pytest.FixtureRequest, known: Path, tmp_path: Path) -> Path:
    (found,) = known.glob(f"{request.param}-*")
    return copy_of(found, tmp_path)


# --------------------------------------------------------------------------------------------- verify


def test_a_whole_cache_has_no_finding(cache: Path, each: Path) -> None:
    assert findings(cache) == []
    assert findings(each) == []


def flipped(data: bytes, random_: random.Random) -> bytes:
    at = random_.randrange(len(data))
    return data[:at] + bytes([data[at] ^ random_.randrange(1, 256)]) + data[at + 1 :]


def test_any_flipped_byte_of_a_shard_is_found_and_never_read(each: Path) -> None:
    random_, blocks = random.Random(0), 0
    for shard in sorted((each / "shards").glob("*.parquet")):
        whole, reader = shard.read_bytes(), ShardReader(each)
        for _ in range(17):
            shard.write_bytes(flipped(whole, random_))
            assert any(line.startswith(str(shard)) for line in findings(each))
            with pytest.raises(InputError, match="damaged"):
                reader.row(blocks, 0)
        shard.write_bytes(whole)
        blocks += len(describe_shard(shard, 0).row_groups)
    assert findings(each) == []


def found_or_refused(cache: Path) -> bool:
    try:
        return bool(findings(cache))
    except InputError as error:
        return "cannot be read" in str(error)


@pytest.mark.parametrize("name", ["manifest.json", "shards/00001.json"])
def test_any_flipped_byte_of_a_json_is_found(each: Path, name: str) -> None:
    whole = (each / name).read_bytes()
    for at in random.Random(0).sample(range(len(whole)), 60):
        wrong = whole[at] ^ (1 if at % 2 else 2)  # digits stay digits, mostly: the hardest to see
        (each / name).write_bytes(whole[:at] + bytes([wrong]) + whole[at + 1 :])
        assert found_or_refused(each), whole[max(at - 20, 0) : at + 20]
    (each / name).write_bytes(whole)
    assert findings(each) == []


def change(path: Path, **fields: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **fields})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda c: (c / "shards/00001.parquet").write_bytes(b"PAR1"), "00001.parquet: expected a whole"),
    "no shard": (lambda c: (c / "shards/00001.parquet").unlink(), "00001.parquet: expected a shard of the plan"),
    "no info": (lambda c: (c / "shards/00001.json").unlink(), "00001.json: expected the ShardInfo"),
    "foreign": (lambda c: (c / "shards/notes.parquet").touch(), "notes.parquet: expected only files of the plan"),
    "beyond the plan": (
        lambda c: shutil.copy(c / "shards/00001.parquet", c / "shards/00003.parquet"),
        "00003.parquet: expected only files of the plan",
    ),
    "claim": (lambda c: (c / "shards/.00001.claim").touch(), ".00001.claim: expected no claim"),
    "beside": (lambda c: (c / "notes.txt").touch(), "notes.txt: expected only files of the plan"),
    "k": (lambda c: change(c / "manifest.json", k=9), "manifest.json: k: expected 8"),
    "made of": (
        lambda c: change(c / "manifest.json", made_of={**load_manifest(c).made_of, "corpus": "0"}),
        "manifest.json: fingerprint: expected",
    ),
    "fewer records": (lambda c: change(c / "manifest.json", num_records=59), "record_ids: expected 50 to 58"),
    "more records": (lambda c: change(c / "manifest.json", num_records=90), "00003.parquet: expected a shard"),
    "skipped": (lambda c: change(c / "manifest.json", num_skipped=1), "num_skipped: expected 0"),
    "vocabulary": (lambda c: change(c / "manifest.json", vocabulary_size=301), "vocabulary_size: expected 301"),
    "unfinished": (lambda c: change(c / "manifest.json", num_skipped=None), "not finished"),
    "rows": (lambda c: change(c / "shards/00001.json", rows=1), "00001.json: rows: expected"),
    "histogram": (
        lambda c: change(c / "shards/00001.json", retained_mass_histogram=[0] * 10),
        "00001.json: retained_mass_histogram: expected",
    ),
    "another shard": (
        lambda c: [shutil.copy(c / f"shards/00000.{end}", c / f"shards/00001.{end}") for end in ("parquet", "json")],
        "00001.json: index: expected 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_where_it_is(copy: Path, damage: str) -> None:
    do, expected = DAMAGE[damage]
    do(copy)
    assert any(expected in line for line in findings(copy)), findings(copy)


def test_every_damage_is_told_not_only_the_first(copy: Path) -> None:
    for damage in ("truncated", "foreign", "skipped"):
        DAMAGE[damage][0](copy)
    assert all(any(DAMAGE[damage][1] in line for line in findings(copy)) for damage in ("truncated", "foreign"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"k": 1}', "\udcff"])
def test_a_manifest_that_cannot_be_read_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="expected a manifest, found one that cannot be read"):
        findings(copy)


def rewrite(cache: Path, index: int, **changes: Callable[[list[Any]], list[Any]]) -> None:
    """A shard with other values in its first row, consistent with all its hashes."""
    path = manifests.shard_path(cache, index)
    table, written = pq.read_table(path), pq.read_metadata(path).metadata
    for name, altered in changes.items():
        column = table.column(name).to_pylist()
        column[0] = altered(column[0])
        place = table.schema.get_field_index(name)
        values = pa.array(column, table.schema.field(name).type)
        table = table.set_column(place, table.schema.field(name), values)
    said = {name: value for name, value in written.items() if name != b"ARROW:schema"}
    pq.write_table(table.replace_schema_metadata(said), path)
    info = describe_shard(path, index)
    change(manifests.info_path(cache, index), bytes=info.bytes, sha256=info.sha256, row_groups=list(info.row_groups))


def first(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [value, *values[1:]]


HALF = np.float16
TOPK_ONLY = {"log_tail", "said"}
WRONG: dict[str, tuple[dict[str, Callable[[list[Any]], list[Any]]], str]] = {
    "input id": ({"input_ids": first(300)}, "input_ids: expected ids from 0 to 299"),
    "kept id": ({"topk_ids": first(300)}, "topk_ids: expected ids from 0 to 299"),
    "kept twice": ({"topk_ids": lambda ids: [ids[1], *ids[1:]]}, "topk_ids: expected different ids"),
    "positions fall": ({"target_positions": lambda p: p[::-1]}, "target_positions: expected ascending"),
    "position outside": ({"target_positions": lambda p: [*p[:-1], 500]}, "inside the sequence"),
    "a token": ({"input_ids": first(7)}, "key: expected the hash"),
    "a target": ({"target_ids": lambda t: [(t[0] + 1) % 300, *t[1:]]}, "expected the token that follows"),
    "first logit": ({"relative_logits": first(HALF(-1))}, "relative_logits: expected 0 first"),
    "NaN": ({"relative_logits": lambda z: [z[0], HALF("nan"), *z[2:]]}, "numbers that do not increase"),
    "rising": ({"relative_logits": lambda z: [z[0], HALF(0.5), *z[2:]]}, "numbers that do not increase"),
    "log_tail": ({"log_tail": first(float("nan"))}, "log_tail: expected finite"),
    "entropy": ({"entropy": first(HALF(9))}, "entropy: expected 0 to 5.70"),
    "positive": ({"next_log_prob": first(HALF(0.5))}, "next_log_prob: expected 0 or less"),
    "said": ({"next_log_prob": first(HALF(-0.001))}, "next_log_prob: expected what the kept entries say"),
    "other record": ({"record_ids": first(0)}, "record_ids: expected 25 to 49"),
    "same record": ({"record_ids": lambda r: [r[-1]] * len(r)}, "records: expected all 25"),
    "segments": ({"segment_lengths": lambda s: [s[0] + 1, *s[1:]]}, "segment_lengths: expected them to add up"),
    "fewer entries": ({"topk_ids": lambda ids: ids[:-1]}, "topk_ids: expected as many values as entries are kept"),
    "fewer entropies": ({"entropy": lambda e: e[:-1]}, "entropy: expected one value a target position"),
    "other mass": ({"relative_logits": lambda z: [HALF(0)] * len(z)}, "retained_mass_histogram: expected"),
    "a segment of nothing": (
        {"segment_lengths": lambda s: [*s, 0], "record_ids": lambda r: [*r, 30]},
        "segment_lengths: expected 1 or more",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_value_with_the_right_hashes_is_found(each: Path, wrong: str) -> None:
    changes, expected = WRONG[wrong]
    if "hybrid" in each.name and wrong in TOPK_ONLY | {"other mass"}:
        changes, expected = {"log_tail": first(-3.0)}, "log_tail: expected -inf"
    rewrite(each, 1, **changes)
    found = findings(each)
    assert any(expected in line and "00001.parquet" in line for line in found), found
    assert all("sha256" not in line and "00001" in line for line in found)


def test_a_rewritten_shard_with_nothing_wrong_passes(each: Path) -> None:
    rewrite(each, 1)
    assert findings(each) == []


def test_kept_counts_are_checked(known: Path, tmp_path: Path) -> None:
    copy = copy_of(next(known.glob("hybrid-*")), tmp_path)
    rewrite(copy, 0, kept_counts=lambda counts: [counts[0] + 1, counts[1] - 1, *counts[2:]])
    assert findings(copy)
    rewrite(copy, 0, kept_counts=lambda counts: [0, counts[0] + counts[1] - 1, *counts[2:]])
    assert any("kept_counts: expected 1 to 16" in line for line in findings(copy))


def test_a_shard_of_another_cache_is_found(known: Path, cache: Path, tmp_path: Path) -> None:
    copy = copy_of(next(known.glob("topk-*")), tmp_path)
    for path in (cache / "shards").glob("00001.*"):
        shutil.copy(path, copy / "shards")
    assert any("00001.parquet: fingerprint: expected" in line for line in findings(copy))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.lists(st.integers(0, 60_000), max_size=9)] * 3), min_size=1, max_size=6))
def test_keys_at_once_are_keys_one_by_one(rows: list[tuple[list[int], ...]]) -> None:
    parts = []
    for lists in zip(*rows, strict=True):
        flat = [value for values in lists for value in values]
        parts.append((np.array(flat, dtype=np.int32), np.array([len(values) for values in lists])))
    expected = [sequence_key(*(np.array(values, dtype=np.int64) for values in row)) for row in rows]
    assert sequence_keys(parts) == expected


# -------------------------------------------------------------------------------------------- summary


def test_summary_is_what_a_slow_reader_finds(each: Path) -> None:
    manifest = load_manifest(each)
    found = summarize(each, manifest)
    reader = ShardReader(each)
    masses: list[float] = []
    by_rank: list[list[float]] = []
    agrees: list[bool] = []
    for block, rows in enumerate(reader.blocks):
        for row in range(rows):
            sequence, captured = reader.row(block, row)
            top = captured.top
            p_NK = log_probabilities(top, temperature=1.0)[0].exp()
            masses += p_NK.sum(1).tolist()
            by_rank += p_NK.tolist()
            agrees += (top.ids_NK[:, 0] == sequence.target_ids_N)[sequence.target_ids_N >= 0].tolist()
    table = pl.read_parquet(each / "shards" / "*.parquet")
    entropy = table.explode("entropy")["entropy"].cast(pl.Float64)
    said = table.explode("next_log_prob")["next_log_prob"].cast(pl.Float64)
    assert found["num_sequences"] == len(table)
    assert found["num_tokens"] == table["input_ids"].list.len().sum()
    assert found["num_targets"] == len(entropy) == len(masses)
    assert found["kept_entries_a_target"] == pytest.approx(table["topk_ids"].list.len().sum() / len(masses))
    assert found["bytes"] == sum(path.stat().st_size for path in (each / "shards").glob("*.parquet"))
    assert sum(found["column_bytes"].values()) == found["bytes"]
    assert found["next_log_prob"] == pytest.approx(said.drop_nans().mean())
    assert found["perplexity"] == pytest.approx(math.exp(-found["next_log_prob"]))
    assert found["top_is_target_fraction"] == pytest.approx(sum(agrees) / len(agrees))
    assert found["entropy"]["mean"] == pytest.approx(entropy.mean())
    assert sum(found["entropy"]["histogram"]) == sum(found["retained_mass"]["histogram"]) == len(masses)
    for name, value in found["entropy"]["quantiles"].items():
        assert value == entropy.quantile(float(name), interpolation="lower")
    assert found["retained_mass"]["mean"] == pytest.approx(sum(masses) / len(masses))
    for name, value in found["retained_mass"]["quantiles"].items():
        assert value == pytest.approx(pl.Series(masses).quantile(float(name), interpolation="nearest"), abs=0.02)
    for k, value in found["retained_mass"]["mean_at_k"].items():
        assert value == pytest.approx(sum(sum(row[: int(k)]) for row in by_rank) / len(by_rank), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 50, width=16) | st.just(float("nan")), min_size=1, max_size=40), st.floats(0, 1))
def test_counted_quantiles_are_sorted_quantiles(values: list[float], fraction: float) -> None:
    counts = Counts()
    for part in (values[::2], values[1::2]):
        counts.add(np.array(part, dtype=np.float16))
    numbers = sorted(value for value in values if not math.isnan(value))
    expected = numbers[math.floor(fraction * (len(numbers) - 1))] if numbers else None
    assert counts.quantile(fraction) == expected
    inside = np.histogram(numbers, bins=5, range=(-50, 50))[0].tolist()
    assert counts.histogram(low=-50, high=50, bins=5) == inside


def test_summary_writes_numbers_and_pictures(known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("topk", "hybrid"):
        config = AuditConfig(cache=str(known / f"{kind}-*"), out=str(tmp_path / kind))
        assert audit.run("summary", config) == 0
        written = json.loads((tmp_path / kind / "summary.json").read_text())
        assert written["kind"] == kind
        assert (tmp_path / kind / "summary.png").read_bytes().startswith(b"\x89PNG")
        assert "Bytes by column" in (tmp_path / kind / "summary.svg").read_text()
    printed = capsys.readouterr().out
    assert f"{written['perplexity']:,.3f}" in printed
    assert "█" in printed


def test_a_summary_of_a_damaged_cache_is_refused(copy: Path) -> None:
    (copy / "shards/00001.json").write_text("{")
    with pytest.raises(InputError, match="ShardInfo"):
        audit.run("summary", AuditConfig(cache=str(copy)))


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 bytes"), (999, "999 bytes"), (18_402, "18.4 kB"), (3.2e9, "3.2 GB"), (5e12, "5 TB")]
)
def test_bytes_as_people_say_them(size: float, said: str) -> None:
    assert readable(size) == said


@given(st.floats(-1, 2))
def test_a_bar_is_as_long_as_its_fraction(fraction: float) -> None:
    drawn = audit.bar(fraction, width=10)
    eighths = sum(8 if c == "█" else " ▏▎▍▌▋▊▉".index(c) for c in drawn)
    assert eighths == pytest.approx(80 * min(max(fraction, 0), 1), abs=0.51)


# --------------------------------------------------------------------------------------------- replay


def replay_config(cache: Path, teacher: Path, **changes: Any) -> AuditConfig:
    model = ModelConfig(path=str(teacher), dtype=Dtype.float32, attention="sdpa")
    return AuditConfig(cache=str(cache), teacher=model, **{"rows": 100, **changes})


def test_the_teacher_still_says_what_is_cached(each: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.run("replay", replay_config(each, teacher)) == 0
    printed = capsys.readouterr().out
    assert "consistent" in printed
    assert "100.0% of the positions" in printed


def swapped_words(ids: list[int]) -> list[int]:
    return [(ids[0] + 1 if ids[0] + 1 not in ids else ids[0] + 117) % 300, *ids[1:]]


TAMPERED: dict[str, dict[str, Callable[[list[Any]], list[Any]]]] = {
    "logit": {"relative_logits": lambda z: [z[0], HALF(z[1] - 0.2), *z[2:]]},
    "id": {"topk_ids": swapped_words},
    "entropy": {"entropy": lambda e: [HALF(e[0] + 0.1), *e[1:]]},
    "log_tail": {"log_tail": lambda t: [t[0] + 0.05, *t[1:]]},
    "said": {"next_log_prob": lambda p: [HALF(p[0] - 0.1), *p[1:]]},
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_cache_is_not_what_the_teacher_says(
    each: Path, teacher: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    altered = TAMPERED[what]
    if "hybrid" in each.name and what in ("logit", "log_tail", "id"):  # more has to change there: a draw may move
        altered = {"topk_ids": lambda ids: [*((i + 150) % 300 for i in ids[:4]), *ids[4:]]}
    rewrite(each, 2, **altered)
    assert audit.run("replay", replay_config(each, teacher)) == 1
    assert "NOT CONSISTENT" in capsys.readouterr().out


def test_another_teacher_is_refused_before_it_loads(cache: Path, teacher: Path, student: Path) -> None:
    with pytest.raises(InputError, match=r"teacher.path: expected the weights"):
        audit.run("replay", replay_config(cache, student))
    for option, changes in (("teacher.dtype", {"dtype": Dtype.bfloat16}), ("teacher.num_layers", {"num_layers": 1})):
        config = replay_config(cache, teacher)
        for name, value in changes.items():
            setattr(config.teacher, name, value)
        with pytest.raises(InputError, match=option):
            audit.run("replay", config)
    with pytest.raises(InputError, match=r"give teacher.path"):
        audit.run("replay", AuditConfig(cache=str(cache)))


# ----------------------------------------------------------------------------------------------- show


def test_show_prints_what_was_read_and_what_follows(
    each: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.run("show", replay_config(each, teacher, record=31, top=3)) == 0
    printed = capsys.readouterr().out
    row = prompts(60, labeled=True)[31]
    assert row["prompt"] in printed
    assert f'next: "{TOPICS[1]}' in printed or TOPICS[1].strip()[0] in printed
    manifest = load_manifest(each)
    blocks = printed.strip().split("\n\n")
    assert len(blocks) > 5  # every position of the record, and of no other
    assert all(block.startswith("record 31, position ") for block in blocks)
    for block in blocks:
        shares = [float(line.split("%")[0].strip(" *")) for line in block.splitlines() if "%" in line[:12]]
        assert sum(shares) == pytest.approx(100, abs=0.05)
        assert len(shares) == 5 or manifest.kind != "topk"


def test_random_rows_are_a_function_of_the_seed(cache: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for seed in (1, 1, 2):
        audit.run("show", replay_config(cache, teacher, rows=4, seed=seed))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert printed[0].count("record ") == 4


def test_records_that_are_not_there_are_refused(cache: Path, teacher: Path) -> None:
    with pytest.raises(InputError, match="record: expected 0 to 59"):
        audit.run("show", replay_config(cache, teacher, record=60))


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb", '"a\\nb"'), ("\x1b[31m", '"\\x1b[31m"'), ('"', '"\\""'), ("é日", '"é日"'), ("\u202e", '"\\u202e"')],
)
def test_text_cannot_command_a_terminal(text: str, shown: str) -> None:
    assert audit.visible(text) == shown


# ----------------------------------------------------------------------------------------- the script


def test_exit_codes_of_the_script(copy: Path, tmp_path: Path) -> None:
    done = script("audit", "verify", f"cache={copy}", cwd=tmp_path)
    assert "whole and right: 60 records" in done.stdout
    (copy / "shards/foreign.parquet").touch()
    shard = copy / "shards/00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    wrong = script("audit", "verify", f"cache={copy}", cwd=tmp_path, check=False)
    assert wrong.returncode == 1
    assert wrong.stdout.count("expected") == 2
    (copy / "manifest.json").unlink()
    unread = script("audit", "verify", f"cache={copy}", cwd=tmp_path, check=False)
    assert (unread.returncode, "manifest.json" in unread.stderr) == (2, True)


@pytest.mark.parametrize("arguments", [[], ["verfiy", "cache=."], ["cache=."], ["verify", "cash=."], ["verify"]])
def test_a_wrong_command_line_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    done = script("audit", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    if not arguments or arguments[0] != "verify":
        assert all(f"  {action} " in done.stderr for action in ("verify", "summary", "replay", "show"))


def test_the_script_shows_and_explains(cache: Path, teacher: Path, tmp_path: Path) -> None:
    shown = script("audit", "show", f"cache={cache}", f"teacher.path={teacher}", "rows=1", cwd=tmp_path)
    assert "(tail)" in shown.stdout
    explained = script("audit", "--help", cwd=tmp_path).stdout
    assert "Exit codes" in explained
    assert "teacher.path" in explained
