"""The page of a report in a real browser, from a file: drawn, legible, reachable by keyboard, and on its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chrome import Chrome, find_chrome
from test_report import forty_operands, layers_report, report_with_all, with_texts

from lazy_einsum import OptimizedModule, Report

PROGRAM = find_chrome()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium or google-chrome on the PATH")

WIDE, NARROW = 1280, 400

# All texts with the colour that they have and the one that lies behind them, and their contrast as WCAG defines it.
CONTRASTS = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const pixel = (...layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const channel = c => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
    // Below all is what the browser paints where a page says nothing.
    return ["white", ...layers];
  };
  return [...document.querySelectorAll("body *")].filter(element => {
    const own = [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim());
    return own && !["STYLE", "title"].includes(element.tagName) && element.checkVisibility();
  }).map(element => {
    const isDrawn = element.tagName == "text", style = getComputedStyle(element), below = behind(element);
    if (isDrawn) below.push(getComputedStyle(element.parentElement.querySelector("circle")).fill);
    const colour = pixel(...below, isDrawn ? style.fill : style.color), paper = pixel(...below);
    const [dark, light] = [luminance(colour), luminance(paper)].sort((a, b) => a - b);
    const words = element.textContent.trim().slice(0, 30);
    return {words, colour, paper, contrast: (light + 0.05) / (dark + 0.05)};
  });
})()"""

# Pairs of circles of one tree that touch.
TOUCHING = """[...document.querySelectorAll("svg")].flatMap(svg => {
  const circles = [...svg.querySelectorAll("circle")].map(c => [c.cx, c.cy, c.r].map(value => value.baseVal.value));
  return circles.flatMap(([x, y, r], n) => circles.slice(n + 1).filter(
    ([a, b, s]) => Math.hypot(x - a, y - b) < r + s).map(other => [x, y, ...other]));
})"""

# Pairs of lines of one tree that cross on the way from what they start at to what they end at.
CROSSING = """[...document.querySelectorAll("svg")].flatMap(svg => {
  const lines = [...svg.querySelectorAll("path")].map(path => {
    const length = path.getTotalLength(), steps = [...Array(41).keys()];
    return steps.map(n => path.getPointAtLength(length * n / 40)).map(({x, y}) => [x, y]);
  });
  const side = ([a, b], [c, d], [x, y]) => Math.sign((c - a) * (y - b) - (d - b) * (x - a));
  const meet = (a, b, c, d) => side(a, b, c) * side(a, b, d) < 0 && side(c, d, a) * side(c, d, b) < 0;
  const box = line => [0, 1].map(at => line.map(point => point[at])).map(of => [Math.min(...of), Math.max(...of)]);
  const boxes = lines.map(box), apart = ([a, b], [c, d]) => b < c || d < a;
  return lines.flatMap((one, n) => lines.slice(n + 1).filter((other, m) => {
    if (boxes[n].some((span, at) => apart(span, boxes[n + 1 + m][at]))) return false;
    return one.slice(1).some((b, i) => other.slice(1).some((d, j) => meet(one[i], b, other[j], d)));
  }).map(other => [one[0], one[40], other[0], other[40]]));
})"""

# What is wider than its place, where nothing around it can be scrolled.
CUT_OFF = """[...document.querySelectorAll("body *")].filter(element => {
  const {clientWidth, scrollWidth} = element;
  if (!element.checkVisibility() || !clientWidth || scrollWidth <= clientWidth + 1) return false;
  for (let at = element; at; at = at.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(at).overflowX)) return false;
  return !element.closest("svg");
}).map(element => element.tagName)"""

FOCUS = """(() => {
  const element = document.activeElement, style = getComputedStyle(element);
  const name = element.tagName == "SUMMARY" ? element.textContent : element.getAttribute("aria-label") || "";
  return {tag: element.tagName, name, ring: style.outlineStyle != "none" && parseFloat(style.outlineWidth) >= 2};
})()"""


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    assert PROGRAM is not None
    browser = Chrome(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def many_operands() -> Report:
    child, operands = forty_operands()
    return OptimizedModule(child).explain(*operands)


def with_long_texts() -> Report:
    changed: Report = with_texts(report_with_all(), lambda text: f"{text} {'long' * 40}")
    return changed


REPORTS = {
    "layers": lambda: layers_report(measure=True),
    "forty": many_operands,
    "long": with_long_texts,
}


@pytest.fixture(scope="module", params=REPORTS)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """A report, and its file."""
    report = REPORTS[request.param]()
    file = tmp_path_factory.mktemp("page") / "report.html"
    report.save(file)
    return report, file


def open_all(tab: Any) -> None:
    tab.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")


def test_the_page_is_drawn_on_its_own(chrome: Chrome, page: tuple[Report, Path]) -> None:
    report, file = page
    with chrome.open(file.as_uri()) as tab:
        open_all(tab)
        drawn = tab.evaluate(
            """[...document.querySelectorAll("figure")].map(figure => {
              const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
              const inside = [...svg.querySelectorAll("circle, path")].every(shape => {
                const own = shape.getBoundingClientRect();
                return own.left >= box.left - 1 && own.right <= box.right + 1 && own.bottom <= box.bottom + 1;
              });
              return [figure.innerText.split(" ")[0], svg.querySelectorAll("circle").length, inside && box.width > 20];
            })"""
        )
        rows = tab.evaluate(
            """[...document.querySelectorAll("table")].filter(table => table.caption?.innerText == "Order")
              .map(table => table.tBodies[0].rows.length)"""
        )
        took = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        assert tab.problems == [] and tab.requests == [file.as_uri()]
    expected = []
    for network in report.networks:
        for title, order in (("as", network.written), ("optimized", network.optimized)):
            assert order is not None
            expected.append([title, len(order.operands) + len(order.steps), True])
    assert drawn == expected
    assert rows == [len(network.optimized.steps) for network in report.networks]
    print(f"{file.stat().st_size} bytes, loaded in {took:.0f} ms")
    assert file.stat().st_size < 2_000_000


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_texts_are_legible(chrome: Chrome, page: tuple[Report, Path], dark: bool) -> None:
    with chrome.open(page[1].as_uri(), dark=dark) as tab:
        open_all(tab)
        texts = tab.evaluate(CONTRASTS)
        papers = [sum(text["paper"][:3]) / 3 for text in texts if text["words"] in ("Cache", "as written", "0 hits")]
        assert papers and all(paper < 60 if dark else paper > 200 for paper in papers)
        assert [text for text in texts if text["contrast"] < 4.5] == []
        # A page that is shorter than the window has one colour down to its end.
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == tab.evaluate(
            "getComputedStyle(document.querySelector('main')).backgroundColor"
        )


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_is_cut_off_and_nothing_overlaps(chrome: Chrome, page: tuple[Report, Path], width: int) -> None:
    with chrome.open(page[1].as_uri(), width) as tab:
        open_all(tab)
        assert tab.evaluate(CUT_OFF) == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(TOUCHING) == []
        assert tab.evaluate(CROSSING) == []


def test_the_code_of_each_stage_is_reached_by_keyboard(chrome: Chrome, page: tuple[Report, Path]) -> None:
    report, file = page
    with chrome.open(file.as_uri()) as tab:
        summaries = tab.evaluate("[...document.querySelectorAll('summary')].map(summary => summary.textContent)")
        reached: list[str] = []
        while "Code of every stage" not in reached:
            tab.press("Tab")
            focus = tab.evaluate(FOCUS)
            assert focus["ring"] and len(reached) < 1000, focus
            if focus["tag"] == "SUMMARY":
                reached.append(focus["name"])
        assert reached == summaries
        code = "document.activeElement.closest('details').querySelectorAll('section')"
        stages = list(report.specializations[0].stages)
        is_shown = (
            f"[...{code}].filter(section => section.checkVisibility()).map(section => section.firstChild.innerText)"
        )
        assert tab.evaluate(is_shown) == []
        tab.press("Enter")
        assert tab.evaluate(is_shown) == stages
        tab.press("Tab")
        assert tab.evaluate(FOCUS) == {"tag": "DIV", "name": "code of every stage", "ring": True}
        for _ in range(300):
            tab.press("ArrowRight")
        # The last stage comes into the window.
        tab.wait_until(f"[...{code}].at(-1).getBoundingClientRect().left < innerWidth")


def test_the_checks_see_what_they_look_for(chrome: Chrome, tmp_path: Path) -> None:
    """Control: a page with all that the page of a report must not have."""
    file = tmp_path / "bad.html"
    file.write_text(
        """<!doctype html><body><main style="width: 2000px; color: #999">grey</main><img src="http://127.0.0.1:9/x">
        <div style="width: 50px; overflow: hidden">averylongwordthatdoesnotfit</div>
        <svg><g><circle cx="9" cy="9" r="9" fill="#888"/><text fill="#777">1</text></g>
        <circle cx="12" cy="9" r="9"/><path d="M0 0L9 8"/><path d="M0 8L9 0"/><path d="M0 4L1 9"/>
        </svg><script>console.error("one"); throw new Error("two")</script>"""
    )
    with chrome.open(file.as_uri(), dark=True) as tab:
        assert len(tab.problems) >= 2 and "http://127.0.0.1:9/x" in tab.requests
        assert {text["words"] for text in tab.evaluate(CONTRASTS) if text["contrast"] < 4.5} == {"grey", "1"}
        assert "DIV" in tab.evaluate(CUT_OFF) and tab.evaluate("document.documentElement.scrollWidth") > WIDE
        assert len(tab.evaluate(TOUCHING)) == 1 and len(tab.evaluate(CROSSING)) == 1
