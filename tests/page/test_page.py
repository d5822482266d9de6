"""report.html in a real browser: it shows everything, fetches nothing, and works by keyboard, on a phone, on paper."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from pipeline.analysis.values import Example, StudyFigures, TextFigures, Verdict
from pipeline.page.page import write_page
from support import sample_figures
from support.browser import emulate, open_browser, requested_addresses

MARKUP = "\"><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">'&amp;"
HOSTILE, SHOWN = (f"{MARKUP}{control}{'w' * 120}" for control in ("\x1b\x0b\uffff", "\ufffd\ufffd\ufffd"))
"""What no XML may contain is shown as a replacement character."""


def hostile_study() -> StudyFigures:
    """Text that tries to be markup, wherever a study contains text."""
    study = sample_figures.full_study()
    figures = [replace(f, arm=replace(f.arm, label=f"{f.arm.label} {HOSTILE}")) for f in study.main.arms]
    figures = [
        replace(f, slices=tuple(replace(part, value=HOSTILE + part.value) for part in f.slices[:2])) for f in figures
    ]
    figures = [replace(f, arm=replace(f.arm, differing={HOSTILE: HOSTILE})) for f in figures]
    example = Example(kind=HOSTILE, prompt=HOSTILE, truth=HOSTILE, answers={HOSTILE: HOSTILE, "teacher": HOSTILE})
    return replace(
        study,
        name=HOSTILE,
        main=replace(study.main, name=HOSTILE, arms=tuple(figures)),
        more=(replace(study.more[0], name=HOSTILE),),
        training=(),
        label_saving=replace(study.label_saving, note=HOSTILE) if study.label_saving else None,
        examples=(example,),
        counts=study.counts | {"teacher": HOSTILE, "student": HOSTILE},
        provenance={HOSTILE: HOSTILE, "versions": {HOSTILE: [HOSTILE]}, "commands": [HOSTILE]},
        command=HOSTILE,
    )


def hostile_verdict() -> Verdict:
    return Verdict(code=HOSTILE, headline=HOSTILE, cause=HOSTILE, action=HOSTILE, evidence=(HOSTILE,), command=HOSTILE)


def empty_study() -> StudyFigures:
    main = TextFigures(name="test", metric="accuracy", num_records=0, is_out_of_domain=False, arms=())
    return StudyFigures(name="empty", main=main)


STUDIES: dict[str, Any] = {
    "full": lambda: (sample_figures.full_study(), sample_figures.healthy()),
    "minimal": lambda: (sample_figures.minimal_study(), sample_figures.too_high()),
    "plain": lambda: (sample_figures.plain_text_study(), sample_figures.too_high()),
    "hostile": lambda: (hostile_study(), hostile_verdict()),
    "empty": lambda: (empty_study(), replace(sample_figures.too_high(), code="INCONCLUSIVE", evidence=())),
}


ALL = [name if name in ("full", "minimal") else pytest.param(name, marks=pytest.mark.slow) for name in STUDIES]


class Pages:
    """A page of each study in a folder of its own, written when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __truediv__(self, name: str) -> Path:
        folder = self._folder / name
        if not folder.exists():
            write_page(*STUDIES[name](), folder)
        return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    return Pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def chrome() -> Iterator[webdriver.Chrome]:
    with open_browser() as browser:
        yield browser


def show(chrome: webdriver.Chrome, pages: Pages | Path, name: str, **settings: Any) -> None:
    """The page of a study, without what the browser logged before."""
    emulate(chrome, **settings)
    chrome.get((pages / name / "report.html").as_uri())


@pytest.mark.parametrize("name", ALL)
def test_a_page_renders_without_an_error_or_a_request(chrome: webdriver.Chrome, pages: Pages, name: str) -> None:
    chrome.get_log("browser")
    requested_addresses(chrome)
    show(chrome, pages, name)
    assert chrome.execute_script("return document.compatMode") == "CSS1Compat"
    assert chrome.find_element(By.TAG_NAME, "h1").is_displayed()
    assert chrome.find_element(By.CSS_SELECTOR, "#verdict .badge").is_displayed()
    assert chrome.get_log("browser") == []
    address = (pages / name / "report.html").as_uri()
    assert {url for url in requested_addresses(chrome) if url != "data:,"} == {address}
    assert chrome.execute_script("return performance.getEntriesByType('resource').length") == 0
    source = (pages / name / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:,")[^"]*"', re.sub(r"<svg.*?</svg>", "", source, flags=re.DOTALL))
    assert not re.findall(r"@import|url\((?!#)", source)


def test_a_browser_asks_a_server_for_the_page_alone(chrome: webdriver.Chrome, pages: Pages) -> None:
    """Not even for the icon that browsers look for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(pages / "full"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        chrome.get(f"http://127.0.0.1:{server.server_port}/report.html")
        assert chrome.execute_script("return document.readyState") == "complete"
        time.sleep(0.5)  # an icon is asked for after the page is complete
        server.shutdown()
    assert asked == ["/report.html"]


def test_the_page_begins_with_the_verdict_and_has_every_section(chrome: webdriver.Chrome, pages: Pages) -> None:
    show(chrome, pages, "full")
    found = [section.get_attribute("id") for section in chrome.find_elements(By.TAG_NAME, "section")]
    expected = (
        "verdict objective scores training copying calibration cache parts table texts labels examples provenance"
    )
    assert found == expected.split()
    verdict = chrome.find_element(By.ID, "verdict").text
    sample = sample_figures.healthy()
    for text in (sample.code, sample.headline, sample.action, *sample.evidence, sample.command):
        assert text.replace(" %", "\u202f%") in verdict
    assert not chrome.find_elements(By.CLASS_NAME, "missing")
    links = chrome.find_elements(By.CSS_SELECTOR, "nav a")
    assert {link.get_attribute("href").split("#")[1] for link in links} == set(found) - {"verdict"}


def test_the_objective_shows_the_numbers_of_the_study(chrome: webdriver.Chrome, pages: Pages) -> None:
    for width in (1280, 360):
        show(chrome, pages, "full", width=width)
        drawings = [svg for svg in chrome.find_elements(By.CSS_SELECTOR, "#objective svg") if svg.is_displayed()]
        assert len(drawings) == 1
        shown = " ".join(text.text for text in drawings[0].find_elements(By.TAG_NAME, "text"))
        for number in (
            "3,000 records",
            "80 records",
            "93.75\u202f%",
            "6.25\u202f%",
            "weight 1",
            "temperature 1",
            "400 steps",
        ):
            assert number in shown


def test_a_page_leaves_out_what_was_not_measured_and_names_it(chrome: webdriver.Chrome, pages: Pages) -> None:
    show(chrome, pages, "minimal")
    found = [section.get_attribute("id") for section in chrome.find_elements(By.TAG_NAME, "section")]
    assert found == ["verdict", "objective", "scores", "table"]
    missing = chrome.find_element(By.CLASS_NAME, "missing").text
    for how in ("grid=kd_weight:", "seeds=1,2,3", "label_curve=", "controls=[shuffled]", "more_tests", "calibration"):
        assert how in missing


def column(chrome: webdriver.Chrome, title: str) -> tuple[Any, list[str]]:
    """The heading of a column of the table of arms, and the values by which its shown rows are sorted."""
    headings = chrome.find_elements(By.CSS_SELECTOR, "#arms thead th")
    place = next(i for i, heading in enumerate(headings) if heading.text.split("\n")[0].strip() == title)
    rows = "[...document.querySelectorAll('#arms tbody tr:not([hidden])')]"
    values = chrome.execute_script(f"return {rows}.map((row) => row.cells[{place}].dataset.value ?? '')")
    return headings[place], values


@pytest.mark.parametrize("title", ["Accuracy", "KD weight", "PGR", "Excess imitation"])
def test_a_column_of_numbers_sorts_both_ways_with_empty_cells_last(
    chrome: webdriver.Chrome, pages: Pages, title: str
) -> None:
    show(chrome, pages, "full")
    heading, before = column(chrome, title)
    for order, is_descending in (("descending", True), ("ascending", False)):
        chrome.execute_script("arguments[0].querySelector('button').click()", heading)
        assert heading.get_attribute("aria-sort") == order
        _, values = column(chrome, title)
        numbers = [float(value) for value in values if value]
        assert numbers == sorted(numbers, reverse=is_descending)
        assert values == [value for value in values if value] + [""] * values.count("")
        assert sorted(values) == sorted(before)
    others = chrome.find_elements(By.CSS_SELECTOR, "#arms th[aria-sort]:not([aria-sort='none'])")
    assert others == [heading]


def test_a_column_of_text_sorts_by_the_alphabet_first(chrome: webdriver.Chrome, pages: Pages) -> None:
    show(chrome, pages, "full")
    heading, before = column(chrome, "Arm")
    chrome.execute_script("arguments[0].querySelector('button').click()", heading)
    assert heading.get_attribute("aria-sort") == "ascending"
    after = column(chrome, "Arm")[1]
    combined = [label for label in after if label.startswith("combined")]
    assert combined == [f"combined kd {weight}" for weight in ("0.1", "0.3", "1", "3", "10")]
    assert after != before


def test_search_and_role_filter_the_table(chrome: webdriver.Chrome, pages: Pages) -> None:
    show(chrome, pages, "full")
    search, role = chrome.find_element(By.ID, "arm-search"), Select(chrome.find_element(By.ID, "arm-role"))
    count = chrome.find_element(By.ID, "arm-count")
    assert count.text == "12 of 12 arms"
    role.select_by_visible_text("combined")
    assert len(column(chrome, "Arm")[1]) == 5
    search.send_keys("KD 10")
    assert column(chrome, "Arm")[1] == ["combined kd 10"]
    assert count.text == "1 of 12 arms"
    role.select_by_visible_text("all roles")
    search.clear()
    search.send_keys("shuffled")
    assert column(chrome, "Arm")[1] == ["shuffled"]
    for control in (search, chrome.find_element(By.ID, "arm-role")):
        assert control.find_element(By.XPATH, "ancestor::label").text.split("\n")[0] in ("Search", "Role")


def test_a_column_can_be_sorted_by_keyboard_alone(chrome: webdriver.Chrome, pages: Pages) -> None:
    show(chrome, pages, "full")
    for _ in range(80):
        ActionChains(chrome).send_keys(Keys.TAB).perform()
        focused = chrome.switch_to.active_element
        if focused.find_elements(By.XPATH, "self::button[ancestor::th]"):
            break
    else:
        pytest.fail("the table was not reached in 80 steps")
    assert focused.value_of_css_property("outline-style") == "solid"
    heading = focused.find_element(By.XPATH, "ancestor::th")
    ActionChains(chrome).send_keys(Keys.ENTER).perform()
    assert heading.get_attribute("aria-sort") == "ascending"


def test_the_command_is_copied(chrome: webdriver.Chrome, pages: Pages) -> None:
    show(chrome, pages, "full")
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    chrome.execute_cdp_cmd("Browser.grantPermissions", permissions)
    button = chrome.find_element(By.CSS_SELECTOR, "#verdict .copy")
    button.click()
    copied = chrome.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0], e => arguments[0](String(e)))"
    )
    assert copied == sample_figures.healthy().command
    assert button.text == "Copied"


def test_a_mark_of_a_chart_explains_itself(chrome: webdriver.Chrome, pages: Pages) -> None:
    show(chrome, pages, "full")
    marks = chrome.find_elements(By.CSS_SELECTOR, "#scores .wide [aria-label^='combined kd 3:']")
    point = next(mark for mark in marks if mark.get_attribute("aria-roledescription") == "point")
    chrome.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", point)
    ActionChains(chrome).move_to_element(point).perform()
    assert chrome.find_element(By.ID, "tooltip").text == "combined kd 3: 86.6\u202f% [85.3, 87.9]"


@pytest.mark.parametrize("name", ALL)
def test_a_phone_need_not_scroll_sideways(chrome: webdriver.Chrome, pages: Pages, name: str) -> None:
    show(chrome, pages, name, width=360)
    assert chrome.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    shown = [svg for svg in chrome.find_elements(By.TAG_NAME, "svg") if svg.is_displayed()]
    for svg in shown:
        scale = chrome.execute_script("return arguments[0].getScreenCTM().a", svg)
        assert 11 * scale >= 8.5, "the smallest label of a chart would be hard to read"


COLORS = """
const opaque = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const color = getComputedStyle(e).backgroundColor;
    if (!/rgba\\(.*, 0\\)$|transparent/.test(color)) return color;
  }
};
const found = [];
for (const element of document.querySelectorAll('body *')) {
  const isShown = element.checkVisibility({visibilityProperty: true}) && !element.closest('[aria-hidden]');
  const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!isShown || !hasText || element.matches('script, style, title')) continue;
  const style = getComputedStyle(element);
  const isDrawn = element instanceof SVGElement;
  const behind = [opaque(element)];
  const rects = isDrawn ? element.ownerSVGElement.querySelectorAll(':scope > rect') : [];
  for (const rect of rects) behind.push(getComputedStyle(rect).fill);
  const color = isDrawn ? style.fill : style.color;
  for (const back of new Set(behind)) found.push([element.textContent.slice(0, 40), color, back]);
}
return found;
"""


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2.2: 0.2126 R + 0.7152 G + 0.0722 B of linear sRGB."""
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ALL)
def test_text_has_enough_contrast(chrome: webdriver.Chrome, pages: Pages, name: str, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: (lighter + 0.05) / (darker + 0.05) is at least 4.5."""
    show(chrome, pages, name, scheme=scheme)
    found = chrome.execute_script(COLORS)
    assert len(found) > (400 if name == "full" else 10)
    for text, *colors in found:
        darker, lighter = sorted(map(luminance, colors))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, f"{text}: {colors}"
    background = chrome.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    assert (luminance(background) > 0.5) == (scheme == "light")


def test_paper_is_light_and_as_wide_as_the_page(chrome: webdriver.Chrome, pages: Pages) -> None:
    show(chrome, pages, "full", scheme="dark", media="print", width=688)  # A4 without its margins
    body = chrome.find_element(By.TAG_NAME, "body")
    assert luminance(body.value_of_css_property("background-color")) == pytest.approx(1.0)
    assert luminance(body.value_of_css_property("color")) < 0.1
    page = chrome.find_element(By.TAG_NAME, "html")
    assert not page.get_property("scrollWidth") > page.get_property("clientWidth")
    assert not chrome.find_element(By.ID, "arm-search").is_displayed()
    tables = chrome.find_elements(By.CSS_SELECTOR, ".scroll")
    assert all(chrome.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", t) for t in tables)


@pytest.mark.slow
def test_hostile_text_stays_text(chrome: webdriver.Chrome, pages: Pages) -> None:
    show(chrome, pages, "hostile")
    assert chrome.title == f"{SHOWN}: weak-to-strong study"
    assert len(chrome.find_elements(By.TAG_NAME, "script")) == 1
    assert not chrome.find_elements(By.TAG_NAME, "img")
    assert chrome.find_element(By.TAG_NAME, "h1").text == SHOWN
    assert chrome.find_element(By.CSS_SELECTOR, "#verdict code").text == SHOWN
    assert chrome.find_element(By.CSS_SELECTOR, ".example .prompt").text == SHOWN
    labels = [row.get_attribute("data-value") for row in chrome.find_elements(By.CSS_SELECTOR, "#arms tbody th")]
    assert f"combined kd 1 {SHOWN}" in labels


@pytest.mark.parametrize("name", ALL)
def test_every_figure_is_also_a_file(pages: Pages, name: str) -> None:
    """As many as there are in the page, each as valid SVG and as PNG of twice its size."""
    source = (pages / name / "report.html").read_text()
    names = re.findall(r'<figure class="[^"]*" id="([^"]+)"', source)
    assert len(names) == len(set(names))
    files = sorted(path.name for path in (pages / name / "figures").iterdir())
    assert files == sorted(f"{figure}.{ending}" for figure in names for ending in ("svg", "png"))
    for figure in names:
        root = ElementTree.fromstring((pages / name / "figures" / f"{figure}.svg").read_text())
        png = (pages / name / "figures" / f"{figure}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
        assert (width, height) == (2 * int(root.attrib["width"]), 2 * int(root.attrib["height"]))
    ids = re.findall(r'\sid="([^"]+)"', source)
    assert len(ids) == len(set(ids)), "an id stands twice in the page"


@pytest.mark.slow(minutes=0.5)
def test_a_page_of_200_arms_is_small_and_quick(chrome: webdriver.Chrome, tmp_path: Path) -> None:
    started = time.process_time()
    page = write_page(sample_figures.large_study(200), sample_figures.healthy(), tmp_path / "large")[0]
    assert time.process_time() - started < 20
    assert page.stat().st_size < 5_000_000
    show(chrome, tmp_path, "large")
    labels = column(chrome, "Arm")[1]
    assert len(labels) == 200
    chrome.find_element(By.ID, "arm-search").send_keys("optimizer.learning_rate 3E-05")
    assert column(chrome, "Arm")[1] == [label for label in labels if "lr 3e-05" in label] != []
