"""The lower part of the page: further texts, label saving, examples, provenance, and what was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.analysis.values import Example, StudyFigures, TextFigures
from pipeline.core.progress import readable
from pipeline.page import numbers
from pipeline.page.chart_parts import Drawing
from pipeline.page.html import Html, join, tag
from pipeline.page.main_arms import main_arms, studied_arm
from pipeline.page.sections import Section, command, figure

MAX_EXAMPLES, MAX_CHARACTERS = 6, 1200
"""Of each kind; of a prompt."""
KINDS = {
    "copied": ("Copied", "the teacher's error, repeated"),
    "corrected": ("Corrected", "the teacher's error, put right"),
    "damaged": ("Damaged", "the teacher's right answer, lost"),
}


def cache(study: StudyFigures, drawings: Sequence[Drawing]) -> Section:
    """The retained mass, and the size of what was captured."""
    sizes = {
        "num_sequences": "sequences",
        "num_targets": "targets",
        "k": "kept entries of a target",
        "bytes": "size",
    }
    facts = [(sizes[key], _value(key, study.cache[key])) for key in sizes if study.cache.get(key) is not None]
    shown = (
        tag("dl", *(join((tag("dt", name), tag("dd", value))) for name, value in facts), class_="facts")
        if facts
        else None
    )
    body = tag("div", *map(figure, drawings), shown, class_="beside") if drawings else None
    return Section(id="cache", title="The teacher's cache", body=body)


def texts(study: StudyFigures) -> Section:
    """Main arms on every held-out text, side by side."""
    if not study.more:
        return Section(id="texts", title="Further texts", body=None)
    all_texts = (study.main, *study.more)
    roles = [role for role in numbers.ROLES if any(role in main_arms(text) for text in all_texts)]
    head = tag("tr", tag("th", "Text", scope="col"), *(tag("th", numbers.ROLES[role], scope="col") for role in roles))
    rows = [_text_row(text, roles) for text in all_texts]
    scroll = tag(
        "div",
        tag("table", tag("thead", head), tag("tbody", *rows), class_="stacked"),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label="Scores on further texts",
    )
    return Section(
        id="texts",
        title="Further texts",
        lead="The same arms on other held-out texts. The verdict rests on the first alone.",
        body=tag("div", scroll, class_="card table-card"),
    )


def _text_row(text: TextFigures, roles: Sequence[str]) -> Html:
    arms, scale = main_arms(text), numbers.SCALES[text.metric]
    mark = tag("span", "out of domain", class_="mark") if text.is_out_of_domain else None
    cells = []
    for role in roles:
        score = arms[role].score if role in arms else None
        shown = (
            None
            if score is None
            else join((numbers.score(score.value, scale), " ", _small(numbers.bounds(score, scale))))
        )
        cells.append(tag("td", shown))
    name = tag("th", text.name, " ", mark, " ", _small(f"{text.num_records:,} records"), scope="row")
    return tag("tr", name, *cells)


def _small(text: str) -> Html:
    return tag("small", text)


def label_saving(study: StudyFigures, drawing: Drawing | None) -> Section:
    """How many gold labels the teacher was worth."""
    saving = study.label_saving
    if saving is None or drawing is None:
        return Section(id="labels", title="Label saving", body=None)
    if saving.equivalent is None:
        lead = f"{saving.note[:1].upper()}{saving.note[1:]}."
    else:
        value = numbers.score(saving.equivalent.value, numbers.COUNT)
        shown = f"{value} {numbers.bounds(saving.equivalent, numbers.COUNT)}".strip()
        lead = f"{saving.num_gold:,} gold records and the teacher are worth {shown} gold records without it."
    return Section(id="labels", title="Label saving", lead=lead, body=figure(drawing, is_large=True))


def examples(found: Sequence[Example]) -> Section:
    """Records as text, with the answers of several models."""
    groups = []
    for kind in dict.fromkeys([*KINDS, *(example.kind for example in found)]):
        cards = [_example(example) for example in found if example.kind == kind]
        if cards:
            title, meaning = KINDS.get(kind, (kind.capitalize(), ""))
            more = f"{MAX_EXAMPLES} of {len(cards)} shown" if len(cards) > MAX_EXAMPLES else ""
            heading = tag("h3", title, " ", _small("; ".join(part for part in (meaning, more) if part)))
            groups.append(tag("div", heading, tag("div", *cards[:MAX_EXAMPLES], class_="grid"), class_=f"kind {kind}"))
    return Section(id="examples", title="Examples", body=tag("div", *groups) if groups else None)


def _example(example: Example) -> Html:
    prompt, rest = example.prompt[:MAX_CHARACTERS], len(example.prompt) - MAX_CHARACTERS
    more = tag("em", f" … {rest:,} more characters") if rest > 0 else None
    order = [role for role in numbers.ROLES if role in example.answers]
    order += [role for role in example.answers if role not in order]
    answers = [_answer(numbers.ROLES.get(role, role), example.answers[role], example.truth) for role in order]
    truth = (tag("dt", "true answer"), tag("dd", example.truth))
    return tag("article", tag("p", prompt, more, class_="prompt"), tag("dl", *truth, *answers), class_="card example")


def _answer(name: str, answer: str, truth: str) -> Html:
    is_right = answer.strip() == truth.strip()
    mark = tag("span", "right" if is_right else "wrong", class_="hidden")
    sign = tag("span", "✓" if is_right else "✗", aria_hidden="true", class_="sign")
    return join((tag("dt", name), tag("dd", sign, mark, " ", answer, class_="right" if is_right else "wrong")))


def provenance(study: StudyFigures) -> Section:
    """Commands, versions, hashes, hardware, time: what one needs to repeat the study."""
    entries = [(key, value) for key, value in study.provenance.items() if value not in (None, "", [], {})]
    rows = [join((tag("dt", _name(key)), tag("dd", _value(key, value)))) for key, value in entries]
    body = tag("div", tag("dl", *rows, class_="facts"), class_="card") if rows else None
    return Section(id="provenance", title="Provenance", body=body)


def _name(key: str) -> str:
    return "time" if key == "seconds" else key.removesuffix("_seconds").removesuffix("_bytes").replace("_", " ")


def _value(key: str, value: Any) -> Html:
    """A value of any shape: nested mappings as lists, commands to be copied, durations and sizes in words."""
    if key in ("command", "commands"):
        lines = [value] if isinstance(value, str) else list(value)
        return join([command(str(line)) for line in lines])
    if isinstance(value, Mapping):
        pairs = [join((tag("dt", _name(str(k))), tag("dd", _value(str(k), v)))) for k, v in value.items()]
        return tag("dl", *pairs, class_="facts inner")
    if isinstance(value, (list, tuple)):
        return tag("ul", *(tag("li", _value(key, item)) for item in value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if key.endswith("seconds"):
            return tag("span", numbers.duration(float(value)))
        return tag("span", readable(value) if key.endswith("bytes") else numbers.count(value))
    return tag("span", str(value))


def not_measured(study: StudyFigures) -> Html | None:
    """One line that names what this study lacks and how to get it; None if it has everything."""
    arms, text = main_arms(study.main), study.main
    students = [figures for figures in text.arms if figures.arm.role == "combined"]
    keys = {key for run in study.training for key in run.curves}
    arm = studied_arm(text)
    checks = (
        (arms.keys() >= {"teacher"}, "the teacher's score", "a run with role=teacher"),
        (arms.keys() >= {"gold_only"}, "the floor", "experiments=[gold_only,combined]"),
        (arms.keys() >= {"ceiling"}, "the ceiling", "`ceiling` in the study's file"),
        (arms.keys() >= {"control"}, "a teacher without knowledge", "controls=[shuffled]"),
        (any(len(figures.arm.seeds) > 1 for figures in students), "seed noise", "seeds=1,2,3"),
        (len({f.arm.kd_weight for f in students}) > 1, "other KD weights", "grid=kd_weight:0.1,0.3,1,3"),
        (bool(study.training), "training curves", "runs with their metrics.jsonl"),
        ("grad_cosine" in keys, "gradient cosine", "loss.diagnostics_every_steps=10"),
        (any(key.startswith("dev_") for key in keys), "scores on dev over time", "evaluate_every_steps=50"),
        ("dev_imitation" in keys, "imitation over time", "a teacher's predictions on dev"),
        (arm is not None and arm.imitation is not None, "imitation", "choices and the teacher's predictions on them"),
        (any(f.calibration for f in text.arms), "calibration", "a test text with choices"),
        (arm is not None and bool(arm.slices), "parts of the records", "a test text with choices"),
        (bool(study.cache.get("histogram")), "retained mass", "the teacher's cache where it was captured"),
        (bool(study.more), "further texts", "`more_tests` in the study's file"),
        (study.label_saving is not None, "label saving", "label_curve=100,200,400, with `ceiling` in the study's file"),
        (bool(study.examples), "examples", "the test text where the runs have read it"),
    )
    missing = [f"{what} ({how})" for is_there, what, how in checks if not is_there]
    return tag("p", tag("strong", "Not measured: "), "; ".join(missing), ".", class_="missing") if missing else None
