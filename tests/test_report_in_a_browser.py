"""report.html as people open it: on a phone, by keyboard, in the dark, without JavaScript, and not too large."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from finished_run import write_finished_run
from PIL import Image
from sklearn.datasets import load_sample_images

from vit_finetune.evaluation.attention import overlay
from vit_finetune.evaluation.mistakes import PICTURE_PIXELS
from vit_finetune.files import write_text
from vit_finetune.publishing.report import write_report
from vit_finetune.recipe import EvaluationConfig
from vit_finetune.run import Report, Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

LONG = ("an-unusually-long-name-of-a-class-without-any-place-to-break-it", "bee", "cat", "dog", "eel")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return write_report(write_finished_run(tmp_path / "run", LONG))


@pytest.fixture
def phone(browser: Browser, report: Path) -> Iterator[Page]:
    tab = browser.new_page(viewport={"width": 360, "height": 780}, java_script_enabled=True)
    tab.goto(report.as_uri())
    yield tab
    tab.close()


def test_a_phone_scrolls_down_only(phone: Page) -> None:
    assert phone.evaluate("document.documentElement.scrollWidth") == 360
    # What is wider than the page scrolls within itself, and can be reached from the keyboard.
    wide = "[...document.querySelectorAll('.scroll, .chart')].filter(e => e.scrollWidth > e.clientWidth)"
    assert phone.evaluate(f"{wide}.length") > 0
    assert phone.evaluate(f"{wide}.every(e => e.tabIndex == 0 && e.getAttribute('aria-label'))")
    # Names are not broken into letters to fit a column.
    assert (
        phone.evaluate("Math.min(...[...document.querySelectorAll('td.name')].map(e => e.clientWidth))") >= 90
    )


def test_the_keyboard_reaches_every_section(phone: Page) -> None:
    links = phone.evaluate("[...document.querySelectorAll('nav a')].map(e => e.getAttribute('href'))")
    sections = phone.evaluate("[...document.querySelectorAll('section')].map(e => '#' + e.id)")
    assert links == sections and len(links) >= 8
    for number, link in enumerate(links):
        phone.keyboard.press("Tab")
        assert phone.evaluate("document.activeElement.getAttribute('href')") == link
        outline = phone.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", number
    phone.keyboard.press("Enter")
    assert phone.url.endswith(links[-1]) and phone.evaluate("scrollY") > 1000


@pytest.mark.parametrize(("scheme", "ink", "card"), [("light", 36, 255), ("dark", 228, 29)])
def test_charts_take_the_colours_of_the_page(
    browser: Browser, report: Path, scheme: str, ink: int, card: int
) -> None:
    tab = browser.new_page(color_scheme=scheme)
    tab.goto(report.as_uri())
    colours = tab.evaluate("[...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill)")
    assert len(colours) > 100 and {colour.split("(")[1].split(",")[0] for colour in colours} <= {
        str(ink),
        "255",
    }
    ground = tab.evaluate("getComputedStyle(document.querySelector('.chart')).backgroundColor")
    assert ground.startswith(f"rgb({card},")
    # Nothing paints a white ground over that of the page.
    filled = "[...document.querySelectorAll('svg path, svg rect')].filter(e => e.getBBox().width > 100)"
    grounds = set(tab.evaluate(f"{filled}.map(e => getComputedStyle(e).fill)"))
    assert len(grounds) > 1 and (scheme == "light" or "rgb(255, 255, 255)" not in grounds)
    tab.close()


def test_it_is_whole_without_javascript_and_asks_for_nothing(browser: Browser, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(report.as_uri())
    assert tab.locator("svg").count() >= 5 and tab.locator("section").count() >= 8
    table = tab.locator("details table").first
    assert table.is_visible()
    tab.get_by_text("Per-class table").click()  # details open and close without scripts
    assert not table.is_visible()
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    context.close()


def test_real_photographs_and_many_classes_stay_under_five_megabytes(tmp_path: Path) -> None:
    run = write_finished_run(
        tmp_path / "run", [f"class {number}" for number in range(1000)], images_per_class=4
    )
    fill_with_photographs(run)
    page = write_report(run)
    assert page.read_text().count("data:image/jpeg") == 2 * EvaluationConfig().num_mistakes + 1
    assert 500_000 < page.stat().st_size < 5_000_000


def fill_with_photographs(run: Run) -> None:
    """Has the report show as many mistakes, and as large ones, as a run does by default: cuts of real photographs,
    each with a map over it."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    random, report = np.random.default_rng(0), Report.load(run.report("test"))
    most = EvaluationConfig().num_mistakes
    mistakes = []
    for number, mistake in zip(range(most), itertools.cycle(report.worst_mistakes)):
        photograph = photographs[int(random.integers(len(photographs)))]
        left, top = (int(random.integers(0, side - PICTURE_PIXELS)) for side in photograph.size)
        cut = photograph.crop((left, top, left + PICTURE_PIXELS, top + PICTURE_PIXELS))
        cut.save(run.pictures / f"{number}.jpg", "JPEG", quality=90)
        heated = overlay(cut, torch.from_numpy(random.random((14, 14), np.float32)))
        heated.save(run.pictures / f"{number}-map.jpg", "JPEG", quality=90)
        mistakes.append(mistake.model_copy(update={"picture": f"{number}.jpg", "map": f"{number}-map.jpg"}))
    assert len(mistakes) == most
    write_text(run.report("test"), report.model_copy(update={"worst_mistakes": mistakes}).to_json())
