"""The combined loss as a drawing, with a study's numbers on its edges: one layout for a page, one for a phone."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.analysis.values import StudyFigures
from pipeline.core.chart_style import FONT, LIGHT
from pipeline.core.progress import readable
from pipeline.page import numbers
from pipeline.page.html import escape
from pipeline.page.main_arms import first_of, studied_arm

KD, LM, PLAIN = LIGHT["blue"], LIGHT["amber"], LIGHT["muted"]
TITLE_SIZE, LINE_SIZE, LINE_HEIGHT = 14, 12, 16
CHARACTER_WIDTH = 0.54
"""Of a character of average width, as a fraction of its size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle with a title and lines below it; pixels."""

    x: int
    y: int
    width: int
    height: int
    title: str
    lines: tuple[str, ...]
    color: str = PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """An arrow along points, with text at a place."""

    points: tuple[tuple[int, int], ...]
    color: str = PLAIN
    lines: tuple[str, ...] = ()
    at: tuple[int, int] = (0, 0)
    anchor: str = "middle"
    is_dashed: bool = False


def words(study: StudyFigures) -> dict[str, tuple[str, ...]]:
    """The lines of each box and edge; what the study does not know is left out."""
    arm, counts, cache = studied_arm(study.main), study.counts, study.cache
    teacher = first_of(study.main, "teacher")
    settings = arm.arm if arm is not None else None
    scale = numbers.SCALES[study.main.metric]
    num_gold = counts.get("num_gold", settings.num_gold if settings else None)
    gold_fraction = settings.gold_fraction if settings else counts.get("gold_fraction")
    temperature = counts.get("temperature")
    lines = {
        "corpus": (_records(counts.get("num_corpus")), "unlabeled"),
        "gold": (_records(num_gold), "true labels"),
        "teacher": (
            counts.get("teacher"),
            _size(counts.get("teacher_parameters")),
            None if teacher is None else f"scores {numbers.score(teacher.score.value, scale)}",
        ),
        "cache": (
            _of(cache, "num_targets", lambda value: f"{value:,} targets"),
            _of(cache, "k", lambda value: f"top {value:,} logits and tail"),
            _of(cache, "retained_mass", lambda value: f"{numbers.score(_mean(value))} of the mass"),
            _of(cache, "bytes", readable),
        ),
        "student": (
            counts.get("student"),
            _size(counts.get("student_parameters")),
            _of(counts, "num_steps", lambda value: f"{value:,} steps"),
        ),
        "kd": ("KL(teacher ‖ student)", None if temperature is None else f"temperature {numbers.plain(temperature)}"),
        "lm": (f"{numbers.MINUS} log student(label)",),
        "kd_weight": (None if settings is None else f"weight {numbers.plain(settings.kd_weight)}",),
        "lm_weight": (None if settings is None else f"weight {numbers.plain(settings.lm_weight)}",),
        "kd_share": (_share(None if gold_fraction is None else 1 - gold_fraction), "of a batch"),
        "lm_share": (_share(gold_fraction), "of a batch"),
        "loss": ("summed, then one", "gradient step"),
        "score": (None if arm is None else f"{arm.arm.label}: {numbers.score(arm.score.value, scale)}",),
    }
    found = {name: tuple(line for line in texts if line) for name, texts in lines.items()}
    return found | {name: () for name in ("kd_share", "lm_share") if len(found[name]) == 1}


def formula(study: StudyFigures) -> str | None:
    """The loss with this study's weights, other terms too; None without an arm that has any."""
    arm = studied_arm(study.main)
    if arm is None:
        return None
    weights = {"LM": arm.arm.lm_weight, "KD": arm.arm.kd_weight}
    weights |= study.counts.get("more_weights", {})
    parts = [f"{numbers.plain(weight)} · {name}" for name, weight in weights.items() if weight]
    return f"loss = {' + '.join(parts)}" if parts else None


def wide(study: StudyFigures) -> str:
    """From left to right: 988 x 358 pixels."""
    text = words(study)
    boxes = (
        Box(x=2, y=6, width=124, height=112, title="Corpus", lines=text["corpus"], color=KD),
        Box(x=160, y=6, width=176, height=112, title="Teacher (weak)", lines=text["teacher"], color=KD),
        Box(x=370, y=6, width=164, height=112, title="Cache", lines=text["cache"], color=KD),
        Box(x=624, y=6, width=176, height=112, title="KD term", lines=text["kd"], color=KD),
        Box(x=2, y=266, width=124, height=86, title="Gold set", lines=text["gold"], color=LM),
        Box(x=624, y=266, width=176, height=86, title="LM term", lines=text["lm"], color=LM),
        Box(x=370, y=144, width=164, height=96, title="Student (strong)", lines=text["student"], color=LIGHT["text"]),
        Box(x=842, y=144, width=144, height=96, title="Combined loss", lines=text["loss"], color=LIGHT["text"]),
    )
    edges = (
        Edge(points=((126, 62), (160, 62)), color=KD),
        Edge(points=((336, 62), (370, 62)), color=KD),
        Edge(points=((534, 62), (624, 62)), color=KD, lines=text["kd_share"], at=(578, 40)),
        Edge(points=((126, 309), (624, 309)), color=LM, lines=text["lm_share"], at=(452, 287)),
        Edge(points=((534, 168), (672, 168), (672, 118)), lines=("predictions",), at=(598, 160)),
        Edge(points=((534, 216), (672, 216), (672, 266))),
        Edge(points=((800, 62), (914, 62), (914, 144)), color=KD, lines=text["kd_weight"], at=(857, 52)),
        Edge(points=((800, 309), (914, 309), (914, 240)), color=LM, lines=text["lm_weight"], at=(857, 328)),
        Edge(points=((842, 192), (534, 192)), is_dashed=True, lines=("gradient",), at=(770, 184)),
    )
    return _svg(988, 358, boxes, edges, study.name, "wide")


def tall(study: StudyFigures) -> str:
    """From top to bottom, for a phone: 328 x 712 pixels."""
    text = words(study)
    boxes = (
        Box(x=1, y=2, width=158, height=66, title="Corpus", lines=text["corpus"], color=KD),
        Box(x=1, y=96, width=158, height=104, title="Teacher (weak)", lines=text["teacher"], color=KD),
        Box(x=1, y=228, width=158, height=100, title="Cache", lines=text["cache"], color=KD),
        Box(x=1, y=386, width=158, height=72, title="KD term", lines=text["kd"], color=KD),
        Box(x=169, y=228, width=158, height=100, title="Gold set", lines=text["gold"], color=LM),
        Box(x=169, y=386, width=158, height=72, title="LM term", lines=text["lm"], color=LM),
        Box(x=84, y=508, width=160, height=90, title="Student (strong)", lines=text["student"], color=LIGHT["text"]),
        Box(
            x=1,
            y=652,
            width=326,
            height=58,
            title="Combined loss",
            lines=(" ".join(text["loss"]),),
            color=LIGHT["text"],
        ),
    )
    edges = (
        Edge(points=((80, 68), (80, 96)), color=KD),
        Edge(points=((80, 200), (80, 228)), color=KD),
        Edge(points=((42, 328), (42, 386)), color=KD, lines=text["kd_share"], at=(52, 354), anchor="start"),
        Edge(points=((286, 328), (286, 386)), color=LM, lines=text["lm_share"], at=(276, 354), anchor="end"),
        Edge(points=((126, 508), (126, 458))),
        Edge(points=((202, 508), (202, 458)), lines=("predictions",), at=(164, 488)),
        Edge(points=((36, 458), (36, 652)), color=KD, lines=text["kd_weight"], at=(46, 630), anchor="start"),
        Edge(points=((292, 458), (292, 652)), color=LM, lines=text["lm_weight"], at=(282, 630), anchor="end"),
        Edge(points=((164, 652), (164, 598)), is_dashed=True, lines=("gradient",), at=(172, 630), anchor="start"),
    )
    return _svg(328, 712, boxes, edges, study.name, "tall")


def _svg(width: int, height: int, boxes: Sequence[Box], edges: Sequence[Edge], name: str, layout: str) -> str:
    colors = sorted({edge.color for edge in edges})
    arrows = "".join(
        f'<marker id="arrow-{layout}-{i}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,1L9,5L0,9z" fill="{color}"/></marker>'
        for i, color in enumerate(colors)
    )
    drawn = "".join(_edge(edge, f"arrow-{layout}-{colors.index(edge.color)}") for edge in edges)
    drawn += "".join(_box(box) for box in boxes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{escape(f"The combined loss of {name}")}" font-family="{FONT}">'
        f'<defs>{arrows}</defs><rect width="{width}" height="{height}" fill="{LIGHT["surface"]}"/>{drawn}</svg>'
    )


def _box(box: Box) -> str:
    fits = int((box.width - 14) / (LINE_SIZE * CHARACTER_WIDTH))
    lines = [part for line in box.lines for part in _wrap(line, fits)]
    top = box.y + (box.height - TITLE_SIZE - LINE_HEIGHT * len(lines)) / 2 + TITLE_SIZE - 1
    drawn = [_text(box.title, box.x + box.width / 2, top, box.color, size=TITLE_SIZE)]
    drawn += [
        _text(line, box.x + box.width / 2, top + LINE_HEIGHT * (i + 1) + 1, LIGHT["muted"])
        for i, line in enumerate(lines)
    ]
    return (
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="9" fill="{LIGHT["panel"]}" '
        f'stroke="{box.color}" stroke-width="1.3"/>{"".join(drawn)}'
    )


def _wrap(line: str, fits: int) -> list[str]:
    """At most two lines of at most `fits` characters; what is left of a longer text is an ellipsis."""
    return textwrap.wrap(line, fits, max_lines=2, placeholder=" …")


def _edge(edge: Edge, arrow: str) -> str:
    path = "L".join(f"{x},{y}" for x, y in edge.points)
    dash = ' stroke-dasharray="5 4"' if edge.is_dashed else ""
    line = f'<path d="M{path}" fill="none" stroke="{edge.color}" stroke-width="1.6"{dash} marker-end="url(#{arrow})"/>'
    x, y = edge.at
    lines = "".join(
        _text(line, x, y + 13 * i, edge.color, anchor=edge.anchor, size=LINE_SIZE) for i, line in enumerate(edge.lines)
    )
    return line + lines


def _text(text: str, x: float, y: float, color: str, *, anchor: str = "middle", size: int = LINE_SIZE) -> str:
    weight = ' font-weight="600"' if size == TITLE_SIZE else ""
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{color}"{weight}>{escape(text)}</text>'


def _of(values: Mapping[str, Any], key: str, shown: Any) -> str | None:
    return None if values.get(key) is None else str(shown(values[key]))


def _mean(mass: Any) -> float:
    return float(mass["mean"] if isinstance(mass, Mapping) else mass)


def _records(number: float | None) -> str | None:
    return None if number is None else f"{numbers.count(number)} records"


def _size(number: float | None) -> str | None:
    return None if number is None else f"{numbers.parameters(number)} parameters"


def _share(fraction: float | None) -> str | None:
    return None if fraction is None else f"{numbers.plain(round(100 * fraction, 2))}{numbers.NO_BREAK}%"
