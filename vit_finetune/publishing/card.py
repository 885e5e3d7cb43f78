"""The model card: README.md of the published folder, every number in it computed from the run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from vit_finetune.files import write_text
from vit_finetune.publishing.limits import find_limits
from vit_finetune.publishing.markdown import MOST_NAMED, build_environment, join_card, join_tags, read_card
from vit_finetune.publishing.multi_label import (
    METRICS,
    label_metrics,
    label_score_rows,
    multi_label_reports,
)
from vit_finetune.publishing.record import (
    Record,
    bin_count,
    class_rows,
    duration,
    hub_id,
    interval,
    load_record,
    memory,
    one_line,
    percent,
    pixels,
    score_rows,
)
from vit_finetune.publishing.redaction import (
    Markdown,
    escape_markdown,
    fenced,
    values_without_paths,
    without_paths,
)
from vit_finetune.publishing.usage import NOWHERE, calibrated_usage, usage
from vit_finetune.recipe import HubConfig
from vit_finetune.reports import AnyReport, MultiLabelReport
from vit_finetune.run import TOLD, Finding, Report, Run, RunError

TRAINED = {
    "full": "fine-tuned from ",
    "lora": "fine-tuned with LoRA from ",
    "head": "a head trained on the frozen encoder of ",
    "linear_probe": "a linear probe on the frozen encoder of ",
}
"""What stands before the name of the base model, by `model.method`."""


def write_card(run: Run) -> Path:
    """The path of the card, `model/README.md`, written whole or not at all.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = run.model / "README.md"
    write_text(path, build_card(run))
    return path


def publishable_card(run: Run, hub: HubConfig, edited: Sequence[str] = ()) -> str:
    """The card for a repository: as `build_card`; where somebody wrote into the run's, with their text.

    Their keys of the front matter stay too, but for those that say what was measured and where it is.

    Args:
        run: a finished run.
        hub: where it goes.
        edited: files that are no longer what was scored.

    Raises:
        RunError: the run's own card cannot be read.
    """
    card, written = build_card(run, hub, edited), _written_card(run)
    if written is None:
        return card
    (old, text), (new, _) = written, read_card(card)
    said = f"\n{_edited_warning(edited)}\n" if edited else ""
    text = text.replace(f'"{NOWHERE}"', f'"{hub.model_id}"')  # which nobody knew before
    return join_card(old | new | {"tags": join_tags(old, new)}, said + text)


def publishable_license(run: Run, hub: HubConfig) -> str | None:
    """The license that `publishable_card` names: the hub section's, or else that of the run's own card."""
    written = None if hub.license else _written_card(run)
    return hub.license or (written[0].get("license") if written else None)


def smallest_card(hub: HubConfig) -> str:
    """A card of what is known before there is a run, for the Hub to look at."""
    return join_card({"license": hub.license, "tags": hub.tags}, "")


def _written_card(run: Run) -> tuple[dict[str, Any], str] | None:
    """Front matter and text of the run's own card where somebody wrote into it; None where nobody did.

    Raises:
        RunError: it cannot be read.
    """
    own = run.model / "README.md"
    try:
        text = own.read_text(encoding="utf-8-sig") if own.is_file() else ""  # -sig: as Notepad writes it
    except UnicodeDecodeError as error:
        raise RunError(f"{own}: cannot be read: {error}. Mend it, or remove the file") from None
    return None if not text.strip() or text == build_card(run) else read_card(text, str(own))


def build_card(run: Run, hub: HubConfig | None = None, edited: Sequence[str] = ()) -> str:
    """The card as Markdown under YAML front matter. No path of this machine, user or host is in it.

    Args:
        run: a finished run.
        hub: where it is published, and what the card says beside the numbers; as the run's recipe if None.
        edited: files of the model that are no longer what was scored, which the card then says.
    """
    record = load_record(run)
    if hub is not None:
        record = replace(record, recipe=record.recipe | {"hub": hub.model_dump()})
    environment = build_environment()
    environment.filters.update(
        percent=percent, interval=interval, duration=duration, memory=memory, pixels=pixels
    )
    report, several = record.headline, multi_label_reports(record)
    # Without `hub:`, so that who repeats it does not push to this place, or read of another one.
    set_keys = {section: keys for section, keys in record.own_recipe.items() if section != "hub"}
    own = yaml.safe_dump(values_without_paths(set_keys), sort_keys=False, allow_unicode=True, width=100)
    return environment.get_template("model_card.md.jinja").render(
        front_matter=Markdown(_metadata(record).to_yaml()),
        title=_model_name(record),
        record=record,
        provenance=record.provenance,
        report=report,
        labels=report.labels if report else record.provenance.get("labels") or [],
        classes=class_rows(report) if report else [],
        limits=find_limits(report) if report else [],
        base_model=values_without_paths(record.model.get("base_model")),
        trained=TRAINED[record.model.get("method", "full")],
        data_name=_dataset_name(record),
        dataset=_dataset_id(record),
        scores=label_score_rows(several) if several else score_rows(record),
        multi_label=bool(several),
        facts=_facts(record),
        calibrated_usage=fenced(calibrated_usage(record), "python"),
        usage=fenced(usage(record), "python"),
        recipe=fenced(own, "yaml") if set_keys else None,
        command=fenced(without_paths(_command(record)), "bash"),
        findings=_warnings(record),
        edited=_edited_warning(edited),
    )


def _edited_warning(edited: Sequence[str]) -> Markdown:
    """What readers must know where the files are not those that were scored; nothing where they are."""
    if not edited:
        return Markdown("")
    names = ", ".join(escape_markdown(name) for name in edited)
    return Markdown(f"**Changed after scoring: {names}.** The scores are of the files as they were before.")


def _warnings(record: Record) -> list[Finding]:
    """What readers of a card should know about the data: warnings, and what was left out."""
    told = [f for f in record.findings or [] if f.severity != "note" or f.kind in TOLD]
    return [finding.shortened(MOST_NAMED) for finding in told]


def _model_name(record: Record) -> str:
    model_id = record.setting("hub", "model_id")
    return one_line(str(model_id).rpartition("/")[2] if model_id else record.name)


def _command(record: Record) -> str:
    """What was typed, without where it was to be published."""
    typed = str(record.provenance.get("command") or "")
    try:
        words = shlex.split(typed)
    except ValueError:  # not typed into a shell
        return typed
    kept = [word for word in words if not word.startswith("hub.")]
    return typed if kept == words else shlex.join(kept)


def _facts(record: Record) -> list[tuple[str, str]]:
    """(what, value) of everything known about how the run went."""
    provenance = record.provenance
    versions = ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items())
    seconds, speed = provenance.get("train_seconds"), provenance.get("images_per_second")
    peak, best = provenance.get("peak_memory_bytes"), record.best_step
    hardware = provenance.get("hardware") or {}
    rows = [
        ("Date", str(provenance.get("created") or "")[:10]),
        ("Hardware", without_paths(one_line(str(hardware.get("device") or "")))),
        ("Processes", str(hardware.get("processes") or "")),
        ("Training time", duration(seconds) if seconds else ""),
        ("Speed", f"{speed:,.1f} images/s over the whole training" if speed else ""),
        ("Peak memory", memory(peak) if peak else ""),
        ("Steps", f"{provenance['steps']:,}" if provenance.get("steps") else ""),
        ("Published weights", f"those of step {best:,}, chosen by the validation split" if best else ""),
        ("Weights", record.averaging or ""),
        ("Seed", str(provenance.get("seed", ""))),
        ("Versions", versions),
    ]
    return [(name, value) for name, value in rows if value]


# --------------------------------------------------------------------------- front matter


def _metadata(record: Record) -> ModelCardData:
    # Only of the Hub's is the commit known: `models/vit` may be a folder, here or where the run was made.
    base_model = hub_id(record.setting("model", "path")) if record.model.get("revision") else None
    dataset = _dataset_id(record)
    own_tags = [one_line(str(tag)) for tag in record.setting("hub", "tags") or []]
    return ModelCardData(
        library_name="peft" if record.is_adapter else "transformers",
        pipeline_tag="image-classification",
        license=record.setting("hub", "license"),
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        tags=list(dict.fromkeys(["vision", "image-classification", "vit-finetune", *own_tags])),
        metrics=_metric_ids(record),
        model_name=_model_name(record),
        eval_results=_eval_results(record, record.headline, dataset) if record.headline else None,
    )


def _metric_ids(record: Record) -> list[str] | None:
    if record.headline is None:
        return None
    return METRICS if multi_label_reports(record) else ["accuracy", "f1"]


def _dataset_id(record: Record) -> str | None:
    return hub_id(record.setting("data", "path")) if record.data.get("source") == "hub" else None


def _dataset_revision(record: Record) -> str | None:
    """The commit of the Hub dataset, or else what the recipe asked for."""
    revision = record.data.get("revision") or record.setting("data", "revision")
    return str(revision) if revision else None


def _dataset_name(record: Record) -> str:
    return one_line(
        values_without_paths(str(record.data.get("path") or record.setting("data", "path") or "images"))
    )


def _class_metrics(report: Report, what: str) -> list[tuple[str, str, float, dict[str, Any]]]:
    """The scores for the model-index: type, name (followed by `what`), value and arguments of each."""
    low, high = report.accuracy_interval
    scores: list[tuple[str, str, float, dict[str, Any]]] = [
        (
            "accuracy",
            f"Accuracy{what}",
            report.accuracy,
            {"interval_95": [low, high], "interval_method": "Wilson"},
        ),
        ("f1", f"Macro F1{what}", report.macro_f1, {"average": "macro"}),
        ("balanced_accuracy", f"Balanced accuracy{what}", report.balanced_accuracy, {}),
        ("log_loss", f"Log loss (nats){what}", report.log_loss, {}),
        ("ece", f"Expected calibration error{what}", report.ece, {"bins": bin_count(report.calibration)}),
    ]
    if report.top_5_accuracy is not None:
        scores.insert(1, ("top_5_accuracy", f"Top-5 accuracy{what}", report.top_5_accuracy, {"k": 5}))
    return scores


def _eval_results(record: Record, report: AnyReport, dataset: str | None) -> list[EvalResult]:
    """The report's scores for the model-index; interval and number of images are the metrics' arguments."""
    kind_of_data = record.data.get("path") if record.data.get("source") == "built-in" else "imagefolder"
    what = "" if report.split == "test" else f" on the {report.split} split"
    scores = (
        label_metrics(report, what) if isinstance(report, MultiLabelReport) else _class_metrics(report, what)
    )
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=dataset or one_line(str(kind_of_data)),
            dataset_name=_dataset_name(record),
            dataset_config=record.setting("data", "subset") if dataset else None,
            dataset_revision=_dataset_revision(record) if dataset else None,
            dataset_split=report.split,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            metric_args={**arguments, "num_images": report.num_images},
        )
        for kind, name, value, arguments in scores
    ]


def build_eval_entries(run: Run) -> dict[str, str]:
    """The Hub's `.eval_results/*.yaml`, by path: the test's first score, for the leaderboard of the dataset.

    Only where the data is a Hub dataset with a test split of its own: another one is nobody's benchmark.
    Value in [0, 1]; form: https://huggingface.co/docs/hub/eval-results.
    """
    record = load_record(run)
    dataset, test = _dataset_id(record), record.test
    splits = record.data.get("splits") or {}
    if dataset is None or test is None or (splits.get("test") or {}).get("origin") != "source":
        return {}
    if isinstance(test, MultiLabelReport):
        value = test.mean_average_precision
        notes = f"Mean average precision on the test split, {test.num_images} images"
    else:
        low, high = test.accuracy_interval
        value = test.accuracy
        notes = f"Accuracy on the test split, {test.num_images} images, 95% interval {low:.4f} to {high:.4f}"
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=record.setting("data", "subset") or "default",
        value=value,
        dataset_revision=_dataset_revision(record),
        date=str(record.provenance.get("created") or "")[:10] or None,
        notes=notes,
    )
    name = f".eval_results/{dataset.replace('/', '--')}.yaml"
    return {name: yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)}
