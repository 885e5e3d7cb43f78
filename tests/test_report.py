"""report.html: self-contained, true to the numbers, safe with any name, and never without a needed piece."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from finished_run import truncated, write_finished_run

from vit_finetune.files import write_text
from vit_finetune.publishing.report import build_report, write_report
from vit_finetune.run import Report, Run

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</text></svg><iframe src=//evil>",
    "$\\frac{$ &amp; 100%",
    "two\nlines \x00\x9b 🐝 \u202egnp.exe",
)


class Page(HTMLParser):
    """The tags, addresses, texts and table rows of a page, as a browser would take them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.words.append(data)
        if self.rows and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_needs_nothing_from_outside(tmp_path: Path) -> None:
    html = write_report(write_finished_run(tmp_path)).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and not {"link", "iframe", "object", "base"} & set(page.tags)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert len(addresses) > 10 and all(address.startswith(("data:image/", "#")) for address in addresses)
    assert "http" not in html.lower() and "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 50  # the charts do not borrow each other's clips and markers
    used = {address[1:] for address in addresses if address.startswith("#")}
    used |= {target[1:] for target in re.findall(r"url\(([^)]*)\)", html)}
    assert used <= set(ids)


def test_numbers_are_the_reports(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path)
    report, page = Report.load(run.report("test")), Page(build_report(run))
    low, high = report.accuracy_interval
    assert f"{report.accuracy:.1%} test accuracy" in page.text
    assert f"95% interval {100 * low:.1f}–{high:.1%}, {report.num_images} images, 5 classes." in page.text
    rows = {row[1]: row for row in page.rows if len(row) == 7}
    for name, score in report.per_class.items():
        assert int(rows[name][2]) == score.support
        shown = [float(rows[name][column].rstrip("%")) / 100 for column in (3, 4, 6)]
        assert shown == pytest.approx([score.precision, score.recall, score.f1], abs=5e-4)
    scores = {row[0]: row[1:] for row in page.rows if len(row) == 3}
    validation = Report.load(run.report("validation"))
    assert scores["Log loss (nats)"] == [f"{report.log_loss:.4f}", f"{validation.log_loss:.4f}"]
    assert scores["Expected calibration error"] == [f"{report.ece:.1%}", f"{validation.ece:.1%}"]
    pairs = {(row[0], row[1]): row[2] for row in page.rows if len(row) == 4}
    matrix = report.confusion_matrix
    for first, label in enumerate(report.labels):
        for second, predicted in enumerate(report.labels):
            if first != second and matrix[first][second]:
                assert pairs[label, predicted] == f"{matrix[first][second]} of {sum(matrix[first])}"
    for mistake in report.worst_mistakes:
        assert f"true {mistake.label} predicted {mistake.predicted} ({mistake.probability:.1%})" in page.text
        assert mistake.id in page.text
    assert "6% waiting for images, 3% evaluation: nothing to change." in page.text


def test_shows_every_chart_with_its_axes_and_every_picture(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path, findings=[truncated(("cat/x.jpg", "truncated PNG"))])
    page = Page(build_report(run))
    assert page.tags.count("svg") == 6
    for axis in (
        "Epoch",
        "Loss (nats per image)",
        "Validation accuracy (%)",
        "Learning rate (per step)",
        "Predicted class",
        "Score (%)",
        "Accuracy (%)",
        "Probability of the predicted class (%)",
    ):
        assert axis in page.words
    assert page.tags.count("img") == len(Report.load(run.report("test")).worst_mistakes) + 1
    assert "1 of 1,200 images cannot be read" in page.text and "cat/x.jpg : truncated PNG" in page.text
    assert "per_device_train_batch_size" in page.text  # the resolved recipe


def test_hostile_names_are_text(tmp_path: Path) -> None:
    run = write_finished_run(
        tmp_path,
        class_names=HOSTILE,
        findings=[truncated(*((f"{name}.jpg", "<b>bad</b>") for name in HOSTILE))],
        mistake_ids=HOSTILE[:3],
        command="vit-finetune train '<script>x</script>'",
    )
    html = write_report(run).read_text(encoding="utf-8")
    page, plain = Page(html), Page(build_report(write_finished_run(tmp_path / "plain")))
    assert "<script" not in html and "<iframe" not in html
    mistakes = len(Report.load(run.report("test")).worst_mistakes)
    assert page.tags.count("img") == mistakes + 1
    assert page.tags.count("svg") == plain.tags.count("svg") == html.count("</svg>")
    assert set(page.tags) <= {*plain.tags, "ul", "li"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for name in HOSTILE[:4]:
        assert name in page.text  # shown as it is, not dropped
    assert not set("\x00\x9b\u202e") & set(html)


@pytest.mark.parametrize("number", [2, 30, 31, 120])
def test_any_number_of_classes(tmp_path: Path, number: int) -> None:
    names = [f"class {index}" for index in range(number)]
    run = write_finished_run(tmp_path, names, images_per_class=12)
    page = Page(build_report(run))
    assert page.tags.count("svg") == 6
    assert len([row for row in page.rows if len(row) == 7]) == number + 1
    assert ("Top-5 accuracy" in page.text) is (number > 5)
    assert (f"The 20 classes of {number} with the lowest F1" in page.text) is (number > 20)
    assert ("Too many classes for names" in page.text) is (number > 30)
    if number == 120:
        report = Report.load(run.report("test"))
        worst = min(report.per_class, key=lambda name: report.per_class[name].f1)
        assert page.words.count(worst) >= 2  # as a bar's name and in the table


def test_without_a_test_split_it_says_so(tmp_path: Path) -> None:
    page = Page(build_report(write_finished_run(tmp_path, ("cat", "dog"), with_test=False)))
    assert "validation accuracy" in page.text and "This is a validation score" in page.text
    assert "test accuracy" not in page.text
    run = Run(tmp_path)
    write_text(run.recipe, run.recipe.read_text(encoding="utf-8").replace("at_end: true", "at_end: false"))
    last = Page(build_report(run)).text
    assert "also selected" in page.text and "also selected" not in last and "chosen by validation" not in last
    tested = Page(build_report(write_finished_run(tmp_path / "tested")))
    assert "This is a validation score" not in tested.text


@pytest.mark.parametrize("piece", ["pictures", "history.json", "provenance.json", "reports"])
def test_missing_pieces_leave_a_page(tmp_path: Path, piece: str) -> None:
    run = write_finished_run(tmp_path)
    target = run.path / piece
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    page = Page(build_report(run))
    assert page.tags[-1] == "pre" and "per_device_train_batch_size" in page.text  # whole, to its last section
    says = {"pictures": "no picture", "history.json": "left no training log", "reports": "Not scored"}
    assert says.get(piece, "Confusion matrix") in page.text


def test_a_log_with_gaps_still_gives_curves(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path)
    write_text(
        run.history,
        '[{"epoch": 1, "loss": NaN, "step": 1}, {"epoch": 2, "loss": 0.5, "step": 2}, '
        '{"epoch": 3, "eval_accuracy": NaN}, {"step": 3}]',
    )
    assert Page(build_report(run)).tags.count("svg") == 4
    write_text(run.history, "[]")
    assert Page(build_report(run)).tags.count("svg") == 3


def test_only_pictures_of_the_run_are_shown(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path / "run")
    source = next(run.pictures.glob("test-*"))
    shutil.copy(source, tmp_path / "secret.png")
    (run.pictures / "broken.png").write_bytes(b"<svg onload=alert(1)>")
    report = Report.load(run.report("test"))
    paths = ("../../secret.png", str(tmp_path / "secret.png"), "broken.png")
    mistakes = [
        mistake.model_copy(update={"picture": path}) for mistake, path in zip(report.worst_mistakes, paths)
    ]
    write_text(run.report("test"), report.model_copy(update={"worst_mistakes": mistakes}).to_json())
    page = Page(build_report(run))
    assert page.tags.count("img") == 1 and page.text.count("no picture") == 3


def test_same_run_same_bytes(tmp_path: Path) -> None:
    first = write_report(write_finished_run(tmp_path / "a")).read_bytes()
    assert write_report(Run(tmp_path / "a")).read_bytes() == first
    assert write_report(write_finished_run(tmp_path / "b")).read_bytes() == first
