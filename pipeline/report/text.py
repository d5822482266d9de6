"""The figures of a study as lines for a terminal of 80 columns, and as Markdown for a pull request."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from pipeline.analysis.values import StudyFigures, TextFigures, Verdict
from pipeline.core.progress import readable_duration
from pipeline.data.shown import visible
from pipeline.report.cells import MAIN, Column, Paired, columns, conclusions, paired_differences, row_names

WIDTH = 80
GAP = "  "
MAX_NAME = 28  # characters of a row's name in the terminal; a longer one loses its middle
METRICS = {"accuracy": "accuracy", "exact_match": "exact match", "-nll": "perplexity a target; differences in nats"}


def terminal(study: StudyFigures, verdict: Verdict) -> Iterator[str]:
    """All lines: the verdict, the table of arms, conclusions, further texts; none is wider than 80 characters.

    Only a word that is longer than a line, such as a path, is not broken.
    """
    yield from verdict_lines(verdict)
    for text in (study.main, *study.more):
        yield ""
        yield from wrapped(heading(text))
        yield from table_lines(columns(text, is_wide=False))
        for paired in paired_differences(text):
            yield from ("", *paired_lines(paired))
        for number, line in enumerate(conclusions(text, study.label_saving if text is study.main else None)):
            yield from ("",) * (number == 0)
            yield from wrapped(line)
    if study.provenance:
        yield ""
        yield from wrapped(effort(study))


def verdict_lines(verdict: Verdict) -> Iterator[str]:
    """The verdict, its evidence, and the command to run next."""
    yield from wrapped(f"{verdict.code} (heuristic)  {verdict.headline}")
    for name, sentence in (("cause", verdict.cause), ("action", verdict.action)):
        yield from wrapped(f"{name:<8}{sentence}", indent=8)
    for number, sentence in enumerate(verdict.evidence):
        yield from wrapped(f"{'' if number else 'because':<8}{sentence}", indent=8)
    yield "next:"
    yield from command_lines(verdict.command)


def command_lines(command: str) -> Iterator[str]:
    """A command over several lines that can be pasted: broken between its words, with a backslash."""
    words, line = re.findall(r"(?:[^\s'\"]|'[^']*'|\"[^\"]*\")+", command), "  "
    for number, word in enumerate(words):
        is_first = line.strip() == ""
        if not is_first and len(line) + 1 + len(word) + 2 * (number < len(words) - 1) > WIDTH:
            yield f"{line} \\"
            line, is_first = "    ", True
        line += word if is_first else f" {word}"
    yield line


def paired_lines(paired: Paired) -> Iterator[str]:
    """The paired differences of an arm, aligned, below what they share."""
    yield f"({paired.about})"
    widths = [max(map(len, parts)) for parts in zip(*paired.rows, strict=True)]
    for row in paired.rows:
        yield from wrapped(GAP.join(part.ljust(width) for part, width in zip(row, widths, strict=True)).rstrip())


def heading(text: TextFigures) -> str:
    """What a table is about."""
    where = "further text, out of domain" if text.is_out_of_domain else "text"
    counts = {len(figures.arm.seeds) for figures in text.arms}
    common = counts.pop() if len(counts) == 1 else None
    shared = "" if common is None else f", {common} seed{'s' * (common > 1)} an arm"
    is_marked = any(name.endswith(MAIN) for name in row_names(text.arms))
    marked = f";{MAIN} conclusions rest on it" * is_marked
    return f"{where} {text.name}: {text.num_records:,} records, {METRICS[text.metric]}{shared}; 95 % intervals{marked}"


def effort(study: StudyFigures) -> str:
    """How many runs there are and how long they took."""
    seconds = study.provenance.get("seconds")
    runs = study.provenance.get("num_runs")
    return ", ".join(
        ([] if runs is None else [f"{runs} run{'s' * (runs != 1)}"])
        + ([] if seconds is None else [f"{readable_duration(seconds)} of training"])
    )


def wrapped(line: str, *, indent: int = 4) -> list[str]:
    """A sentence in lines of at most 80 characters; double spaces between its parts stay."""
    return textwrap.wrap(
        one_line(line),
        WIDTH,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


# ------------------------------------------------------------------------------------------- tables


def table_lines(found: Sequence[Column]) -> Iterator[str]:
    """The table, in several blocks where it is wider than 80 characters; each begins with the names of the rows."""
    cut = (tuple(_cut(one_line(cell)) for cell in column.cells) for column in found)
    names, *others = [Column(head=c.head, cells=cells, is_text=c.is_text) for c, cells in zip(found, cut, strict=True)]
    if _width([names, *others]) > WIDTH:  # rows are numbered, because names alone may be equal
        width = len(str(len(names.cells)))
        numbers = tuple(f"{number:>{width}} {name}" for number, name in enumerate(names.cells, 1))
        names = Column(head=names.head, cells=numbers, is_text=True)
    block = [names]
    for column in others:
        if len(block) > 1 and _width([*block, column]) > WIDTH:
            yield from _block_lines(block)
            yield ""
            block = [names]
        block.append(column)
    yield from _block_lines(block)


def one_line(text: str) -> str:
    """Text that moves no cursor and hides nothing: white space as spaces, other control characters escaped."""
    return visible(re.sub(r"\s", " ", text))


def _cut(cell: str) -> str:
    half = (MAX_NAME - 2) // 2
    return cell if len(cell) <= MAX_NAME else f"{cell[:half]}..{cell[-half:]}"


def _widths(block: Sequence[Column]) -> list[int]:
    return [max(len(column.head), *map(len, column.cells)) for column in block]


def _width(block: Sequence[Column]) -> int:
    return sum(_widths(block)) + len(GAP) * (len(block) - 1)


def _block_lines(block: Sequence[Column]) -> Iterator[str]:
    widths = _widths(block)
    for row in zip(*((column.head, *column.cells) for column in block), strict=True):
        cells = zip(row, widths, block, strict=True)
        yield GAP.join(cell.ljust(n) if column.is_text else cell.rjust(n) for cell, n, column in cells).rstrip()


# ----------------------------------------------------------------------------------------- Markdown


def markdown(study: StudyFigures, verdict: Verdict) -> str:
    """report.md: verdict, tables, conclusions, label saving, examples, provenance."""
    lines = [f"# {_escaped(study.name)}: {verdict.code}", "", f"**{_escaped(verdict.headline)}**", ""]
    lines += [f"- Cause: {_escaped(verdict.cause)}", f"- Action: {_escaped(verdict.action)}"]
    lines += [f"- Because: {_escaped(sentence)}" for sentence in verdict.evidence]
    lines += ["- The verdict is a heuristic.", "", "Next:", "", "```bash", verdict.command, "```"]
    for text in (study.main, *study.more):
        lines += ["", f"## {_escaped(heading(text))}", "", *_markdown_table(columns(text, is_wide=True)), ""]
        for paired in paired_differences(text):
            lines += [f"- {' '.join(row[:2])} ({paired.about}; {row[2]})" for row in paired.rows]
        saving = study.label_saving if text is study.main else None
        lines += [f"- {_escaped(re.sub('  +', ' ', line))}" for line in conclusions(text, saving)]
    if study.label_saving is not None:
        sizes = zip(study.label_saving.sizes, study.label_saving.scores, strict=True)
        rows = [f"| {size:,} | {score.value:.4f} |" for size, score in sizes]
        lines += ["", "## Gold records and the score of gold_only", "", "| records | score |", "|---:|---:|", *rows]
    lines += _example_lines(study)
    lines += _provenance_lines(study)
    return "\n".join(lines) + "\n"


def _markdown_table(found: Sequence[Column]) -> Iterator[str]:
    yield f"| {' | '.join(_escaped(column.head) for column in found)} |"
    yield f"|{'|'.join('---' if column.is_text else '---:' for column in found)}|"
    for row in zip(*(column.cells for column in found), strict=True):
        yield f"| {' | '.join(map(_escaped, row))} |"


def _example_lines(study: StudyFigures) -> Iterator[str]:
    if not study.examples:
        return
    yield from ("", "<details><summary>Examples</summary>", "")
    for example in study.examples:
        prompt = _escaped(" ".join(example.prompt.split()))
        answers = ", ".join(f"{role}: {_escaped(answer)}" for role, answer in example.answers.items())
        yield f"- {example.kind}: {prompt} (truth: {_escaped(example.truth)}; {answers})"
    yield from ("", "</details>")


def _provenance_lines(study: StudyFigures) -> Iterator[str]:
    found = study.provenance
    if not found:
        return
    yield from ("", "<details><summary>Provenance</summary>", "")
    yield from (f"- `{command}`" for command in found.get("commands", ()))
    for name in ("versions", "hashes"):
        listed = ", ".join(f"{what} {value}" for what, value in found.get(name, {}).items())
        yield from [f"- {name}: {_escaped(listed)}"] if listed else []
    yield from [f"- hardware: {_escaped(found['hardware'])}"] if found.get("hardware") else []
    yield from (f"- {effort(study)}", "", "</details>")


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line and in a cell of a table; letters_and_digits need no escape."""
    return re.sub(r"([\\`*|<>]|(?<!\w)_|_(?!\w)|\](?=[(\[:]))", r"\\\1", one_line(text))
