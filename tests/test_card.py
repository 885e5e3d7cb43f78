"""The model card: front matter equal to the report, supported prose, nothing private and nothing active."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finished_run import draw_report, truncated, write_finished_run
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from vit_finetune.files import write_json, write_text
from vit_finetune.publishing.card import build_card, publishable_card, publishable_license, write_card
from vit_finetune.publishing.redaction import escape_markdown, values_without_paths, without_paths
from vit_finetune.publishing.report import build_report
from vit_finetune.recipe import HubConfig
from vit_finetune.run import Finding, Report, Run, RunError

HOSTILE = (
    "<script>alert(1)</script>",
    "a|b",
    "`c` \\` ``d``",
    "two\nlines\n\n# heading",
    "[x](javascript:y) ![i](z) *e* __f__ ~~g~~ $h$",
)


def _html(card: str) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(ModelCard(card).text)


def _cells(html: str) -> list[list[str]]:
    return [
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        for row in re.findall(r"<tr>.*?</tr>", html, re.DOTALL)
    ]


def test_front_matter_is_the_report(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(7)]
    hub = {"model_id": "ann/seven", "license": "mit", "tags": ["birds", "vision"]}
    run = write_finished_run(tmp_path, names, hub=hub)
    path = write_card(run)
    assert path == run.model / "README.md"
    report, data = Report.load(run.report("test")), ModelCard(path.read_text(encoding="utf-8")).data
    results = {result.metric_type: result for result in data.eval_results}
    assert {kind: result.metric_value for kind, result in results.items()} == {
        "accuracy": report.accuracy,
        "top_5_accuracy": report.top_5_accuracy,
        "f1": report.macro_f1,
        "balanced_accuracy": report.balanced_accuracy,
        "log_loss": report.log_loss,
        "ece": report.ece,
    }
    for result in results.values():
        assert (result.task_type, result.dataset_split) == ("image-classification", "test")
        assert result.metric_args["num_images"] == report.num_images
    assert results["ece"].metric_args["bins"] == 15 > len(report.calibration)
    assert tuple(results["accuracy"].metric_args["interval_95"]) == report.accuracy_interval
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "image-classification",
        "mit",
    )
    assert data.tags == ["vision", "image-classification", "vit-finetune", "birds"]
    assert data.model_name == "seven"
    assert (data.get("base_model"), data.get("datasets")) == (None, None)


def test_prose_shows_the_reports_numbers(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path)
    card, report = build_card(run), Report.load(run.report("test"))
    low, high = report.accuracy_interval
    assert (
        f"Test accuracy {report.accuracy:.1%} (95% interval {100 * low:.1f}–{high:.1%}, 170 images)." in card
    )
    rows = {row[0]: row for row in _cells(_html(card)) if len(row) == 6}
    for name, score in report.per_class.items():
        assert int(rows[name][1]) == score.support
        shown = [float(rows[name][column].rstrip("%")) / 100 for column in (2, 3, 5)]
        assert shown == pytest.approx([score.precision, score.recall, score.f1], abs=5e-4)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert ast.parse(code) and 'pipeline("image-classification", model="path/to/this/folder")' in code
    for part in (
        "vit-finetune train recipes/photos.yaml",
        "hidden_size: 64",
        "sha256:",
        "615.4 images/s",
        "812 MB",
    ):
        assert part in card
    assert "per_device_train_batch_size" not in card  # the user's own keys only
    assert "0: ant\n· 1: bee" in card and "Not measured:" in card


def test_without_a_test_split_the_score_is_the_selecting_one(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path, with_test=False)
    card = build_card(run)
    assert "**This is a validation score that also selected the weights; no test split was scored.**" in card
    assert "Test accuracy" not in card
    report = Report.load(run.report("validation"))
    accuracy = ModelCard(card).data.eval_results[0]
    assert (accuracy.dataset_split, accuracy.metric_value) == ("validation", report.accuracy)
    assert accuracy.metric_name == "Accuracy on the validation split"
    write_text(run.recipe, run.recipe.read_text(encoding="utf-8").replace("at_end: true", "at_end: false"))
    last = build_card(run)  # the weights of the last step: nothing was selected
    assert (
        "**This is a validation score; no test" in last and "chosen by" not in last and "selected" not in last
    )
    run.report("validation").unlink()
    unscored = build_card(run)
    assert "It was not scored." in unscored and ModelCard(unscored).data.eval_results is None


def test_limits_say_what_the_numbers_support(tmp_path: Path) -> None:
    run, report = write_finished_run(tmp_path), draw_report(("ant", "bee", "cat"))

    def limits(**changes: Any) -> str:
        write_text(run.report("test"), report.model_copy(update=changes).to_json())
        return build_card(run).partition("## Limits")[2].partition("## ")[0]

    def scored(matrix: list[list[int]]) -> dict[str, Any]:
        scores = {
            name: score.model_copy(update={"recall": row[place] / sum(row), "support": sum(row)})
            for place, ((name, score), row) in enumerate(zip(report.per_class.items(), matrix))
        }
        return {"confusion_matrix": matrix, "per_class": scores}

    text = limits(**scored([[35, 5, 0], [0, 40, 0], [8, 1, 3]]))
    assert "Lowest recall: cat: 25.0% (3 of 12, 95% interval 8.9–53.2%); ant: 87.5% (35 of 40" in text
    assert (
        "Most confused: cat taken for ant, 8 of 12 images; ant taken for bee, 5 of 40 images; cat taken"
        in text
    )
    assert "1 of 3 classes has fewer than 30 images" in text and "(cat: 12)" in text
    assert "bee:" not in text

    text = limits(**scored([[40, 0, 0], [0, 40, 0], [0, 0, 40]]))
    assert "No image of the test split was misclassified" in text
    assert "Most confused" not in text and "fewer than" not in text

    bins = [part.model_copy(update={"count": 0}) for part in report.calibration[:-1]]
    for confidence, words in (
        (0.99, "it is surer"),
        (0.8, "within the accuracy's"),
        (0.5, "it is less sure"),
    ):
        last = report.calibration[-1].model_copy(update={"count": 90, "confidence": confidence})
        assert words in limits(calibration=[*bins, last], accuracy=0.8, accuracy_interval=(0.7, 0.87))


def test_hostile_names_render_as_text(tmp_path: Path) -> None:
    found = truncated(*((f"{name}.jpg", "<b>bad</b>") for name in HOSTILE))
    found = found.model_copy(update={"message": HOSTILE[0], "advice": HOSTILE[1]})
    run = write_finished_run(tmp_path, HOSTILE, findings=[found], command="train '\n```\n<script>x</script>'")
    html, plain = _html(build_card(run)), _html(build_card(write_finished_run(tmp_path / "plain")))
    tags = {tag.lower() for tag in re.findall(r"<(\w+)", html)}
    assert tags == {tag.lower() for tag in re.findall(r"<(\w+)", plain)}
    assert not tags & {"script", "b", "img", "a", "em", "s"}
    assert html.count("<h2") == plain.count("<h2") and html.count("<strong>") == plain.count("<strong>")
    assert html.count("<code") == plain.count("<code") and html.count("<h1") == plain.count("<h1") == 1
    assert [len(row) for row in _cells(html)] == [len(row) for row in _cells(plain)]
    rows = [row[0] for row in _cells(html) if len(row) == 6][1:]
    shown = [MarkdownIt().renderInline(escape_markdown(name)) for name in HOSTILE]
    assert rows == shown
    assert rows[0] == "&lt;script&gt;alert(1)&lt;/script&gt;" and rows[1] == "a|b"
    assert rows[3] == "two lines # heading"


@pytest.mark.parametrize(
    "name", ["# x", "1. x", "- x", "+ x", "> x", "===", "    x", "&amp;", "https://evil.example", "|"]
)
def test_a_name_is_never_markup(name: str) -> None:
    bullet = MarkdownIt("commonmark").enable("table").render(f"- {escape_markdown(name)}\n")
    escaped = name.strip().replace("&", "&amp;").replace(">", "&gt;")
    assert bullet == f"<ul>\n<li>{escaped}</li>\n</ul>\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key=/a/b/c", "key=c"),
        ("~/x", "x"),
        (r"C:\x\y", "y"),
        ("C:/x/y", "y"),
        (r"data.path=\\server\share\pets", "data.path=pets"),
        ("/home/ann/", "~"),
        ("~ann/", "~"),
        (r"C:\Users\ann", "~"),
        ("/" + "root/", "~"),
        ("vit-finetune train '/home/ann/my recipes/a.yaml'", "vit-finetune train 'a.yaml'"),
        ("train 'data.path=/home/ann lee/my photos' x=1", "train 'data.path=my photos' x=1"),
        ("--output=/a/b -o/c/d /e/f", "--output=b -od f"),
        ("paths=[/a/b,/c/d]", "paths=[b,d]"),
        ("cannot open '/a/b c/d.jpg': no such file", "cannot open 'd.jpg': no such file"),
        ("don't read /a/b, it isn't /c/d", "don't read b, it isn't d"),
        ("file:///home/ann/x.jpg", "x.jpg"),
        ("ann@host.lan:/data/pets", "pets"),
        ("sftp://ann@host.lan/data/pets", "pets"),
        ("sftp://ann@host.lan", "…"),
        ("../ann/pets", "pets"),
        ("recipes/digits.yaml", "recipes/digits.yaml"),
        ("./photos/cats", "./photos/cats"),
        ("model.path=google/vit-base-patch16-224", "model.path=google/vit-base-patch16-224"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("615 images/s, 3 of 4 / 5, 1e-4 and/or ~5 GB", "615 images/s, 3 of 4 / 5, 1e-4 and/or ~5 GB"),
    ],
)
def test_paths_are_reduced_to_their_last_component(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_paths_in_values_keep_their_spaces() -> None:
    values = {"data": {"path": "/home/ann lee/my photos"}, "lists": ["~/a b/c", 1, None, True], "id": "a/b"}
    assert values_without_paths(values) == {
        "data": {"path": "my photos"},
        "lists": ["c", 1, None, True],
        "id": "a/b",
    }


def test_nothing_private_reaches_the_card(tmp_path: Path) -> None:
    run = write_finished_run(
        tmp_path / "annlee",
        data_path="/home/annlee/secret stuff/pets",
        command="/home/annlee/bin/vit-finetune train ~annlee/r.yaml data.path='/home/annlee/secret x/pets'",
        findings=[truncated(("/home/annlee/x.jpg", "cannot identify image file '/home/annlee/x.jpg'"))],
    )
    card = build_card(run)
    assert "annlee" not in card and "secret" not in card and str(tmp_path) not in card
    assert "vit-finetune train r.yaml data.path='pets'" in card and "path: pets" in card
    assert ModelCard(card).data.eval_results[0].dataset_name == "pets"


def test_hub_ids_are_linked_and_folders_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_finished_run("run", data_path="ann/pets")
    recipe = run.recipe.read_text(encoding="utf-8").replace("  path: null", "  path: google/vit-base")
    write_text(run.recipe, recipe)
    provenance = run.provenance.read_text(encoding="utf-8")
    data = ModelCard(build_card(run)).data
    assert (data.get("base_model"), data.get("datasets")) == (None, None)
    provenance = provenance.replace('"source": "folder"', '"source": "hub"')
    write_text(run.provenance, provenance.replace('"base_model"', f'"revision": "{"0" * 40}", "base_model"'))
    for _ in range(2):
        data = ModelCard(build_card(run)).data
        assert (data.base_model, data.datasets) == ("google/vit-base", ["ann/pets"])
        assert data.eval_results[0].dataset_type == "ann/pets"
        for folder in ("google/vit-base", "ann/pets"):  # what is here when the card is made says nothing
            Path(folder).mkdir(parents=True, exist_ok=True)


def test_where_a_run_was_to_be_published_stays_out_of_its_recipe(tmp_path: Path) -> None:
    command = "vit-finetune train r.yaml hub.push=true 'hub.tags=[a, b]' hub.model_id=acme/secret x=1"
    hub = {"model_id": "acme/secret", "push": True}
    run = write_finished_run(tmp_path, hub=hub, command=command)
    card = publishable_card(run, HubConfig(model_id="ann/pets"))
    assert "acme" not in card and "hub.push" not in card and 'model="ann/pets"' in card
    assert "vit-finetune train r.yaml x=1\n" in card and "hidden_size: 64" in card


def test_a_card_that_somebody_wrote_into_keeps_their_text(tmp_path: Path) -> None:
    run, hub = write_finished_run(tmp_path), HubConfig(model_id="ann/pets", tags=["pets"])
    ours = write_card(run).read_text(encoding="utf-8")

    def published(text: str, encoding: str = "utf-8") -> ModelCard:
        (run.model / "README.md").write_bytes(text.encode(encoding))
        return ModelCard(publishable_card(run, hub))

    plain = published(ours)
    assert 'model="ann/pets"' in plain.text and plain.data.license is None
    for text, encoding in (
        (
            ours.replace("# photos", "# My pets").replace("library_name", "license: mit\nlibrary_name"),
            "utf-8",
        ),
        (
            ours.replace("# photos", "# My pets").replace("library_name", "license: mit\nlibrary_name"),
            "utf-8-sig",
        ),
        ("---\r\nlicense: mit\r\n---\r\n# My pets\r\n", "utf-8"),
    ):
        card = published(text, encoding)
        assert card.text.strip().startswith("# My pets") and "path/to/this/folder" not in card.text
        assert "vit-finetune" in card.data.tags and "license:" not in card.text
        assert card.data.license == publishable_license(run, hub) == "mit"
        assert card.data.eval_results == plain.data.eval_results
    assert publishable_license(run, hub.model_copy(update={"license": "cc0-1.0"})) == "cc0-1.0"
    assert published("Mine.\n").text.strip() == "Mine." and published("").text == plain.text
    for tags in ("tags: mine", "tags: [mine]", "tags:\n- mine\nmodel-index: nonsense"):
        card = published(f"---\n{tags}\n---\nMine.\n")
        assert card.data.tags[0] == "mine" and "pets" in card.data.tags and len(card.data.eval_results) > 3
    for text, encoding, expected in (
        ("---\n- a\n---\n", "utf-8", "is no mapping"),
        ("---\na: [b\n---\n", "utf-8", "README.md: cannot be read: while parsing"),
        ("---\na: !!python/name:os.system x\n---\n", "utf-8", "README.md: cannot be read: could not"),
        ("né", "latin-1", "README.md: cannot be read: 'utf-8'"),
    ):
        with pytest.raises(RunError, match=expected) as caught:
            published(text, encoding)
        assert "\n" not in str(caught.value)


def test_warnings_about_the_data_stand_in_the_card_and_notes_do_not(tmp_path: Path) -> None:
    cut = truncated(*((f"cat/{number:03d}.jpg", "truncated PNG") for number in range(25)))
    note = Finding(kind="huge", severity="note", message="2 images of more than 40 megapixels", count=2)
    card = build_card(
        write_finished_run(
            tmp_path,
            findings=[
                cut,
                note,
                Finding(kind="listing", severity="note", message="1 file left out", count=1),
            ],
        )
    )
    assert "- truncated: 25 of 1,200 images cannot be read, and left out. Repair or remove them.\n" in card
    assert "  - cat/004.jpg: truncated PNG\n" in card and "cat/005.jpg" not in card
    assert "- listing: 1 file left out.\n" in card and "megapixels" not in card
    html = _html(card)
    assert html.count("<li>cat/") == 5 and "<pre><code>  - cat" not in html


def test_data_without_faults_and_data_that_nobody_checked(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path)
    assert "The checkup of the data found nothing to warn of." in build_card(run)
    run.findings.unlink()
    assert "The data was not checked." in build_card(run)


def test_training_images_that_were_streamed_were_not_checked(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path)
    facts = json.loads(run.provenance.read_text(encoding="utf-8"))
    write_json(run.provenance, facts | {"data": facts["data"] | {"streaming": True}})
    said = "The training images were streamed: the checkup did not look at them."
    assert said in build_card(run) and said in build_report(run)


@pytest.mark.parametrize("number", [2, 120])
def test_any_number_of_classes(tmp_path: Path, number: int) -> None:
    run = write_finished_run(tmp_path, [f"class {index}" for index in range(number)], images_per_class=8)
    card = write_card(run).read_text(encoding="utf-8")
    assert len([row for row in _cells(_html(card)) if len(row) == 6]) == number + 1
    assert f"{number} of {number} classes have fewer than 30 images" in card
    assert build_card(Run(run.path)) == card


def test_a_bare_run_has_a_card(tmp_path: Path) -> None:
    run = write_finished_run(tmp_path)
    for path in (run.provenance, run.history, run.report("validation"), run.report("test")):
        path.unlink()
    assert ModelCard(build_card(run)).data.pipeline_tag == "image-classification"


def test_needs_no_torch() -> None:
    code = (
        "import sys, vit_finetune.publishing.card, vit_finetune.publishing.report\n"
        "print([m for m in ('torch', 'torchvision', 'transformers', 'datasets') if m in sys.modules])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]
