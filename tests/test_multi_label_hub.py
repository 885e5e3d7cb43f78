"""Images with several labels to the Hub and back, and a model of them that is proved after its push."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from conftest import Say, tiny_recipe
from fork_server import QUICK
from huggingface_hub import ModelCard
from labelled_shapes import NAMES, write_jsonl
from loopback_hub import LoopbackHub

from vit_finetune.data.splits.prepared import prepare_splits
from vit_finetune.recipe import DataConfig
from vit_finetune.reports import MultiLabelReport, load_report
from vit_finetune.run import Run

pytestmark = [pytest.mark.hub, pytest.mark.slow]


def test_a_dataset_goes_up_and_a_model_of_it_follows(hub: LoopbackHub, say: Say, tmp_path: Path) -> None:
    table = write_jsonl(tmp_path / "shapes", 40)
    code, _, told = say("upload-data", table, "ann/shapes", "--license", "mit")
    assert code == 1
    assert "write data.multi_label=true" in told
    code, _, told = say("upload-data", table, "ann/shapes", "data.multi_label=true", "--license", "mit")
    assert code == 0, told
    files = hub.repo("ann/shapes", "dataset").files()
    card = files["README.md"].decode()
    assert "data.path=ann/shapes data.multi_label=true" in card
    rows = pq.read_table(io.BytesIO(files["data/train-00000-of-00001.parquet"]))
    labels = [json.loads(line)["labels"] for line in table.read_text().splitlines()]
    assert [[NAMES[number] for number in ids] for ids in rows["label"].to_pylist()] == list(
        map(sorted, labels)
    )
    kind = datasets.Features.from_arrow_schema(rows.schema)["label"]
    assert kind == datasets.List(datasets.ClassLabel(names=NAMES))

    # Trained on from there, its splits are those of the table; its model is published and proved.
    data = {"multi_label": True}
    recipe = tiny_recipe(
        "ann/shapes",
        tmp_path / "run",
        data=data,
        hub={"push": True, "model_id": "ann/tagger", "license": "mit", "verify": "full"},
    )
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(resolved=False))
    code, _, told = say("train", tmp_path / "r.yaml", before=QUICK)
    assert code == 0, told
    assert "verified: downloaded into an empty cache" in told
    run = Run(tmp_path / "run")
    here = prepare_splits(
        DataConfig(path=str(table), multi_label=True, validation_fraction=0.25, test_fraction=0.25)
    )
    then = run.read_provenance()["data"]["splits"]
    assert {name: about["fingerprint"] for name, about in then.items()} == {
        name: about["fingerprint"] for name, about in here.describe("x")["splits"].items()
    }
    published = hub.repo("ann/tagger").files()
    report = load_report(run.report("test"))
    assert isinstance(report, MultiLabelReport)
    scores = {
        (result.metric_type, result.metric_name): result.metric_value
        for result in ModelCard(published["README.md"].decode()).data.eval_results or []
    }
    assert scores == {
        ("mean_average_precision", "Mean average precision"): report.mean_average_precision,
        ("f1", "Micro F1"): report.micro_f1,
        ("f1", "Macro F1"): report.macro_f1,
        ("exact_match", "Exact match"): report.exact_match,
        ("hamming_loss", "Hamming loss"): report.hamming_loss,
    }
    assert json.loads(published["config.json"])["thresholds"] == [
        score.threshold for score in report.per_class.values()
    ]
    # Thresholds that were changed afterwards are not those of the report.
    config = json.loads((run.model / "config.json").read_text()) | {"thresholds": [0.9, 0.9, 0.9]}
    (run.model / "config.json").write_text(json.dumps(config))
    code, _, told = say("push", run.path)
    assert code == 1
    assert "model/config.json is not what was there after scoring" in told
    # By its id, on the table that it was uploaded from.
    code, out, told = say("evaluate", "ann/tagger", "--data", table, "--json")
    assert code == 0, told
    assert json.loads(out)["num_images"] == 40
