"""The scores that a run ends with: thresholds and temperature from validation, and the test split once."""

from __future__ import annotations

import json
from typing import Any

import datasets
import torch

from vit_finetune.console import say, show_table, warn
from vit_finetune.evaluation.calibration import HIGHEST, LOWEST, fit_temperature
from vit_finetune.evaluation.mistakes import save_mistakes
from vit_finetune.evaluation.scoring import Scores, at_best_thresholds, score
from vit_finetune.evaluation.seeing import measure_seeing
from vit_finetune.files import write_json, write_text
from vit_finetune.model.loading import load_checkpoint
from vit_finetune.recipe import Recipe
from vit_finetune.reports import AnyReport, headline_scores
from vit_finetune.run import CALIBRATION_KEY, Report, Run


def score_splits(
    run: Run, recipe: Recipe, splits: datasets.DatasetDict, device: torch.device, writes: bool
) -> dict[str, AnyReport]:
    """Scores validation and then test, once, with the weights that were saved; writes the reports.

    Thresholds of several labels are tuned on validation, and where the recipe asks for it, a temperature is
    fitted to it; both are saved with the model.

    Args:
        run: with a saved model.
        recipe: what to do.
        splits: columns id, image and label.
        device: to compute on.
        writes: whether this process writes.
    """
    model, image_processor = load_checkpoint(str(run.model))
    model = model.to(device)
    reports, temperature = {}, None
    for name in [name for name in ("validation", "test") if name in splits]:
        scores = score(model, image_processor, splits[name], name, recipe.evaluation)
        if recipe.data.multi_label and name == "validation":
            scores = at_best_thresholds(scores, model, recipe.evaluation)
            if writes:
                _add_to_config(run, "thresholds", model.config.thresholds)
        if recipe.evaluation.calibrate:
            temperature = temperature or _calibrate(run, scores, writes)
            scores = scores.calibrated(temperature)
        reports[name] = scores.report
        if writes:
            if name == "test" or "test" not in splits:
                reports[name] = save_mistakes(scores, splits[name], run, model, image_processor)
                write_json(run.seeing, measure_seeing(model, image_processor, splits[name]))
                scores.save_predictions(run.predictions(name))
            write_text(run.report(name), reports[name].to_json())
    return reports


def _calibrate(run: Run, validation: Scores, writes: bool) -> float:
    """The temperature of the validation images, which joins the saved model's config."""
    temperature = fit_temperature(validation.label_ids, validation.logits)
    if writes:
        _add_to_config(run, CALIBRATION_KEY, temperature)
    if temperature in (LOWEST, HIGHEST):
        assert isinstance(validation.report, Report)  # several labels are not calibrated
        if validation.report.accuracy == 1:
            reason = "all are predicted rightly, so they do not tell how sure is too sure: validate on more"
        elif temperature == LOWEST:
            reason = "its logits are very small: train it longer"
        else:
            reason = "it is sure of what it gets wrong: train it longer, or look at its mistakes"
        warn(
            f"calibration: the validation images would have the model's temperature beyond {temperature:g}, "
            f"where the search ends; {reason}"
        )
    return temperature


def _add_to_config(run: Run, key: str, value: Any) -> None:
    """Writes what was found on validation into the saved model's config."""
    file = run.model / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) | {key: value}
    write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")  # as transformers writes it


def show_scores(reports: dict[str, AnyReport], run: Run) -> None:
    """Says what a run ends with: its scores, and where report and model lie."""
    rows = [[name, *(value for _, value in headline_scores(report))] for name, report in reports.items()]
    columns = [name for name, _ in headline_scores(next(iter(reports.values())))]
    show_table("scores", ["split", *columns], rows)
    for name, report in reports.items():
        if isinstance(report, Report) and (after := report.calibrated):
            fitted = ", which the temperature was fitted to" if name == "validation" else ""
            say(
                f"calibrated, temperature {after.temperature:.3f}: {name}{fitted}: log loss "
                f"{report.log_loss:.4f} → {after.log_loss:.4f}, ECE {report.ece:.4f} → {after.ece:.4f}"
            )
    if "test" not in reports:
        warn("there was no test split: the validation score also chose the weights, so it flatters them")
    say(f"report: {run.report_html}")
    say(f"model:  {run.model}")
