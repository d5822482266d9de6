"""Looking into a cache: verify, summary, replay, show. Nothing here ever writes into one."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.audit.charts import draw_summary
from pipeline.audit.replay import CONTROL_MULTIPLE, Verdict, check_teacher, replay
from pipeline.audit.sampling import Sample, random_samples, samples_of_record
from pipeline.audit.summary import summarize
from pipeline.audit.verify import findings, load_manifest
from pipeline.cache import manifest as manifests
from pipeline.config.schema import AuditConfig, Dtype, ModelConfig
from pipeline.config.validate import check_audit
from pipeline.core.files import one_path, write_json
from pipeline.core.progress import Progress, log, readable, start_logging
from pipeline.core.runtime import compute_device
from pipeline.core.topk import log_probabilities
from pipeline.core.types import UNKNOWN_TARGET, InputError, Manifest
from pipeline.models import loading as models
from pipeline.models.tokenizer import open_tokenizer, tokenizer_hash

BAR = 24  # characters of a full bar
TAIL_TOKENS = 40  # tokens shown of the text read so far


def run(action: str, config: AuditConfig) -> int:
    """Do one action; returns the exit code: 0 all is well, 1 something is wrong with the cache."""
    start_logging()
    check_audit(config)
    if action == "verify":
        return verify(open_cache(config.cache), config)
    if action == "summary":
        return summary(open_cache(config.cache), config)
    if action == "replay":
        return replay_rows(open_cache(config.cache), config)
    if action == "show":
        return show(open_cache(config.cache), config)
    raise InputError(f"action: expected verify, summary, replay or show, found {action!r}")


def open_cache(location: str) -> Path:
    """The folder of a cache, by its name or a glob that matches one."""
    return one_path(location, "cache")


def finished_manifest(cache: Path) -> Manifest:
    """The manifest of a cache whose shards are all committed; InputError for any other."""
    manifest = load_manifest(cache)
    try:
        manifests.committed_shards(cache, manifest)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{cache}: expected readable ShardInfos, found one damaged ({error}); verify it") from None
    return manifest


def verify(cache: Path, config: AuditConfig) -> int:
    """Print every finding; 1 if there is one."""
    wrong = findings(cache, log_every_seconds=config.log_every_seconds)
    for line in wrong:
        print(line)
    if wrong:
        print(f"{cache}: {len(wrong)} finding{'s' * (len(wrong) > 1)}")
        return 1
    manifest = finished_manifest(cache)
    infos = manifests.committed_shards(cache, manifest)
    print(
        f"{cache}: whole and right: {manifest.num_records} records ({manifest.num_skipped} skipped), "
        f"{sum(info.rows for info in infos)} sequences, {sum(info.targets for info in infos)} targets, "
        f"{readable(sum(info.bytes for info in infos))}"
    )
    return 0


# -------------------------------------------------------------------------------------------- summary


def summary(cache: Path, config: AuditConfig) -> int:
    """Print what lies in the cache; write it as JSON and as a picture if asked."""
    figures = summarize(cache, finished_manifest(cache), log_every_seconds=config.log_every_seconds)
    for line in told(figures, cache):
        print(line)
    if config.out is not None:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "summary.json", figures)
        pictures = draw_summary(figures, name=cache.name, out=out)
        log.info("wrote %s", ", ".join(map(str, [out / "summary.json", *pictures])))
    return 0


def bar(fraction: float, *, width: int = BAR) -> str:
    """A bar of eighths of a character, full at 1."""
    eighths = round(min(max(fraction, 0.0), 1.0) * width * 8)
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).rstrip()


def told(figures: dict[str, Any], cache: Path) -> Iterator[str]:
    """The summary in lines for a terminal."""
    draws = f", {figures['draws']} draws" if figures["draws"] else ""
    yield f"{cache}: {figures['kind']}, k {figures['k']}{draws}, temperatures {figures['temperatures']}"
    yield ""
    for name in ("records", "skipped", "shards", "sequences", "segments", "tokens", "targets", "known_targets"):
        yield f"{name.replace('_', ' '):<24}{figures[f'num_{name}'] or 0:>16,}"
    yield f"{'bytes':<24}{figures['bytes']:>16,}  ({readable(figures['bytes'])})"
    yield f"{'bytes a token':<24}{figures['bytes_a_token']:>16,.1f}"
    yield f"{'bytes a target':<24}{figures['bytes_a_target']:>16,.1f}"
    yield f"{'kept entries a target':<24}{figures['kept_entries_a_target']:>16,.1f}"
    if figures["num_known_targets"]:
        yield f"{'perplexity':<24}{figures['perplexity']:>16,.3f}  (exp of minus the next line)"
        yield f"{'mean log-probability':<24}{figures['next_log_prob']:>16.3f}  (of the known targets)"
        yield f"{'top entry is target':<24}{figures['top_is_target_fraction']:>16.1%}  (of the known targets)"
    yield from _quantile_lines(figures)
    mass = figures["retained_mass"]
    yield from _bars("retained mass (fraction of the targets)", _bins(mass["histogram"], high=1.0, form="{:.0%}"))
    entropy = figures["entropy"]
    yield from _bars("entropy, nats", _bins(entropy["histogram"], high=entropy["most"], form="{:.1f}"))
    at_k = [(f"k = {k}", value, f"{value:.1%}") for k, value in mass["mean_at_k"].items()]
    yield from _bars("mean retained mass, read with a smaller k", at_k, most=1.0)
    sizes = [(name, size, f"{size:,}") for name, size in figures["column_bytes"].items()]
    yield from _bars("bytes by column", sizes)


def _quantile_lines(figures: dict[str, Any]) -> Iterator[str]:
    names = list(figures["entropy"]["quantiles"])
    shown = [f"{float(name):.0%}" for name in names]
    yield "\n" + f"{'quantiles':<18}" + "".join(f"{name:>9}" for name in shown)
    for what in ("retained_mass", "entropy", "log_tail"):
        values = figures[what]["quantiles"]
        cells = ("-inf" if values[name] is None else f"{values[name]:.4f}" for name in names)
        yield f"{what.replace('_', ' '):<18}" + "".join(f"{cell:>9}" for cell in cells)


def _bins(counts: list[int], *, high: float, form: str) -> list[tuple[str, float, str]]:
    """Ten lines at most: neighbouring bins together."""
    step = len(counts) // 10
    merged = [sum(counts[i : i + step]) for i in range(0, len(counts), step)]
    total, width = max(sum(merged), 1), high / len(merged)
    names = [f"{form.format(i * width)} to {form.format((i + 1) * width)}" for i in range(len(merged))]
    return [(name, count / total, f"{count / total:.1%}") for name, count in zip(names, merged, strict=True)]


def _bars(title: str, rows: list[tuple[str, float, str]], *, most: float | None = None) -> Iterator[str]:
    yield f"\n{title}"
    full = most or max((value for _, value, _ in rows), default=1.0) or 1.0
    for name, value, shown in rows:
        yield f"  {name:<18} {shown:>14}  {bar(value / full)}".rstrip()


# --------------------------------------------------------------------------------------------- replay


def replay_rows(cache: Path, config: AuditConfig) -> int:
    """Run the teacher again on random sequences; 1 if it does not say what is cached."""
    manifest, teacher_config = finished_manifest(cache), _teacher(config)
    folder, tokenizer = open_tokenizer(teacher_config)
    _check_tokenizer(manifest, tokenizer, folder)
    num_layers = teacher_config.num_layers
    if teacher_config.dtype is Dtype.auto:  # as it captured, whatever this machine would choose
        teacher_config = dataclasses.replace(teacher_config, dtype=Dtype[manifest.made_of["teacher_dtype"]])
    check_teacher(manifest, folder=folder, dtype=teacher_config.dtype.name, num_layers=num_layers)
    samples = random_samples(cache, manifest, rows=config.rows, seed=config.seed)
    teacher = models.open_model(teacher_config, compute_device())
    progress = Progress("replay", total=2 * len(samples), unit=" sequences", log_every_seconds=config.log_every_seconds)
    verdicts = replay(teacher, samples, manifest, batch_sequences=config.batch_sequences, progress=progress)
    progress.close()
    for line in replay_lines(verdicts):
        print(line)
    wrong = [verdict.measure for verdict in verdicts if not verdict.is_right]
    rule = f"tolerance: {CONTROL_MULTIPLE:g} times the control's largest, and the rounding of float16"
    if wrong:
        print(f"{cache}: NOT CONSISTENT in {', '.join(wrong)} ({len(samples)} sequences; {rule}).")
        print("Verify it; if that finds nothing, its values are not this teacher's, or its machine rounds otherwise")
        return 1
    print(f"{cache}: consistent: {len(samples)} sequences replayed ({rule})")
    return 0


def replay_lines(verdicts: list[Verdict]) -> Iterator[str]:
    """A table: cached against fresh, beside it the control."""
    yield f"{'':<15}{'cached against fresh':^24}{'fresh against fresh':^24}"
    yield f"{'difference of':<15}{'largest':>12}{'mean':>12}{'largest':>12}{'mean':>12}{'tolerance':>12}"
    for v in verdicts:
        if v.measure == "top-1":
            continue
        limit = "" if v.tolerance is None else f"{v.tolerance:>12.3g}{'' if v.is_right else '  exceeded'}"
        figures = (v.largest, v.mean, v.control_largest, v.control_mean)
        yield f"{v.measure:<15}" + "".join(f"{figure:>12.3g}" for figure in figures) + limit
    top = next(v for v in verdicts if v.measure == "top-1")
    yield f"the same top entry at {top.mean:.1%} of the positions (control {top.control_mean:.1%})"


def _teacher(config: AuditConfig) -> ModelConfig:
    if config.teacher is None:
        raise InputError("teacher.path: expected the folder of the teacher, found none; give teacher.path=FOLDER")
    return config.teacher


def _check_tokenizer(manifest: Manifest, tokenizer: Any, folder: Path) -> None:
    found, expected = tokenizer_hash(tokenizer), str(manifest.made_of.get("tokenizer"))
    if found != expected:
        raise InputError(
            f"teacher.path: expected the tokenizer {expected[:12]} of the cache, found {found[:12]} in {folder}; "
            "give the folder of its teacher"
        )


# ----------------------------------------------------------------------------------------------- show


def show(cache: Path, config: AuditConfig) -> int:
    """Print positions as text: a random one of random rows, or all of a record."""
    manifest = finished_manifest(cache)
    folder, tokenizer = open_tokenizer(_teacher(config))
    _check_tokenizer(manifest, tokenizer, folder)
    generator = torch.Generator().manual_seed(config.seed)
    if config.record is not None:
        samples = samples_of_record(cache, manifest, config.record)
    else:
        samples = random_samples(cache, manifest, rows=config.rows, seed=config.seed)
    for sample in samples:
        num_targets = len(sample[0].target_positions_N)
        drawn = [int(torch.randint(num_targets, (1,), generator=generator))]
        for n in range(num_targets) if config.record is not None else drawn:
            lines = position_lines(sample, n, tokenizer, top=config.top, record=config.record)
            print("\n".join(lines), end="\n\n" if lines else "")
    return 0


def position_lines(sample: Sample, n: int, tokenizer: Any, *, top: int, record: int | None) -> list[str]:
    """One position: what was read, what follows if it is known, and the teacher's distribution."""
    sequence, captured = sample
    position = int(sequence.target_positions_N[n])
    ends = list(itertools.accumulate(sequence.segment_lengths))
    segment = bisect.bisect_right(ends, position)
    start, record_id = ends[segment] - sequence.segment_lengths[segment], sequence.record_ids[segment]
    if record is not None and record_id != record:
        return []
    first = max(start, position + 1 - TAIL_TOKENS)
    read = tokenizer.decode(sequence.input_ids_S[first : position + 1].tolist())
    target = int(sequence.target_ids_N[n])
    log_p_NK, log_tail_N = log_probabilities(captured.top, temperature=1.0)
    kept = [(int(i), float(p)) for i, p in zip(captured.top.ids_NK[n], log_p_NK[n].exp(), strict=True) if p > 0]
    lines = [f"record {record_id}, position {position - start}: {'…' * (first > start)}{visible(read)}"]
    if target == UNKNOWN_TARGET:
        lines.append("  next: not known")
    else:
        said = float(captured.next_log_prob_N[n].exp())
        lines.append(f"  next: {token_text(tokenizer, target)}  (the teacher gives it {said:.2%})")
    for token, p in kept[:top]:
        mark = "*" if token == target else " "
        lines.append(f"  {mark} {p:>7.2%} {bar(p):<{BAR}} {token_text(tokenizer, token)}")
    rest, tail = sum(p for _, p in kept[top:]), float(log_tail_N[n].exp())
    if kept[top:]:
        lines.append(f"    {rest:>7.2%} {bar(rest):<{BAR}} ({len(kept[top:])} more kept entries)")
    lines.append(f"    {tail:>7.2%} {bar(tail):<{BAR}} (tail)   entropy {float(captured.entropy_N[n]):.3f} nats")
    return lines


def token_text(tokenizer: Any, token: int) -> str:
    """A token as text; one that is only a part of a character says its id."""
    text = tokenizer.decode([token])
    return visible(text) + (f" id {token}" if "\ufffd" in text else "")


def visible(text: str) -> str:
    """Text in quotation marks as a terminal may show it: control and format characters as escapes."""
    shown = (c if c.isprintable() and c not in '"\\' else c.encode("unicode_escape").decode() for c in text)
    return '"' + "".join('\\"' if c == '"' else c for c in shown) + '"'
