"""What is said of a temperature: the report page, the card and the code on it."""

from __future__ import annotations

from pathlib import Path

from conftest import TINY_VIT
from finished_run import write_finished_run
from test_calibration import answers
from test_report import Page

from vit_finetune.evaluation.calibration import (
    measure_calibrated,
)
from vit_finetune.files import write_text
from vit_finetune.model.loading import load_model
from vit_finetune.publishing.card import build_card, publishable_card
from vit_finetune.publishing.report import build_report
from vit_finetune.recipe import EvaluationConfig, HubConfig, ModelConfig
from vit_finetune.run import CALIBRATION_KEY, Report


def test_report_and_card_tell_before_and_after(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path)
    labels, logits = answers(3.0, images=170)
    after = measure_calibrated(labels, logits, 1.75)
    plain = build_report(run), build_card(run)
    for split in ("validation", "test"):
        report = Report.load(run.report(split)).model_copy(update={"calibrated": after})
        write_text(run.report(split), report.to_json())
    html, card = build_report(run), build_card(run)
    page = Page(html)
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 3}
    before = Report.load(run.report("test"))
    assert rows["Log loss (nats)"][0] == f"{before.log_loss:.4f}"
    assert rows["Log loss, calibrated (nats)"] == [f"{after.log_loss:.4f}"] * 2
    assert rows["Expected calibration error, calibrated"] == [f"{after.ece:.1%}"] * 2
    assert html.count("Reliability diagram") == 2 and plain[0].count("Reliability diagram") == 1
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for paper in (page.text, card):
        assert "temperature 1.7500" in paper and "fitted on the validation split" in paper
    assert f"| Log loss, calibrated (nats) | {after.log_loss:.4f} |" in card
    assert f"model.config.{CALIBRATION_KEY}" in card and "flatter it" in card
    for paper in plain:
        assert "the temperature" not in paper and "Log loss, calibrated" not in paper
    # Where somebody wrote into the card before it was known where it goes, the code is told that, too.
    write_text(run.model / "README.md", card.replace("# photos", "# My pets"))
    published = publishable_card(run, HubConfig(model_id="ann/pets"))
    assert 'name = "ann/pets"' in published and "path/to/this/folder" not in published


def test_off_is_the_default() -> None:
    assert EvaluationConfig().calibrate is False
    model, _ = load_model(ModelConfig(config=TINY_VIT), ["a", "b"])
    assert CALIBRATION_KEY not in model.config.to_dict()
