"""The report in a real browser: it shows itself and asks for nothing; light and dark; values can be read off."""

import os
import re
from pathlib import Path

import pytest

from tests.pages import story
from tests.pages.browser import Browser
from trainer.report.write import report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report."""
    return report(story.write(tmp_path_factory.mktemp("runs"))).as_uri()


def colours(browser: Browser) -> tuple[int, int]:
    """How light the page and its letters are, 0 to 255."""
    found = browser.run(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        ".map(text => text.match(/\\d+/g).slice(0, 3).reduce((sum, one) => sum + +one, 0) / 3)"
    )
    return round(found[0]), round(found[1])


def test_it_opens_at_once_and_asks_for_nothing(browser: Browser, page: str) -> None:
    browser.size(1200, 1000)
    browser.requests()
    browser.complaints()
    browser.open(page)
    text = browser.text
    for words in ("story", "81.23%", "What was run", "Speed over time", "Worst of 12 classes"):
        assert words in text
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page]
    assert browser.complaints() == []
    sizes = browser.run("return [...document.images].map(one => one.complete && one.naturalWidth)")
    assert sizes
    assert all(sizes)


def test_light_and_dark_and_the_switch(browser: Browser, page: str, tmp_path: Path) -> None:
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.open(page)
        background, ink = colours(browser)
        assert (background > 200 and ink < 60) if scheme == "light" else (background < 60 and ink > 200)
        browser.run("document.getElementById('theme').click()")
        background, ink = colours(browser)
        assert (background > 200) == (scheme == "dark")
        keep(browser, tmp_path, f"report-{scheme}-switched.png")
    browser.scheme("light")


def test_nothing_lies_outside_or_on_each_other(browser: Browser, page: str, tmp_path: Path) -> None:
    """At the width of a screen, a tablet and a telephone: nothing sticks out, and no letters of a chart collide."""
    for width in (1280, 800, 500):
        browser.size(width, 1000)
        browser.open(page)
        assert browser.run("return document.documentElement.scrollWidth - innerWidth") <= 0, width
        collisions = browser.run(
            """const bad = [];
            for (const svg of document.querySelectorAll('svg.chart')) {
              const frame = svg.getBoundingClientRect();
              const boxes = [...svg.querySelectorAll('text')].map(
                one => [one.textContent, one.getBoundingClientRect()]);
              boxes.forEach(([text, a], i) => {
                if (a.left < frame.left - 1 || a.right > frame.right + 1) bad.push(text + ' sticks out');
                for (const [other, b] of boxes.slice(i + 1))
                  if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
                    bad.push(text + ' on ' + other);
              });
            }
            return bad"""
        )
        assert collisions == [], width
        keep(browser, tmp_path, f"report-{width}.png")


def test_a_value_is_read_off_under_the_pointer_and_by_keys(browser: Browser, page: str) -> None:
    browser.size(1200, 1000)
    browser.open(page)
    browser.point("svg.chart", 0.5, 0.5)
    tip = "return [document.getElementById('tip').style.display, document.getElementById('tip').innerText]"
    display, text = browser.run(tip)
    assert display == "block"
    found = re.fullmatch(r"step (\d+)\nloss ([\d.]+)", text)
    assert found is not None, text
    step, loss = int(found[1]), float(found[2])
    assert 100 <= step <= 200
    assert loss == pytest.approx(0.3 + 6 * 2.718281828 ** (-step / 60), rel=1e-3)
    browser.run(
        "const svg = document.querySelector('svg.chart'); svg.focus();"
        "svg.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))"
    )
    assert browser.run(tip)[1].startswith(f"step {step + 10}\n")
    browser.run("document.querySelector('svg.chart').blur()")
    assert browser.run(tip)[0] == "none"


def test_it_is_read_without_colour(browser: Browser, page: str) -> None:
    """Curves differ by their dashes, parts of the bar by their patterns; right and wrong are said by a sign."""
    browser.open(page)
    dashes = browser.run(
        "return [...Array(8).keys()].map(n => {const line = document.createElementNS('http://www.w3.org/2000/svg',"
        "'line'); line.setAttribute('class', 'line s' + n); document.querySelector('svg.chart').append(line);"
        "return getComputedStyle(line).strokeDasharray})"
    )
    assert len(set(dashes)) == 8
    patterns = browser.run("return [...document.querySelectorAll('pattern path')].map(one => one.getAttribute('d'))")
    assert len(set(patterns)) == len(patterns) == 8
    captions = browser.run("return [...document.querySelectorAll('figcaption span')].map(one => one.textContent[0])")
    assert set(captions) == {"\u2713", "\u2717"}


def keep(browser: Browser, folder: Path, name: str) -> None:
    """Save a screenshot, for people, where COATNET_PICTURES says."""
    browser.picture(Path(os.environ.get("COATNET_PICTURES") or folder) / name)
