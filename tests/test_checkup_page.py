"""checkup.html: all pictures inside, nothing of the data acted upon, large data shown in part."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from drawn_corpus import draw_corpus, draw_scene, encode
from planted_faults import FAULTS
from test_report import HOSTILE, Page

from vit_finetune.data.checkup.checkup import check_up
from vit_finetune.data.checkup.pictures import SIDE, load_pictures
from vit_finetune.data.sources.source import load_source
from vit_finetune.publishing.checkup_page import MOST_SHOWN, build_page, shown_images, write_checkup
from vit_finetune.recipe import DataConfig
from vit_finetune.run import Finding, Findings, FoundImage, RunError

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def document(*findings: Finding, path: str = "photos") -> Findings:
    return Findings(path=path, num_images={"train": 1200, "test": 1}, findings=list(findings))


def finding(names: list[str], groups: list[int] | None = None, **fields: str) -> Finding:
    images = [
        FoundImage(split="train", id=name, detail=name, group=groups[number] if groups else None)
        for number, name in enumerate(names)
    ]
    values = {"kind": "blank", "severity": "warning", "message": "found", "advice": "look", **fields}
    return Finding.model_validate({**values, "count": len(images), "images": images})


PICTURE = encode(draw_scene(1), "JPEG")


def test_every_finding_stands_on_the_page_with_its_pictures() -> None:
    names = [f"cat/{number}.jpg" for number in range(5)]
    pages = build_page(
        document(finding(names, [0, 0, 1, 1, 1]), finding([], kind="imbalance", severity="note")),
        {("train", name): PICTURE for name in names[1:]} | {("test", names[0]): PICTURE},
    )
    page = Page(pages)
    assert page.tags.count("section") == 2 and page.tags.count("img") == 4
    assert "no picture" in page.text and all(f"train {name}" in page.text for name in names)
    assert pages.count('class="set together"') == 2
    assert "train 1,200 images, test 1 image" in page.text
    assert "Nothing was found to be wrong" in Page(build_page(document(), {})).text


def test_the_page_is_whole_in_itself() -> None:
    html = build_page(document(finding(["a.jpg"])), {("train", "a.jpg"): PICTURE})
    assert not re.search(r"<script|<link|@import|url\(", html)
    sources = [value for name, value in Page(html).attributes if name in ("src", "href")]
    assert sources and all(value.startswith(("data:image/jpeg;base64,", "#")) for value in sources)


def test_hostile_names_are_text() -> None:
    hostile = finding(HOSTILE, None, kind=HOSTILE[0], message=HOSTILE[0], advice=HOSTILE[0])
    html = build_page(document(hostile, path=HOSTILE[0]), {("train", name): PICTURE for name in HOSTILE})
    plain = build_page(document(finding(["a"])), {("train", "a"): PICTURE})
    assert set(Page(html).tags) == set(Page(plain).tags)
    assert not [name for name, _ in Page(html).attributes if name.startswith("on")]


def test_of_many_images_some_are_shown_and_the_document_has_all(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(1000)]
    whole = document(finding(names))
    assert len(shown_images(whole)) == MOST_SHOWN
    page = write_checkup(whole, {("train", name): PICTURE for name in names}, tmp_path / "new" / "folder")
    html = page.read_text(encoding="utf-8")
    assert Page(html).tags.count("img") == MOST_SHOWN and f"The first {MOST_SHOWN} of 1,000" in html
    assert Findings.load(page.with_name("findings.json")) == whole


def test_a_checkup_replaces_an_older_one_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    write_checkup(document(finding(["a"])), {}, tmp_path)
    write_checkup(document(), {}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"keep.txt", "findings.json", "checkup.html"}
    assert Findings.load(tmp_path / "findings.json").findings == []


def test_pictures_are_small_and_show_what_training_sees(tmp_path: Path) -> None:
    from PIL import Image

    root = draw_corpus(tmp_path)
    for fault in FAULTS:
        if fault.name in ("panorama_of_42_megapixels", "turned_by_exif", "icon", "empty_file"):
            fault.plant(root)
    config = DataConfig(path=str(root))
    checkup = check_up(load_source(config), config)
    assert checkup.findings[0].kind == "unreadable", "of which there is no picture"
    pictures = load_pictures(load_source(config), shown_images(checkup.document(config)))
    sizes = {name: Image.open(io.BytesIO(data)).size for (_, name), data in pictures.items()}
    assert sizes == {
        "train/cat/panorama.jpg": (SIDE, 95),
        "train/owl/turned.jpg": (56, 72),  # upright, from 72×56
        "train/owl/icon.png": (12, 9),
    }
    assert all(len(data) < 20_000 for data in pictures.values())


def test_findings_documents_survive_a_round_trip_and_runs_keep_them_short(tmp_path: Path) -> None:
    found = finding([f"{number}.jpg" for number in range(50)])
    found = found.model_copy(update={"exclude": found.images})
    whole = document(found)
    (tmp_path / "findings.json").write_text(whole.to_json(), encoding="utf-8")
    assert Findings.load(tmp_path / "findings.json") == whole
    (short,) = whole.shortened().findings
    assert (len(short.images), short.exclude, short.count) == (20, [], 50)
    with pytest.raises(RunError, match="not a findings document"):
        (tmp_path / "findings.json").write_text("[1")
        Findings.load(tmp_path / "findings.json")


def test_images_are_named_so_that_one_finds_them() -> None:
    def name(split: str, identity: str) -> str:
        return FoundImage(split=split, id=identity).name

    assert name("all", "cat/1.jpg") == "cat/1.jpg"
    assert name("validation", "Val/cat/1.jpg") == "Val/cat/1.jpg"
    assert name("test", "7") == "test 7"
    assert name("train", "images/1.jpg") == "train images/1.jpg"


def test_the_page_needs_no_torch() -> None:
    code = "import sys, vit_finetune.publishing.checkup_page\nprint({'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.browser
def test_a_browser_shows_the_pictures(tmp_path: Path, browser: Browser) -> None:
    names = [f"{number}.jpg" for number in range(9)]
    page = write_checkup(document(finding(names)), {("train", name): PICTURE for name in names}, tmp_path)
    tab = browser.new_page()
    tab.goto(page.as_uri())
    assert tab.evaluate("[...document.images].filter(image => image.naturalWidth == 72).length") == 9
    tab.close()
