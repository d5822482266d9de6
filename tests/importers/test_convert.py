"""A dense distribution that another project has stored is the same distribution after its import."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.audit.verify import findings
from pipeline.cache import manifest as manifests
from pipeline.cache.shards import ShardReader
from pipeline.config.schema import Alignment, Format, ImportConfig
from pipeline.core.topk import log_probabilities
from pipeline.core.types import UNKNOWN_TARGET, InputError, TokenSequence, TopK
from pipeline.importers.convert import run
from support.commands import script, train_arguments
from support.distillkit_bytes import bit_bytes, floats
from support.tiny import LINES, write_lines

K, BITS = 6, 9  # 300 tokens need 9 bits

Truth = tuple[list[int], torch.Tensor]  # L token ids and dense log-probabilities [L, V]: row s predicts token s + 1


@pytest.fixture(scope="module")
def truths(tokenizer: Any) -> list[Truth]:
    """Rows of 2 to 9 tokens; most true tokens are among the likely ones, some are not."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for r in range(13):
        ids = tokenizer(LINES[r % len(LINES)])["input_ids"][: 2 + r % 8]
        logits_LV = torch.randn(len(ids), len(tokenizer), generator=generator, dtype=torch.float64) * 3
        for s in range(0, len(ids) - 1, 2):
            logits_LV[s, ids[s + 1]] += 8
        made.append((ids, torch.log_softmax(logits_LV, dim=1)))
    return made


# ------------------------------------------------------------------------------------------- encoders


def top(log_p_LV: torch.Tensor, k: int = K) -> tuple[list[list[int]], list[list[float]]]:
    values, ids = log_p_LV.topk(k, dim=1)
    return ids.tolist(), values.tolist()


def write_table(file: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> None:
    """Parquet in row groups of two, an Arrow stream as `datasets` writes it, or JSON, by the suffix; packed by gzip."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".gz":
        write_table(file.with_suffix(""), rows, **types)
        file.write_bytes(gzip.compress(file.with_suffix("").read_bytes()))
        file.with_suffix("").unlink()
        return
    if file.suffix == ".jsonl":
        write_lines(file, rows)
        return
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
        return
    table = pa.Table.from_pylist(rows, pa.schema(types.items()) if types else None)
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=2)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


def distillkit(folder: Path, truths: list[Truth], *, pad: bool = False, **settings: Any) -> dict[str, Any]:
    """Compressed, in two files whose names sort wrongly as text: data_10 before data_2."""
    rows = []
    for ids, log_p_LV in truths:
        kept, values = top(log_p_LV if pad else log_p_LV[:-1])
        deltas = [[v - u for u, v in zip([0.0, *row], row, strict=False)] for row in values]
        packed = [list(floats(row, "float32")) for row in deltas]
        entries = [list(bit_bytes(row, BITS)) for row in kept]
        rows.append({"input_ids": ids, "compressed_logprobs": packed, "bytepacked_indices": entries})
    tiny = pa.list_(pa.list_(pa.uint8()))
    types = {"input_ids": pa.list_(pa.uint64()), "compressed_logprobs": tiny, "bytepacked_indices": tiny}
    write_table(folder / "data_2.parquet", rows[:9], **types)
    write_table(folder / "data_10.parquet", rows[9:], **types)
    config = {"d": 300, "k": K, "exact_k": K, "exact_dtype": "float32", "residual_bins": [], **settings}
    (folder / "compression_config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return {"format": Format.distillkit}


def distillkit_unpacked(folder: Path, truths: list[Truth]) -> dict[str, Any]:
    rows = []
    for ids, log_p_LV in truths:
        kept, values = top(log_p_LV[:-1])
        rows.append({"input_ids": ids, "token_ids": kept, "top_values": values})
    write_table(folder / "data_0.parquet", rows)
    return {"format": Format.distillkit}


def raw(spelling: str, suffix: str) -> Callable[[Path, list[Truth]], dict[str, Any]]:
    """Right-aligned: the first row, which would predict token 0, is null or missing."""

    def write(folder: Path, truths: list[Truth]) -> dict[str, Any]:
        rows = []
        for ids, log_p_LV in truths:
            kept, values = top(log_p_LV[:-1])
            positions = [list(zip(k, v, strict=True)) for k, v in zip(kept, values, strict=True)]
            row: dict[str, Any] = {"input_ids": ids}
            if spelling == "arrays":
                row |= {"logprobs": values, "target_token_ids": kept}
            elif spelling == "dicts":
                row["logprobs"] = [None, *({str(k): {"logprob": v, "rank": 1} for k, v in p} for p in positions)]
            elif spelling == "tokens":
                row["logprobs"] = [None, *([{"token": f"token_id:{k}", "logprob": v} for k, v in p] for p in positions)]
            else:
                row["logprobs"] = [[{"token_id": k, "logprob": v} for k, v in p] for p in positions]
            rows.append(row)
        write_table(folder / f"data{suffix}", rows)
        return {"format": Format.axolotl_raw}

    return write


def prepared(alignment: str, suffix: str) -> Callable[[Path, list[Truth]], dict[str, Any]]:
    """Renormalised over the top k, unsorted, with one padding token that attention_mask marks."""

    def write(folder: Path, truths: list[Truth]) -> dict[str, Any]:
        rows = []
        for ids, log_p_LV in truths:
            values, kept = log_p_LV[:-1].topk(K, dim=1)
            values = torch.log_softmax(values, dim=1).flip(1).tolist()
            kept, masks = kept.flip(1).tolist(), [[1] * K] * (len(ids) - 1)
            padding = ([0] * K, [-1e4] * K, [0] * K)
            filled = list(zip(kept, values, masks, strict=True))
            filled = [*filled, padding] if alignment == "current" else [padding, *filled]
            filled.append(padding)
            names = ("target_token_ids", "target_logprobs", "target_mask")
            columns = {name: [part[i] for part in filled] for i, name in enumerate(names)}
            mask = [1] * len(ids) + [0]
            rows.append({"input_ids": [*ids, 1], "labels": [*ids, -100], "attention_mask": mask, **columns})
        write_table(folder / f"data{suffix}", rows)
        return {"format": Format.axolotl_prepared, "alignment": Alignment[alignment]}

    return write


FORMS: dict[str, Callable[[Path, list[Truth]], dict[str, Any]]] = {
    "distillkit packed": distillkit,
    "distillkit unpacked": distillkit_unpacked,
    "raw arrays, Parquet": raw("arrays", ".parquet"),
    "raw arrays, JSON": raw("arrays", ".jsonl"),
    "raw dicts, JSON": raw("dicts", ".jsonl"),
    "raw dicts, Parquet": raw("dicts", ".parquet"),
    "raw tokens, JSON": raw("tokens", ".jsonl"),
    "raw tokens, JSON array": raw("tokens", ".json"),
    "raw token ids, Parquet packed": raw("token ids", ".parquet.gz"),
    "raw token ids, Parquet": raw("token ids", ".parquet"),
    "prepared current, Arrow": prepared("current", ".arrow"),
    "prepared current, JSON": prepared("current", ".jsonl"),
    "prepared legacy, Parquet": prepared("legacy", ".parquet"),
}


def imported(source: Path, student: Path, settings: dict[str, Any], **changes: Any) -> Path:
    chosen = {"name": "theirs", "caches_dir": str(source.parent / "caches"), "records_per_shard": 5}
    chosen |= settings | changes
    return run(ImportConfig(source=str(source), tokenizer=str(student), **chosen))


def sequences(cache: Path) -> dict[int, tuple[TokenSequence, TopK]]:
    reader = ShardReader(cache)
    rows = [reader.row(block, r) for block, count in enumerate(reader.blocks) for r in range(count)]
    return {sequence.record_ids[0]: (sequence, captured.top) for sequence, captured in rows}


# --------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize("form", FORMS)
def test_an_imported_distribution_is_the_stored_one(
    form: str, truths: list[Truth], student: Path, tmp_path: Path
) -> None:
    cache = imported(tmp_path / "source", student, FORMS[form](tmp_path / "source", truths))
    manifest, imported_rows = manifests.load_manifest(cache), sequences(cache)
    renormalised = form.startswith("prepared")
    assert manifest.tail == ("renormalised" if renormalised else "remainder")
    assert (manifest.kind, manifest.k, manifest.num_records, manifest.num_shards) == ("topk", K, 13, 3)
    assert (manifest.window, manifest.num_skipped) == (max(len(ids) for ids, _ in truths), 0)
    assert sorted(imported_rows) == list(range(13))
    assert findings(cache) == []
    for r, (ids, log_p_LV) in enumerate(truths):
        sequence, kept = imported_rows[r]
        assert sequence.input_ids_S.tolist() == ids
        assert sequence.segment_lengths == (len(ids),)
        assert sequence.target_positions_N.tolist() == list(range(len(ids) - 1))
        assert sequence.target_ids_N.tolist() == ids[1:]
        values_NK, ids_NK = log_p_LV[:-1].topk(K, dim=1)
        log_rest_N = torch.log1p(-values_NK.exp().sum(dim=1))
        if renormalised:
            values_NK, log_rest_N = torch.log_softmax(values_NK, dim=1), torch.full_like(log_rest_N, -torch.inf)
        assert torch.equal(kept.ids_NK, ids_NK)
        log_p_NK, log_tail_N = log_probabilities(kept, temperature=1.0)
        assert torch.allclose(log_p_NK.double(), values_NK, atol=8e-3)  # fp16 of at most 16 nats below the largest
        assert torch.allclose(log_tail_N.double(), log_rest_N, atol=8e-3)
        total_N = log_p_NK.double().exp().sum(dim=1) + log_tail_N.double().exp()
        assert torch.allclose(total_N, torch.ones_like(total_N), atol=1e-6)


@pytest.mark.parametrize("form", ["distillkit packed", "prepared legacy, Parquet"])
def test_the_true_tokens_log_probability_where_it_was_kept(
    form: str, truths: list[Truth], student: Path, tmp_path: Path
) -> None:
    cache = imported(tmp_path / "source", student, FORMS[form](tmp_path / "source", truths))
    rows = pl.read_parquet(cache / "shards" / "*.parquet")
    num_missing = num_kept = 0
    for r, values, entropies in zip(*(rows[name] for name in ("record_ids", "next_log_prob", "entropy")), strict=True):
        ids, log_p_LV = truths[r[0]]
        assert entropies.is_nan().all()
        for s, value in enumerate(values):
            values_K, ids_K = log_p_LV[s].topk(K)
            if form.startswith("prepared"):
                values_K = torch.log_softmax(values_K, dim=0)
            at = (ids_K == ids[s + 1]).nonzero()
            num_missing, num_kept = num_missing + (len(at) == 0), num_kept + len(at)
            assert value == pytest.approx(values_K[at[0, 0]].item(), abs=8e-3) if len(at) else value != value
    assert min(num_missing, num_kept) > 10


def test_a_curve_is_approximate_and_its_tail_is_never_negative(student: Path, tmp_path: Path) -> None:
    """Position 0 sums to less than 1; position 1 sums to more, which only a fitted curve may do."""
    coefficients = [[-3.0, -1.0], [-0.5, -0.5]]
    packed = [list(floats([-1.0], "float32") + floats(pair, "float32")) for pair in coefficients]
    entries = [list(bit_bytes([7, 8, 9], BITS))] * 2
    row = {"input_ids": [7, 8, 9], "compressed_logprobs": packed, "bytepacked_indices": entries}
    write_table(tmp_path / "source" / "data_0.parquet", [row])
    config = {"d": 300, "k": 3, "exact_k": 1, "residual_bins": [], "polynomial_terms": [0, 1], "delta_encoding": False}
    (tmp_path / "source" / "compression_config.yml").write_text(json.dumps(config))
    cache = imported(tmp_path / "source", student, {"format": Format.distillkit})
    assert manifests.load_manifest(cache).tail == "approximate"
    assert findings(cache) == []
    (_, kept) = sequences(cache)[0]
    assert kept.ids_NK.tolist() == [[7, 8, 9], [8, 7, 9]]  # by falling value, whatever the file's order
    log_p_NK, log_tail_N = log_probabilities(kept, temperature=1.0)
    first_K = torch.tensor([-1.0, -3.0, -4.0])
    assert torch.allclose(log_p_NK[0], first_K, atol=2e-3)
    assert log_tail_N[0].item() == pytest.approx((1 - first_K.exp().sum()).log().item(), abs=2e-3)
    assert log_tail_N[1] == -torch.inf
    assert torch.allclose(log_p_NK[1], torch.log_softmax(torch.tensor([-0.5, -1.0, -1.0]), 0), atol=2e-3)


# -------------------------------------------------------------------------------- lengths and segments


def test_missing_entries_are_dropped_and_their_ids_ignored(student: Path, tmp_path: Path) -> None:
    """Positions of 3, 1 and 0 entries; a row without entries is skipped and counted."""
    minus = -float("inf")
    rows = [
        {"input_ids": [5], "token_ids": [], "top_values": []},
        {
            "input_ids": [5, 6, 7, 8],
            "token_ids": [[9, 6, 10], [7, 99_999, 7], [99_999] * 3],
            "top_values": [[-2.0, -1.0, -3.0], [-0.25, minus, minus], [minus] * 3],
        },
    ]
    types = {"input_ids": pa.list_(pa.int64()), "token_ids": pa.list_(pa.list_(pa.int64()))}
    write_table(tmp_path / "source" / "data_0.parquet", rows, **types, top_values=pa.list_(pa.list_(pa.float32())))
    cache = imported(tmp_path / "source", student, {"format": Format.distillkit})
    manifest = manifests.load_manifest(cache)
    assert (manifest.k, manifest.num_records, manifest.num_skipped) == (3, 2, 1)
    (sequence, kept) = sequences(cache)[1]
    assert sequence.target_positions_N.tolist() == [0, 1]
    assert kept.ids_NK.tolist() == [[6, 9, 10], [7, 7, 7]]
    assert kept.relative_logits_NK.tolist() == [[0.0, -1.0, -2.0], [0.0, -torch.inf, -torch.inf]]
    log_p_NK, log_tail_N = log_probabilities(kept, temperature=1.0)
    assert log_p_NK[1, 0].item() == pytest.approx(-0.25, abs=1e-3)
    assert log_tail_N[1].exp().item() == pytest.approx(1 - 0.7788, abs=1e-3)
    stored = pl.read_parquet(cache / "shards" / "*.parquet")
    assert stored["kept_counts"].to_list() == [[3, 1]]
    assert stored["topk_ids"].to_list() == [[6, 9, 10, 7]]


def test_a_smaller_k_where_rows_keep_different_numbers_of_entries(student: Path, tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5, 6], "token_ids": [[6, 9, 10]], "top_values": [[-1.0, -2.0, -3.0]]},
        {"input_ids": [5, 7], "token_ids": [[7]], "top_values": [[-0.25]]},
    ]
    write_table(tmp_path / "source" / "data_0.parquet", rows)
    reader = ShardReader(imported(tmp_path / "source", student, {"format": Format.distillkit}), k=2)
    for r, width, mass in ((0, 2, 1 - 0.3679 - 0.1353), (1, 1, 1 - 0.7788)):
        kept = reader.row(0, r)[1].top
        assert kept.ids_NK.shape == (1, width)
        _, log_tail_N = log_probabilities(kept, temperature=1.0)
        assert log_tail_N.exp().item() == pytest.approx(mass, abs=1e-3)


def test_the_target_of_the_last_distribution_is_unknown(truths: list[Truth], student: Path, tmp_path: Path) -> None:
    cache = imported(tmp_path / "source", student, distillkit(tmp_path / "source", truths, pad=True))
    for r, (sequence, kept) in sequences(cache).items():
        ids, log_p_LV = truths[r]
        assert sequence.target_positions_N.tolist() == list(range(len(ids)))
        assert sequence.target_ids_N.tolist() == [*ids[1:], UNKNOWN_TARGET]
        assert torch.equal(kept.ids_NK, log_p_LV.topk(K, dim=1).indices)


def test_the_token_that_distillkit_appends_is_no_part_of_the_text(tokenizer: Any, tmp_path: Path) -> None:
    """It is the padding token. Where that is the end token, it may end the text, and is kept."""
    rows = [{"input_ids": [5, 6, last], "token_ids": [[6], [9]], "top_values": [[-0.5], [-0.7]]} for last in (0, 1, 7)]
    write_table(tmp_path / "source" / "data_0.parquet", rows)
    caches = []
    unknown = UNKNOWN_TARGET
    for name, pad, known in (("own", "<bos>", [unknown, 1, 7]), ("end", "<eos>", [0, 1, 7]), ("no", None, [0, 1, 7])):
        own = copy.deepcopy(tokenizer)
        own.pad_token = pad
        own.save_pretrained(tmp_path / name)
        caches.append(imported(tmp_path / "source", tmp_path / name, {"format": Format.distillkit}))
        found = sequences(caches[-1])
        assert [sequence.target_ids_N.tolist() for sequence, _ in found.values()] == [[6, last] for last in known]
        assert found[0][0].input_ids_S.tolist() == ([5, 6] if name == "own" else [5, 6, 0])
        assert found[0][1].ids_NK.tolist() == [[6], [9]]  # the distributions stay
        assert ("appended_token" in manifests.load_manifest(caches[-1]).made_of) == (name == "own")
        assert findings(caches[-1]) == []


@pytest.mark.parametrize("alignment", [None, "current", "legacy"])
def test_packed_documents_become_segments(alignment: str | None, student: Path, tmp_path: Path) -> None:
    """Three documents and padding; a distribution at a document's end has no target, or predicts the next document."""
    ids, mask = [20, 21, 22, 23, 24, 25, 26, 1], [1, 1, 1, 2, 2, 3, 3, 0]
    row: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if alignment is None:
        kept, values = [[i + 1] for i in range(20, 28)], [[-0.5]] * 8
        write_table(tmp_path / "source" / "data_0.parquet", [row | {"token_ids": kept, "top_values": values}])
        settings: dict[str, Any] = {"format": Format.distillkit}
    else:
        kept = [[i + (alignment == "current")] for i in range(20, 28)]
        row |= {"target_token_ids": kept, "target_logprobs": [[0.0]] * 8, "target_mask": [[1]] * 8}
        write_table(tmp_path / "source" / "data.jsonl", [row])
        settings = {"format": Format.axolotl_prepared, "alignment": Alignment[alignment]}
    sequence, kept_entries = sequences(imported(tmp_path / "source", student, settings))[0]
    assert sequence.input_ids_S.tolist() == ids[:7]
    assert sequence.segment_lengths == (3, 2, 2)
    assert sequence.record_ids == (0, 0, 0)
    unknown = UNKNOWN_TARGET
    if alignment == "legacy":
        assert sequence.target_positions_N.tolist() == [0, 1, 3, 5]
        assert sequence.target_ids_N.tolist() == kept_entries.ids_NK[:, 0].tolist() == [21, 22, 24, 26]
    else:
        assert sequence.target_positions_N.tolist() == list(range(7))
        assert sequence.target_ids_N.tolist() == [21, 22, unknown, 24, unknown, 26, unknown]
        assert kept_entries.ids_NK[:, 0].tolist() == list(range(21, 28))


@pytest.mark.parametrize("column", ["messages", "text"])
def test_without_input_ids_the_chat_or_the_text_is_tokenized(
    column: str, student: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Distributions for the answer only are aligned at the end."""
    chat = [{"role": "user", "content": "a shard"}, {"role": "assistant", "content": "is whole"}]
    text = "<user>a shard</><assistant>is whole</>" if column == "messages" else "a shard is whole"
    ids = tokenizer(text)["input_ids"]
    entries = [[{"token_id": i, "logprob": -0.1}] for i in ids[-3:]]
    write_table(tmp_path / "s" / "data.jsonl", [{column: chat if column == "messages" else text, "lp": entries}])
    cache = imported(tmp_path / "s", student, {"format": Format.axolotl_raw, "logprobs_column": "lp"})
    sequence, kept = sequences(cache)[0]
    assert sequence.input_ids_S.tolist() == ids
    assert sequence.target_positions_N.tolist() == [len(ids) - 4, len(ids) - 3, len(ids) - 2]
    assert kept.ids_NK[:, 0].tolist() == sequence.target_ids_N.tolist() == ids[-3:]


# ------------------------------------------------------------------------------------------- refusals

ROW: dict[str, Any] = {"input_ids": [5, 6, 7], "token_ids": [[6, 9], [7, 9]], "top_values": [[-1.0, -2.0]] * 2}
PREPARED: dict[str, Any] = {
    "input_ids": list(range(20, 40)),
    "attention_mask": [1] * 20,
    "target_token_ids": [[i + 1, i] for i in range(20, 40)],
    "target_logprobs": [[-0.1, -2.3522]] * 20,
    "target_mask": [[1, 1]] * 20,
}
CURRENT = {"format": Format.axolotl_prepared, "alignment": Alignment.current}
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "more than one": (ROW | {"top_values": [[-1.0, -2.0], [-0.1, -0.5]]}, {}, r"row 2: position 1: .*found 1.5114"),
    "an id too high": (ROW | {"token_ids": [[6, 9], [7, 300]]}, {}, r"row 2: kept ids: expected 0 to 299 .*found 300"),
    "a token too high": (ROW | {"input_ids": [5, 6, 300]}, {}, "row 2: input_ids: expected 0 to 299 .*found 300"),
    "an id twice": (ROW | {"token_ids": [[6, 9], [9, 9]]}, {}, "row 2: position 1: expected different ids, found 9 tw"),
    "not a number": (ROW | {"top_values": [[-1.0, float("nan")]] * 2}, {}, "row 2: .*found a NaN"),
    "too few rows": (ROW | {"input_ids": [5, 6, 7, 8]}, {}, "row 2: expected a distribution for each of 4 tokens"),
    "of two shapes": (ROW | {"top_values": [[-1.0], [-2.0]]}, {}, "row 2: .*token_ids and top_values of one shape"),
    "other columns": ({"input_ids": [1]}, {}, r"expected the columns input_ids, compressed_logprobs and bytepacked_in"),
    "legacy columns": (
        {"input_ids": [1], "coeffs": [[0.5]]},
        {},
        "found DistillKit's legacy columns, which may hold",
    ),
    "no configuration": (
        {"input_ids": [1], "compressed_logprobs": [[1]], "bytepacked_indices": [[1]]},
        {},
        "expected compression_config.yaml beside the data, found none",
    ),
    "another alignment": (
        PREPARED,
        CURRENT | {"alignment": Alignment.legacy},
        "found legacy with .* set alignment=cur",
    ),
    "not renormalised": (PREPARED | {"target_logprobs": [[-0.1, -4.0]] * 20}, CURRENT, r"sum to 1, found 0.9232"),
    "a name that is a path": (PREPARED, {"name": "../up"}, "name: expected a name without"),
    "no alignment": (PREPARED, {"format": Format.axolotl_prepared}, "alignment: expected current .* found null"),
    "an alignment too many": (
        ROW,
        {"alignment": Alignment.current},
        "alignment: expected null, because distillkit has",
    ),
    "text for tokens": (
        {"input_ids": [5, 6], "logprobs": [[{"token": "the", "logprob": -1.0}]]},
        {"format": Format.axolotl_raw},
        "row 1: column 'logprobs': .*token .*the.* is text and not",
    ),
    "rows than tokens": (
        {"input_ids": [5], "logprobs": [[-1.0]] * 2, "target_token_ids": [[5]] * 2},
        {"format": Format.axolotl_raw},
        "expected at most one row for each of 1 tokens, found 2",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_row_and_leave_no_folder(name: str, student: Path, tmp_path: Path) -> None:
    row, settings, message = REFUSALS[name]
    good = next((base for base in (ROW, PREPARED) if base.keys() == row.keys()), row)
    write_table(tmp_path / "source" / "data_0.parquet", [good, row])
    with pytest.raises(InputError, match=message):
        imported(tmp_path / "source", student, {"format": Format.distillkit, **settings})
    assert not (tmp_path / "caches").exists()


def test_bytes_of_another_configuration_are_refused(truths: list[Truth], student: Path, tmp_path: Path) -> None:
    settings = distillkit(tmp_path / "source", truths, d=1000)
    with pytest.raises(InputError, match=r"row 1: column 'bytepacked_indices': expected 8 bytes a position, found 7"):
        imported(tmp_path / "source", student, settings)


# ---------------------------------------------------------------------------------------- as a cache


def test_only_missing_shards_are_imported_again(truths: list[Truth], student: Path, tmp_path: Path) -> None:
    settings = distillkit(tmp_path / "source", truths)
    cache = imported(tmp_path / "source", student, settings)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in cache.rglob("*") if path.is_file()}
    assert imported(tmp_path / "source", student, settings) == cache
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    for index in ("00000", "00002"):
        for path in (cache / "shards").glob(f"{index}.*"):
            path.unlink()
    imported(tmp_path / "source", student, settings)
    changed = {path.name for path, (_, written) in before.items() if path.stat().st_mtime_ns != written}
    assert changed == {"00000.parquet", "00000.json", "00002.parquet", "00002.json"}
    assert all(path.read_bytes() == content for path, (content, _) in before.items())


def test_a_cache_is_named_by_the_content_and_the_options_that_read_it(
    truths: list[Truth], student: Path, tmp_path: Path
) -> None:
    settings = distillkit(tmp_path / "source", truths)
    cache = imported(tmp_path / "source", student, settings)
    moved = shutil.copytree(tmp_path / "source", tmp_path / "moved")
    assert imported(moved, student, settings) == cache
    assert imported(moved / "*.parquet", student, settings, caches_dir=str(tmp_path / "caches")) == cache
    assert imported(moved, student, settings, records_per_shard=4) != cache
    (moved / "compression_config.yaml").write_text((moved / "compression_config.yaml").read_text() + "\n")
    assert imported(moved, student, settings) != cache


@pytest.mark.slow
def test_the_script_and_a_training_on_its_cache(truths: list[Truth], student: Path, data: Path, tmp_path: Path) -> None:
    distillkit(tmp_path / "source", truths)
    arguments = ["name=theirs", "source=source", "format=distillkit", f"tokenizer={student}", "records_per_shard=6"]
    done = script("import", *arguments, cwd=tmp_path)
    cache = tmp_path / done.stdout.strip()
    for _, kept in sequences(cache).values():
        log_p_NK, log_tail_N = log_probabilities(kept, temperature=1.0)
        total_N = log_p_NK.double().exp().sum(dim=1) + log_tail_N.double().exp()
        assert torch.allclose(total_N, torch.ones_like(total_N), atol=1e-6)
        with pytest.raises(InputError, match=r"temperature: expected one of the captured \[1.0\], found 2.0"):
            log_probabilities(kept, temperature=2.0)
    options = {"steps": 2, "dev": "null", "test": "null"}
    base = [a for a in train_arguments(student, data, str(cache), **options) if not a.startswith(("dev.", "test."))]
    script("train", *base, cwd=tmp_path)
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(rows) == 2
    assert all(value == value for row in rows for value in row.values() if isinstance(value, float))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["source=nowhere"], "source: expected 'nowhere' to exist, found nothing there"),
        (["source=."], "source: expected files ending in .parquet (each also with .gz, .zst, .xz), found none in '.'"),
        (["source=.", "++format=other"], "other"),
        ([], "  source: folder or glob of the teacher outputs"),
    ],
)
def test_refusals_of_the_script(changes: list[str], message: str, student: Path, tmp_path: Path) -> None:
    chosen = ["name=theirs", "format=distillkit", f"tokenizer={student}"]
    done = script("import", *chosen, *changes, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
