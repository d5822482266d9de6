"""The results of summary, replay and show as lines for a terminal."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from typing import Any

from pipeline.audit.replay import MeasureResult
from pipeline.audit.sampling import Sample
from pipeline.core.object_store import Location
from pipeline.core.progress import readable
from pipeline.core.topk import log_probabilities
from pipeline.core.types import UNKNOWN_TARGET, Captured

BAR_WIDTH = 24  # characters of a full bar
CONTEXT_TOKENS = 40  # tokens shown before a position


def bar(fraction: float, *, width: int = BAR_WIDTH) -> str:
    """A bar of `width` characters at 1, empty at 0, in steps of an eighth of a character."""
    # 0.3 of 10 characters are 24 eighths, 3 full characters; 0.33 are 26 eighths, 3 full ones and one of 2 eighths
    eighths = round(min(max(fraction, 0.0), 1.0) * width * 8)
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).rstrip()


def summary_lines(figures: dict[str, Any], cache: Location) -> Iterator[str]:
    """The summary as lines for a terminal."""
    draws = f", {figures['draws']} draws" if figures["draws"] else ""
    yield f"{cache}: {figures['kind']}, k {figures['k']}{draws}, temperatures {figures['temperatures']}"
    yield ""
    for name in ("records", "skipped", "shards", "sequences", "segments", "tokens", "targets", "known_targets"):
        yield f"{name.replace('_', ' '):<24}{figures[f'num_{name}'] or 0:>16,}"
    yield f"{'bytes':<24}{figures['bytes']:>16,}  ({readable(figures['bytes'])})"
    yield f"{'bytes per token':<24}{figures['bytes_a_token']:>16,.1f}"
    yield f"{'bytes per target':<24}{figures['bytes_a_target']:>16,.1f}"
    yield f"{'kept entries per target':<24}{figures['kept_entries_a_target']:>16,.1f}"
    if figures["num_known_targets"]:
        yield f"{'perplexity':<24}{figures['perplexity']:>16,.3f}  (exp of the negative mean log-probability)"
        yield f"{'mean log-probability':<24}{figures['next_log_prob']:>16.3f}  (of the known targets)"
        yield f"{'top entry is target':<24}{figures['top_is_target_fraction']:>16.1%}  (of the known targets)"
    yield from _quantile_lines(figures)
    mass = figures["retained_mass"]
    yield from _bars(
        "retained mass (fraction of the targets)", _bins(mass["histogram"], high=1.0, number_format="{:.0%}")
    )
    entropy = figures["entropy"]
    yield from _bars("entropy, nats", _bins(entropy["histogram"], high=entropy["most"], number_format="{:.1f}"))
    surest = [
        (f"surest {float(kept):.0%}", share, f"{share:.1%}")
        for kept, share in figures["top_is_target_of_surest"].items()
    ]
    if surest:
        yield from _bars("top entry is target, of the known targets where it is most probable", surest, full=1.0)
    at_k = [(f"k = {k}", value, f"{value:.1%}") for k, value in mass["mean_at_k"].items()]
    yield from _bars("mean retained mass at a smaller k", at_k, full=1.0)
    sizes = [(name, size, f"{size:,}") for name, size in figures["column_bytes"].items()]
    yield from _bars("bytes by column", sizes)


def _quantile_lines(figures: dict[str, Any]) -> Iterator[str]:
    fractions = list(figures["entropy"]["quantiles"])
    percents = [f"{float(fraction):.0%}" for fraction in fractions]
    yield "\n" + f"{'quantiles':<18}" + "".join(f"{percent:>9}" for percent in percents)
    for name in ("retained_mass", "entropy", "log_tail"):
        quantiles = figures[name]["quantiles"]
        cells = ["-inf" if quantiles[fraction] is None else f"{quantiles[fraction]:.4f}" for fraction in fractions]
        yield f"{name.replace('_', ' '):<18}" + "".join(f"{cell:>9}" for cell in cells)


def _bins(counts: list[int], *, high: float, number_format: str) -> list[tuple[str, float, str]]:
    """Ten rows for `_bars` from a histogram from 0 to `high` with a multiple of ten bins: neighbours are added up."""
    step = len(counts) // 10
    merged = [sum(counts[i : i + step]) for i in range(0, len(counts), step)]
    total, width = max(sum(merged), 1), high / len(merged)
    rows = []
    for i, count in enumerate(merged):
        name = f"{number_format.format(i * width)} to {number_format.format((i + 1) * width)}"
        rows.append((name, count / total, f"{count / total:.1%}"))
    return rows


def _bars(title: str, rows: list[tuple[str, float, str]], *, full: float | None = None) -> Iterator[str]:
    """A title and one bar for each row (name, value, value as text); `full` is a full bar, None: the largest value."""
    yield f"\n{title}"
    if full is None:
        full = max((value for _, value, _ in rows), default=0.0)
    for name, value, text in rows:
        yield f"  {name:<18} {text:>14}  {bar(value / full if full else 0.0)}".rstrip()


# -------------------------------------------------------------------------------------------------------------- replay


def replay_lines(results: list[MeasureResult]) -> Iterator[str]:
    """A table: differences of cached and recomputed values, beside them the control."""
    yield f"{'':<15}{'cached - recomputed':^24}{'recomputed twice':^24}"
    yield f"{'difference of':<15}{'largest':>12}{'mean':>12}{'largest':>12}{'mean':>12}{'tolerance':>12}"
    for result in results:
        if result.measure == "top-1":
            continue
        numbers = (result.largest, result.mean, result.control_largest, result.control_mean)
        line = f"{result.measure:<15}" + "".join(f"{number:>12.3g}" for number in numbers)
        if result.tolerance is not None:
            line += f"{result.tolerance:>12.3g}"
        yield line if result.is_within_tolerance else f"{line}  exceeded"
    top = next(result for result in results if result.measure == "top-1")
    yield f"same top entry at {top.mean:.1%} of the positions (control {top.control_mean:.1%})"


# ---------------------------------------------------------------------------------------------------------------- show


def position_lines(sample: Sample, n: int, tokenizer: Any, *, top: int, record: int | None) -> list[str]:
    """The n-th target position as lines: the text before it, the known target, and the teacher's distribution.

    Empty if `record` is given and the position belongs to another record.
    """
    sequence, captured = sample
    position, target = int(sequence.target_positions_N[n]), int(sequence.target_ids_N[n])
    # segments of 3 and 2 tokens end at 3 and 5: position 3 is in segment 1, which starts at 5 - 2 = 3
    ends = list(itertools.accumulate(sequence.segment_lengths))
    segment = bisect.bisect_right(ends, position)
    start, record_id = ends[segment] - sequence.segment_lengths[segment], sequence.record_ids[segment]
    if record is not None and record_id != record:
        return []
    first = max(start, position + 1 - CONTEXT_TOKENS)
    text = visible(tokenizer.decode(sequence.input_ids_S[first : position + 1].tolist()))
    lines = [f"record {record_id}, position {position - start}: {'…' if first > start else ''}{text}"]
    if target == UNKNOWN_TARGET:
        lines.append("  next: not known")
    else:
        target_p = float(captured.next_log_prob_N[n].exp())
        lines.append(f"  next: {token_text(tokenizer, target)}  (the teacher's probability {target_p:.2%})")
    if depth := int(sequence.depths_or_zeros()[n]):
        lines.append(
            f"  in a choice: {depth} of its tokens read  (probability {float(captured.weights_or_ones()[n]):.2%})"
        )
    return lines + _distribution_lines(captured, n, tokenizer, top=top, target=target)


def _distribution_lines(captured: Captured, n: int, tokenizer: Any, *, top: int, target: int) -> list[str]:
    """One line for each of the `top` entries (the target marked by *), one for the other entries, one for the tail."""
    log_p_NK, log_tail_N = log_probabilities(captured.top, temperature=1.0)
    entries = [(int(i), float(p)) for i, p in zip(captured.top.ids_NK[n], log_p_NK[n].exp(), strict=True) if p > 0]
    lines = []
    for token, p in entries[:top]:
        mark = "*" if token == target else " "
        lines.append(f"  {mark} {p:>7.2%} {bar(p):<{BAR_WIDTH}} {token_text(tokenizer, token)}")
    others_p, tail_p = sum(p for _, p in entries[top:]), float(log_tail_N[n].exp())
    if entries[top:]:
        lines.append(f"    {others_p:>7.2%} {bar(others_p):<{BAR_WIDTH}} ({len(entries[top:])} more kept entries)")
    lines.append(
        f"    {tail_p:>7.2%} {bar(tail_p):<{BAR_WIDTH}} (tail)   entropy {float(captured.entropy_N[n]):.3f} nats"
    )
    return lines


def token_text(tokenizer: Any, token: int) -> str:
    """A token as text, followed by its id if it is only a part of a character."""
    text = tokenizer.decode([token])
    return f"{visible(text)} id {token}" if "\ufffd" in text else visible(text)


def visible(text: str) -> str:
    """Text in quotation marks, safe for a terminal: control and format characters are escaped."""
    return '"' + "".join(_visible_character(character) for character in text) + '"'


def _visible_character(character: str) -> str:
    if character == '"':
        return '\\"'
    if character.isprintable() and character != "\\":
        return character
    return character.encode("unicode_escape").decode()
