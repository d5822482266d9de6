"""Shards equal a fresh forward of the teacher, are plain Parquet, and are captured only once."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers

from pipeline.cache import manifest as manifests
from pipeline.cache.shards import ShardReader, shard_writer
from pipeline.capture import plan
from pipeline.capture.driver import run
from pipeline.config.schema import Kind, MalformedPolicy, Targets, TextConfig
from pipeline.core.topk import log_probabilities
from pipeline.core.types import InputError
from pipeline.data.packing import position_ids
from pipeline.models import loading
from pipeline.models.tokenizer import load_tokenizer
from support.commands import capture_arguments, config_of, script
from support.modes import other_modes
from support.tiny import make_model, write_lines


def test_the_cached_distribution_equals_a_fresh_forward(teacher: Path, data: Path, cache: Path) -> None:
    """Each segment alone through transformers' own forward, without packing or padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher).eval()
    tokenizer = load_tokenizer(teacher)
    prompts = [json.loads(line)["prompt"] for line in (data / "corpus.jsonl").read_text().splitlines()]
    reader = ShardReader(cache)
    record_ids: list[int] = []
    for block, rows in enumerate(reader.blocks):
        for r in range(rows):
            sequence, captured = reader.row(block, r)
            top = captured.top
            starts = torch.tensor([0, *sequence.segment_lengths]).cumsum(0).tolist()
            n = 0
            for record_id, start, end in zip(sequence.record_ids, starts, starts[1:], strict=False):
                ids = tokenizer(prompts[record_id])["input_ids"]
                assert sequence.input_ids_S[start:end].tolist() == ids
                with torch.no_grad():
                    logits_SV = model(input_ids=torch.tensor([ids])).logits[0, :, : len(tokenizer)]
                supervised = [s for s in sequence.target_positions_N.tolist() if start <= s < end]
                for s in supervised:
                    for T in (1.0, 2.0):
                        fresh_V = torch.log_softmax(logits_SV[s - start].double() / T, dim=0)
                        log_p_NK, log_tail_N = log_probabilities(top, temperature=T)
                        assert torch.allclose(log_p_NK[n].double(), fresh_V[top.ids_NK[n]], atol=5e-3)
                        rest = fresh_V.scatter(0, top.ids_NK[n], -torch.inf).logsumexp(0)
                        assert abs(log_tail_N[n].item() - rest.item()) < 5e-3
                    n += 1
                assert len(supervised) == 1  # targets=next
                record_ids.append(record_id)
    assert sorted(record_ids) == list(range(60))


def test_a_shard_is_plain_parquet(cache: Path) -> None:
    """polars reads it without code of this project, as in the README."""
    rows = pl.scan_parquet(cache / "shards" / "*.parquet").collect()
    manifest = json.loads((cache / "manifest.json").read_text())
    assert rows["record_ids"].explode().sort().to_list() == list(range(60))
    counts = rows["target_positions"].list.len()
    assert (rows["topk_ids"].list.len() == counts * manifest["k"]).all()
    assert (rows["relative_logits"].list.len() == counts * manifest["k"]).all()
    assert (rows["log_tail"].list.len() == counts * len(manifest["temperatures"])).all()
    assert (rows["segment_lengths"].list.sum() == rows["input_ids"].list.len()).all()
    assert rows.schema["topk_ids"] == pl.List(pl.UInt32)
    assert rows["topk_ids"].explode().max() < manifest["vocabulary_size"]


def test_others_can_read_a_cache_and_learn_what_its_plans_are(cache: Path) -> None:
    assert other_modes(cache.parent) == {}
    assert (cache.parent / ".plans" / "README.txt").read_text().startswith("Plans of captures, one folder each: ")


def test_next_log_prob_and_entropy(teacher: Path, tmp_path: Path) -> None:
    files = write_lines(tmp_path / "a.jsonl", [{"text": "the weak model supervises"}])
    cache = run(config_of(teacher, files, tmp_path / "caches"))
    row = pl.read_parquet(cache / "shards" / "00000.parquet").row(0, named=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher).eval()
    ids = torch.tensor([row["input_ids"]])
    log_p_SV = torch.log_softmax(model(input_ids=ids).logits[0, :, : len(load_tokenizer(teacher))].double(), 1)
    for n, (s, target) in enumerate(zip(row["target_positions"], row["target_ids"], strict=True)):
        assert row["next_log_prob"][n] == pytest.approx(log_p_SV[s, target].item(), abs=5e-3)
        assert row["entropy"][n] == pytest.approx(-(log_p_SV[s].exp() * log_p_SV[s]).sum().item(), abs=5e-3)


def test_a_second_run_writes_nothing_and_does_not_load_the_teacher(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(teacher, data / "corpus.jsonl", tmp_path)
    cache = run(config)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (cache / "shards").iterdir()}

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(loading, "load_model", never)
        assert run(config) == cache
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (cache / "shards").iterdir()} == before


def test_only_missing_shards_are_captured_again_with_the_same_bytes(teacher: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(teacher, data / "corpus.jsonl", tmp_path)
    cache = run(config)
    shards = cache / "shards"
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    time_before = (shards / "00000.parquet").stat().st_mtime_ns
    (shards / "00001.parquet").unlink()
    (shards / "00001.json").unlink()
    (shards / "00002.json").unlink()  # as after a crash between the Parquet file and its ShardInfo
    (shards / ".00001.1.abc.tmp").write_bytes(b"half")  # as a killed worker leaves it
    with pytest.raises(InputError, match="expected 3 committed shards, found 1; run the same scripts/capture.py again"):
        ShardReader(cache)
    run(config)
    assert {path.name: path.read_bytes() for path in shards.iterdir() if path.suffix != ".tmp"} == before
    assert (shards / "00000.parquet").stat().st_mtime_ns == time_before


def test_the_cache_depends_on_content_and_not_on_batch_size_or_paths(teacher: Path, data: Path, tmp_path: Path) -> None:
    files = data / "corpus.jsonl"
    first = run(config_of(teacher, files, tmp_path))
    assert run(config_of(teacher, files, tmp_path, batch_sequences=3)) == first
    moved = shutil.copy(files, tmp_path / "moved.jsonl")
    assert run(config_of(teacher, Path(moved), tmp_path)) == first
    assert run(config_of(teacher, files, tmp_path, k=9)) != first
    assert run(config_of(teacher, files, tmp_path, temperatures=[1.0])) != first
    assert (
        run(config_of(teacher, files, tmp_path, corpus=TextConfig(files=[str(files)], targets=Targets.next))) != first
    )


def test_a_cache_of_another_teacher_is_rejected_with_the_field(
    student: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    other = run(config_of(student, data / "corpus.jsonl", tmp_path))
    cache = run(config_of(teacher, data / "corpus.jsonl", tmp_path))
    shutil.rmtree(cache)
    other.rename(cache)
    with pytest.raises(InputError, match=r"made of something else.*\n  teacher_weights: expected '.*', found '"):
        run(config_of(teacher, data / "corpus.jsonl", tmp_path))


def test_malformed_records_are_counted_in_the_manifest(teacher: Path, tmp_path: Path) -> None:
    rows = [{"text": "the weak"}, "broken", {"text": "the strong"}, {"prompt": "x " * 60}]
    files = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match="line 2: expected a JSON object"):
        run(config_of(teacher, files, tmp_path))
    skip = TextConfig(files=[str(files)], malformed=MalformedPolicy.skip)
    cache = run(config_of(teacher, files, tmp_path, corpus=skip, records_per_shard=2))
    manifest = manifests.load_manifest(cache)
    assert (manifest.num_records, manifest.num_skipped) == (4, 2)
    assert [info.num_skipped for info in manifests.committed_shards(cache, manifest)] == [1, 1]


def test_an_error_while_writing_leaves_nothing_behind(teacher: Path, data: Path, tmp_path: Path) -> None:
    cache = run(config_of(teacher, data / "corpus.jsonl", tmp_path))
    manifest = manifests.load_manifest(cache)
    before = sorted(path.name for path in (cache / "shards").iterdir())
    with pytest.raises(RuntimeError), shard_writer(cache, manifest, 7):
        raise RuntimeError
    assert sorted(path.name for path in (cache / "shards").iterdir()) == before


def test_a_commit_never_overwrites(teacher: Path, data: Path, tmp_path: Path) -> None:
    """Two workers commit one shard, the second with other bytes: the first file stays, and matches its ShardInfo."""
    cache = run(config_of(teacher, data / "corpus.jsonl", tmp_path / "one"))
    other = run(config_of(teacher, data / "corpus.jsonl", tmp_path / "two", k=7))
    info = manifests.shard_info(cache, 0)
    assert info is not None
    temporary = cache / "shards" / ".late.tmp"
    for without_info in (False, True):
        shutil.copy(other / "shards" / "00000.parquet", temporary)
        if without_info:
            (cache / "shards" / "00000.json").unlink()
        manifests.commit_shard(cache, temporary, 0)
        assert manifests.shard_info(cache, 0) == info
        manifests.check_shard_hash(cache, info)
        assert not temporary.exists()


@pytest.mark.parametrize("place", [0, 4, 1000, -9, -1])
def test_a_flipped_byte_is_found_before_a_row_is_used(place: int, cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cache, tmp_path / "copy")
    shard = copy / "shards" / "00001.parquet"
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    reader = ShardReader(copy)
    first = manifests.shard_info(copy, 0)
    assert first is not None
    reader.row(0, 0)  # another shard, not damaged
    with pytest.raises(InputError, match=r"00001.parquet: expected sha256 .*the shard is damaged: delete it"):
        reader.row(len(first.row_groups), 0)


def test_reading_with_a_smaller_k(cache: Path) -> None:
    wide, narrow = (reader.row(0, 0)[1].top for reader in (ShardReader(cache), ShardReader(cache, k=3)))
    assert narrow.ids_NK.shape[1] == 3
    assert torch.equal(narrow.ids_NK, wide.ids_NK[:, :3])
    with pytest.raises(InputError, match="k: expected 1 to 8"):
        ShardReader(cache, k=9)


def test_packed_rows_keep_their_positions(cache: Path) -> None:
    sequence, _ = ShardReader(cache).row(0, 0)
    assert len(sequence.segment_lengths) > 1
    assert position_ids(sequence.segment_lengths).tolist().count(0) == len(sequence.segment_lengths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 10_000}, "k: expected at most 300 (the vocabulary of"),
        ({"window": 500}, "window: expected at most 256 (the positions of"),
        ({"temperatures": [2.0]}, "temperatures: expected 1.0 among them, found [2.0]; add it"),
    ],
)
def test_options_that_do_not_fit_are_rejected(
    changes: dict[str, Any], message: str, teacher: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        run(config_of(teacher, data / "corpus.jsonl", tmp_path / "caches", **changes))
    assert not (tmp_path / "caches").exists()


def test_a_file_system_that_cannot_rename_folders_is_refused_before_the_corpus_is_read(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_rename = Path.rename

    def rename(old: Path, new: Path) -> Path:
        if old.is_dir():
            raise OSError(errno.EMFILE, "Too many open files")  # gcsfuse says so
        return really_rename(old, new)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(plan, "open_corpus", lambda *arguments: pytest.fail("the corpus is read"))
    for changes, option in (({}, "caches_dir"), ({"cache": str(tmp_path / "exact")}, "cache")):
        message = rf"^{option}: expected a file system that renames a folder with files in it .* with {option}=$"
        with pytest.raises(InputError, match=message):
            run(config_of(teacher, data / "corpus.jsonl", tmp_path / "caches", **changes))


REJECTED_ARGUMENTS = {
    "missing file": (
        {"corpus__files": "[nowhere.jsonl]"},
        "files: expected 'nowhere.jsonl' to exist, found nothing there",
    ),
    "k above the vocabulary": ({"k": 10_000}, "k: expected at most 300 (the vocabulary of"),
    "unknown option": ({"kk": 1}, "expected the name of an option, found 'kk'; did you mean k?"),
    "no number": ({"k": "many"}, "many"),
    "not a choice": ({"corpus__targets": "some"}, "some"),
}


@pytest.mark.parametrize("name", REJECTED_ARGUMENTS)
def test_the_script_rejects_wrong_arguments(name: str, teacher: Path, data: Path, tmp_path: Path) -> None:
    """Exit code 2, a message without a traceback, and nothing written."""
    changes, message = REJECTED_ARGUMENTS[name]
    done = script("capture", *capture_arguments(teacher, data, **changes), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "caches").exists()


def test_padding_of_the_teachers_head_changes_nothing(tmp_path: Path, tokenizer: Any, data: Path) -> None:
    """Two heads of one model, padded to different sizes, give the same cache."""
    narrow = make_model(tmp_path / "narrow", tokenizer, seed=5, padding=0)
    wide_model = transformers.AutoModelForCausalLM.from_pretrained(narrow)
    wide_model.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    wide_model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    caches = [run(config_of(tmp_path / name, data / "corpus.jsonl", tmp_path)) for name in ("narrow", "wide")]
    columns = [pl.read_parquet(cache / "shards" / "*.parquet").select("key", "topk_ids", "entropy") for cache in caches]
    assert columns[0].equals(columns[1])


@pytest.mark.parametrize("kind", [Kind.sampled, Kind.hybrid])
def test_sampled_and_hybrid_caches(kind: Kind, teacher: Path, data: Path, tmp_path: Path) -> None:
    """A shard captured again has the same bytes; rows are read as written; another seed gives another cache."""
    options: dict[str, Any] = {"kind": kind, "k": 3, "draws": 10, "temperatures": [1.0]}
    cache = run(config_of(teacher, data / "corpus.jsonl", tmp_path, **options))
    before = (cache / "shards" / "00001.parquet").read_bytes()
    for path in (cache / "shards").glob("00001.*"):
        path.unlink()
    run(config_of(teacher, data / "corpus.jsonl", tmp_path, **options))
    assert (cache / "shards" / "00001.parquet").read_bytes() == before
    rows = pl.read_parquet(cache / "shards" / "*.parquet")
    counts = rows["kept_counts"].list.sum()
    assert (rows["topk_ids"].list.len() == counts).all()
    assert rows["kept_counts"].explode().n_unique() > 1
    sequence, captured = ShardReader(cache).row(0, 0)
    top, row = captured.top, rows.row(0, named=True)
    assert sequence.input_ids_S.tolist() == row["input_ids"]
    first = 0
    for n, count in enumerate(row["kept_counts"]):
        assert top.ids_NK[n, :count].tolist() == row["topk_ids"][first : first + count]
        assert (top.relative_logits_NK[n, count:] == -torch.inf).all()
        first += count
    log_p_NK, log_tail_N = log_probabilities(top, temperature=1.0)
    assert torch.allclose(log_p_NK.exp().sum(1), torch.ones(len(log_p_NK)), atol=1e-5)
    assert (log_tail_N == -torch.inf).all()
    assert run(config_of(teacher, data / "corpus.jsonl", tmp_path, **options, seed=1)) != cache
    with pytest.raises(InputError, match=r"k: expected null, because .* is"):
        ShardReader(cache, k=2)
    with pytest.raises(InputError, match=r"temperatures: expected \[1.0\], because a .* cache is exact only at T = 1"):
        run(config_of(teacher, data / "corpus.jsonl", tmp_path, **{**options, "temperatures": [1.0, 2.0]}))


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_a_teacher_with_nan_stops_before_a_shard_is_committed(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    """One embedding is NaN, that of a token of the third record alone: this record is named."""
    broken = make_model(tmp_path / "broken", tokenizer, seed=2, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("z")["input_ids"][0]] = torch.nan
    model.save_pretrained(broken)
    rows = [{"text": letters * 12} for letters in ("qxj", "jqx", "zqx", "xjq")]  # one record in each window of 48
    config = config_of(broken, write_lines(tmp_path / "a.jsonl", rows), tmp_path, kind=Kind[kind], temperatures=[1.0])
    with pytest.raises(InputError, match="found NaN or infinity in the window of the records 2 of the corpus"):
        run(config)
    assert not list(tmp_path.glob("tiny-*/shards/*.parquet"))
