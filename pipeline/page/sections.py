"""The upper part of the page: verdict, key numbers, objective, scores, training, calibration, cache, parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.analysis.values import ArmFigures, Interval, StudyFigures, TextFigures, Verdict
from pipeline.page import diagram, numbers
from pipeline.page.chart_parts import Drawing
from pipeline.page.html import Child, Html, escape, join, tag
from pipeline.page.main_arms import main_arms, studied_arm

TONES = {"HEALTHY": "good", "INCONCLUSIVE": "neutral"}
"""Of the badge of a verdict; others ask for a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page; without a body it is left out."""

    id: str
    title: str
    body: Html | None
    lead: Child = None
    """One or two sentences under the title."""


def show(section: Section) -> Html | None:
    """The section with its heading."""
    if section.body is None:
        return None
    lead = None if section.lead is None else tag("p", section.lead, class_="lead")
    return tag("section", tag("h2", section.title), lead, section.body, id=section.id)


def figure(drawing: Drawing, *, is_large: bool = False) -> Html:
    """A drawing with its caption; a phone gets the narrow one."""
    plots = [tag("div", _svg(drawing.wide, drawing.title), class_="plot" if drawing.narrow is None else "plot wide")]
    if drawing.narrow is not None:
        plots.append(tag("div", _svg(drawing.narrow, drawing.title), class_="plot narrow"))
    text = tag("span", drawing.caption) if drawing.caption else None
    caption = tag("figcaption", tag("strong", drawing.title), text)
    return tag("figure", caption, *plots, class_="card large" if is_large else "card", id=drawing.name)


def figures_grid(drawings: Sequence[Drawing]) -> Html | None:
    """Small figures side by side, as many as there is room for."""
    return tag("div", *(figure(drawing) for drawing in drawings), class_="grid") if drawings else None


def _svg(svg: str, title: str) -> Html:
    is_named = svg.startswith("<svg") and 'role="img"' in svg[: svg.index(">")]
    return Html(svg if is_named else svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))


def command(text: str) -> Html:
    """A command line with a button that copies it."""
    copy = tag("button", "Copy", type="button", class_="copy", data_needs_script=True)
    return tag("div", tag("code", text), copy, class_="command")


def verdict_card(verdict: Verdict) -> Html:
    """Badge, headline, cause, action, evidence and the next command."""
    badge = tag("p", verdict.code.replace("_", " "), class_=f"badge {TONES.get(verdict.code, 'change')}")
    note = tag("p", "A heuristic: rules and thresholds are in docs/verdicts.md.", class_="note")
    reasons = tag(
        "div",
        tag("div", tag("h3", "Cause"), tag("p", _tied(verdict.cause))),
        tag("div", tag("h3", "What to do"), tag("p", _tied(verdict.action))),
        class_="columns",
    )
    evidence = (
        tag("ul", *(tag("li", _tied(line)) for line in verdict.evidence), class_="evidence")
        if verdict.evidence
        else None
    )
    next_command = join((tag("h3", "Next"), command(verdict.command))) if verdict.command else None
    shown = (
        badge,
        tag("h2", _tied(verdict.headline)),
        reasons,
        evidence and tag("h3", "Evidence"),
        evidence,
        next_command,
        note,
    )
    return tag("section", *shown, id="verdict", class_=f"verdict {TONES.get(verdict.code, 'change')}")


def _tied(text: str) -> str:
    """The text without a line break between a number and its percent sign."""
    return text.replace(" %", f"{numbers.NO_BREAK}%")


def key_numbers(study: StudyFigures) -> Html | None:
    """The scores of the main arms in a row, then PGR and what the teacher was worth in labels."""
    scale = numbers.SCALES[study.main.metric]
    names = {"teacher": "Teacher, the weak score", "gold_only": "Gold only, the floor", "ceiling": "Ceiling"}
    tiles = [
        _tile(names.get(role, numbers.ROLES[role].capitalize()), figures.score, scale, role)
        for role, figures in main_arms(study.main).items()
        if role != "control"
    ]
    arm = studied_arm(study.main)
    if arm is not None and arm.pgr is not None:
        tiles.append(_tile("Gap recovered (PGR)", arm.pgr, numbers.RATIO, None))
    saving = study.label_saving
    if saving is not None and saving.equivalent is not None:
        tiles.append(_tile("Gold-only labels with that score", saving.equivalent, numbers.COUNT, None))
    return tag("dl", *tiles, class_="tiles") if tiles else None


def _tile(name: str, interval: Interval, scale: numbers.Scale, role: str | None) -> Html:
    """The main result stands out; the line on top has the colour of the role in all charts."""
    value = tag("dd", numbers.score(interval.value, scale), tag("small", numbers.bounds(interval, scale)))
    classes = f"tile {'' if role is None else f'role-{role}'}".strip()
    return tag("div", tag("dt", name), value, class_=classes)


def objective(study: StudyFigures, drawing: Drawing) -> Section:
    """The combined loss with this study's numbers."""
    formula = diagram.formula(study)
    return Section(
        id="objective",
        title="The objective",
        lead="The student learns the teacher's distribution on the corpus and the true labels of the gold set at once.",
        body=tag("div", figure(drawing, is_large=True), tag("p", formula, class_="formula") if formula else None),
    )


def scores(study: StudyFigures, drawings: Sequence[Drawing]) -> Section:
    """Score against KD weight, and paired differences."""
    text = study.main
    seeds = {len(figures.arm.seeds) for figures in text.arms} or {0}
    shown = " to ".join(str(number) for number in sorted({min(seeds), max(seeds)}))
    lead = f"{text.num_records:,} records of the text “{text.name}”; {shown} seeds an arm."
    if seeds == {1}:
        lead = f"{text.num_records:,} records of the text “{text.name}”; one seed, so seed noise is unknown."
    body = tag("div", *(figure(drawing, is_large=True) for drawing in drawings), class_="stack") if drawings else None
    return Section(id="scores", title="Scores", lead=lead, body=body)


def copying(text: TextFigures) -> Section:
    """Cells of teacher right or wrong x student right or wrong, as rates."""
    rows = {role: figures for role, figures in main_arms(text).items() if figures.imitation is not None}
    if not rows:
        return Section(id="copying", title="Copying", body=None)
    first = next(iter(rows.values())).imitation
    assert first is not None
    titles = ("", "Repeats its error", "Corrects it", "Loses its right answer", "Excess imitation", "Agrees")
    head = tag("tr", *(tag("th", title, scope="col") if title else tag("td") for title in titles))
    body = tag("tbody", *(_copying_row(role, figures) for role, figures in rows.items()))
    table = tag("table", tag("thead", head), body, class_="stacked roles")
    scroll = tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="Rates of imitation")
    return Section(
        id="copying",
        title="Is the student copying?",
        lead=f"The teacher is wrong on {first.num_teacher_wrong:,} records and right on {first.num_teacher_right:,}. "
        "Excess imitation is the rate of repeated errors minus that of gold only, which never saw the teacher.",
        body=tag("div", scroll, class_="card table-card"),
    )


def _copying_row(role: str, figures: ArmFigures) -> Html:
    found = figures.imitation
    assert found is not None
    cells = [(found.imitation, False), (found.correction, False), (found.damage, False), (found.excess, True)]
    shown = [_rate(interval, is_difference) for interval, is_difference in [*cells, (found.agreement, False)]]
    return tag("tr", tag("th", _dot(role), numbers.ROLES[role], scope="row"), *shown)


def _rate(interval: Interval | None, is_difference: bool) -> Html:
    if interval is None:
        return tag("td")
    value = numbers.difference(interval.value) if is_difference else numbers.score(interval.value)
    return tag("td", value, " ", tag("small", numbers.bounds(interval, signed=is_difference)))


def _dot(role: str) -> Html:
    return tag("span", class_=f"dot role-{role}", aria_hidden="true")


def slices(text: TextFigures, arm: ArmFigures | None, drawings: Sequence[Drawing]) -> Section:
    """Scores on parts of the records."""
    if arm is None:
        return Section(id="parts", title="Parts of the records", body=None)
    gold = main_arms(text).get("gold_only")
    shown = {(part.by, part.value) for part in arm.slices}
    is_drawn = {
        arm.arm.role: True,
        "teacher": any(part.teacher_score is not None for part in arm.slices),
        "gold_only": gold is not None and any((part.by, part.value) in shown for part in gold.slices),
    }
    roles = [role for role, is_there in is_drawn.items() if is_there]
    names = join((tag("span", _dot(role), numbers.ROLES[role], class_=f"key key-{role}") for role in roles), " ")
    return Section(
        id="parts",
        title="Parts of the records",
        lead=names,
        body=figures_grid(drawings),
    )
