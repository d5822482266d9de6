"""report.html: one file that fetches nothing, and its figures beside it as SVG and PNG."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from pipeline.analysis.values import StudyFigures, Verdict
from pipeline.core.chart_style import DARK, LIGHT
from pipeline.core.files import write_atomically
from pipeline.page import curve_charts, diagram, more_sections, record_charts, score_charts, sections
from pipeline.page.arm_table import arm_table
from pipeline.page.chart_parts import COLORS, Drawing, to_png
from pipeline.page.html import Html, join, tag
from pipeline.page.main_arms import studied_arm
from pipeline.page.sections import Section

ASSETS = Path(__file__).parent / "assets"


def write_page(figures: StudyFigures, verdict: Verdict, out: Path) -> list[Path]:
    """Write OUT/report.html and OUT/figures/NAME.svg and NAME.png; all files that were written."""
    groups = draw(figures)
    page = page_html(figures, verdict, groups)
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    written = [out / "report.html"]
    write_atomically(written[0], page)
    for drawing in (drawing for group in groups.values() for drawing in group):
        files = [folder / f"{drawing.name}.svg", folder / f"{drawing.name}.png"]
        write_atomically(files[0], drawing.wide)
        files[1].write_bytes(to_png(drawing.wide))
        written += files
    return written


def draw(study: StudyFigures) -> dict[str, list[Drawing]]:
    """All figures of a study, by the section in which they stand."""
    text, arm = study.main, studied_arm(study.main)
    against = score_charts.against_kd_weight(text)
    gained = None if arm is None else score_charts.differences(arm, text.metric)
    saving, cache = study.label_saving, study.cache
    histogram = cache.get("histogram")
    mass = cache.get("retained_mass")
    return {
        "objective": [
            Drawing(
                name="combined-loss",
                title="The combined loss",
                caption="Numbers are this study's; a dashed line is the gradient.",
                wide=diagram.wide(study),
                narrow=diagram.tall(study),
            )
        ],
        "scores": [drawing for drawing in (against, gained) if drawing is not None],
        "training": curve_charts.curves(study.training, text),
        "calibration": record_charts.calibration(text),
        "cache": [record_charts.retained_mass(histogram, mass, cache.get("k"))] if histogram else [],
        "parts": [] if arm is None else record_charts.slices(text, arm),
        "labels": [] if saving is None or not saving.sizes else [score_charts.label_saving(saving, arm, text.metric)],
    }


def page_html(study: StudyFigures, verdict: Verdict, groups: dict[str, list[Drawing]]) -> str:
    """The whole page."""
    parts = _sections(study, groups)
    shown = [part for part in parts if part.body is not None]
    links = [tag("li", tag("a", part.title, href=f"#{part.id}")) for part in shown]
    head = tag(
        "header",
        tag("p", "Weak-to-strong study", class_="overline"),
        tag("h1", study.name),
        tag("nav", tag("ul", *links), aria_label="Sections"),
    )
    foot = tag(
        "footer",
        more_sections.not_measured(study),
        tag("p", "Each figure is also a file: figures/NAME.svg and NAME.png beside this page."),
    )
    main = tag("main", sections.verdict_card(verdict), sections.key_numbers(study), *map(sections.show, shown))
    tooltip = tag("div", id="tooltip", role="tooltip", hidden=True)
    return _document(study.name, join((tag("div", head, main, foot, class_="page"), tooltip)))


def _sections(study: StudyFigures, groups: dict[str, list[Drawing]]) -> list[Section]:
    text, arm = study.main, studied_arm(study.main)
    label_drawing = next(iter(groups["labels"]), None)
    return [
        sections.objective(study, groups["objective"][0]),
        sections.scores(study, groups["scores"]),
        Section(
            id="training",
            title="Training",
            lead="Means over the seeds, of the main arm of each role.",
            body=sections.figures_grid(groups["training"]),
        ),
        sections.copying(text),
        Section(
            id="calibration",
            title="Calibration",
            lead="On the dashed line, a model is right as often as its confidence promises. "
            "Each point stands for as many records as the others.",
            body=sections.figures_grid(groups["calibration"]),
        ),
        more_sections.cache(study, groups["cache"]),
        sections.slices(text, arm, groups["parts"]),
        Section(
            id="table",
            title="All arms",
            lead="An arm is one setting with all its seeds. Brackets are 95 % intervals; differences are paired.",
            body=arm_table(text) if text.arms else None,
        ),
        more_sections.texts(study),
        more_sections.label_saving(study, label_drawing),
        more_sections.examples(study.examples),
        more_sections.provenance(study),
    ]


def _document(title: str, body: Html) -> str:
    """The page may run the script and the style that stand in it, and fetch nothing: its security policy forbids it."""
    css, script = _palette() + (ASSETS / "page.css").read_text(), (ASSETS / "page.js").read_text()
    policy = f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(script)}; img-src data:; base-uri 'none'"
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title}: weak-to-strong study"),
        tag("link", rel="icon", href="data:,"),
        Html(f"<style>{css}</style>"),
    )
    page = tag("html", tag("head", *head), tag("body", body, Html(f"<script>{script}</script>")), lang="en")
    return f"<!doctype html>\n{page.text}\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _palette() -> str:
    """Colours as CSS variables for both schemes, paper always light; and which variable each colour of a chart is."""
    light, dark = (_variables(palette) for palette in (LIGHT, DARK))
    lines = [
        f":root{{{light}}}",
        f"@media (prefers-color-scheme: dark){{:root{{{dark}}}}}",
        f"@media print{{:root{{{light}}}}}",
    ]
    for name, color in LIGHT.items():
        for attribute in ("fill", "stroke"):
            lines.append(f'svg [{attribute}="{color}"]{{{attribute}:var(--{name})}}')
    names = {color: name for name, color in LIGHT.items()}
    lines += [f".role-{role}{{--role:var(--{names[color]})}}" for role, color in COLORS.items()]
    return "\n".join(lines) + "\n"


def _variables(palette: dict[str, str]) -> str:
    return ";".join(f"--{name}:{color}" for name, color in palette.items())
