"""`vit-finetune compare`: counts, costs and the page, for two runs of which the differences are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import TINY_VIT
from test_report import Page
from typer.testing import CliRunner

from vit_finetune.cli import app
from vit_finetune.comparing import compare
from vit_finetune.evaluation.speed import count_flops, measure_serving
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import ModelConfig
from vit_finetune.run import Run, RunError

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def copy(run: Run, path: Path) -> Run:
    shutil.copytree(run.path, path)
    return Run(path)


def answer(run: Run, right: set[int]) -> None:
    """Rewrites what a run predicted: right about the images of these numbers, wrong about all others."""
    path = run.predictions("test")
    table = pyarrow.parquet.read_table(path).sort_by("id")
    names = sorted({*table["label"].to_pylist()})
    predicted = [
        label if row in right else names[(names.index(label) + 1) % len(names)]
        for row, label in enumerate(table["label"].to_pylist())
    ]
    place = table.schema.get_field_index("predicted")
    pyarrow.parquet.write_table(table.set_column(place, "predicted", pa.array(predicted)), path)


def test_identical_runs_show_no_difference(trained: Run, tmp_path: Path) -> None:
    again = copy(trained, tmp_path / "again")
    document = compare([trained.path, again.path], tmp_path / "page.html")
    (pair,) = document["pairs"]
    assert (pair["difference"], pair["p_value"], pair["only_first"], pair["only_second"]) == (0, 1, 0, 0)
    assert document["right_alone"] == {trained.path.name: [], "again": []}
    first, second = document["runs"]
    assert first["report"] == second["report"]
    assert first["flops"] == second["flops"] > 0 and first["parameters"] == second["parameters"] > 0
    page = (tmp_path / "page.html").read_text()
    assert f"{trained.path.name} and again are right about the same images: no difference." in page
    assert "<script" not in page


def test_the_page_counts_and_shows_what_only_one_gets_right(trained: Run, tmp_path: Path) -> None:
    one, two = copy(trained, tmp_path / "one"), copy(trained, tmp_path / "<i>two")
    answer(one, {0, 1, 2, 3})
    answer(two, {2, 3, 4})
    document = compare([one.path, two.path], tmp_path / "page.html")
    (pair,) = document["pairs"]
    total = document["num_images"]
    assert (pair["both_right"], pair["only_first"], pair["only_second"]) == (2, 2, 1)
    assert pair["both_wrong"] == total - 5 and pair["difference"] == pytest.approx(-1 / total)
    ids = sorted(pyarrow.parquet.read_table(one.predictions("test"))["id"].to_pylist())
    assert document["right_alone"] == {"one": [ids[0], ids[1]], "<i>two": [ids[4]]}
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert "<i>" not in text and "2 images only one gets right, 1 only &lt;i&gt;two (p = 1.0000)" in text
    assert text.count("<img ") == text.count("data:image/") == 3
    links = [value for name, value in page.attributes if name in ("href", "src")]
    assert not [link for link in links if not link.startswith(("data:image/", "#"))]


def test_without_the_data_there_are_no_pictures(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = copy(trained, tmp_path / "one"), copy(trained, tmp_path / "two")
    answer(two, {0})
    recipe = one.recipe.read_text()
    one.recipe.write_text(recipe.replace(str(trained.path.parent / "photos"), str(tmp_path / "gone")))
    compare([one.path, two.path], tmp_path / "page.html")
    assert "no pictures of the images that only one run gets right" in capsys.readouterr().err
    text = (tmp_path / "page.html").read_text()
    assert "<img " not in text and "no picture" in text


def test_what_cannot_be_compared_is_refused(trained: Run, tmp_path: Path) -> None:
    other = copy(trained, tmp_path / "other")

    def refuses(message: str, *runs: Path, output: Path = tmp_path / "page.html") -> None:
        with pytest.raises(RunError, match=message):
            compare(runs, output)
        assert not (tmp_path / "page.html").exists()

    refuses("at least two runs", trained.path)
    refuses("each named once", trained.path, trained.path / ".." / trained.path.name)
    refuses("there is no run", trained.path, tmp_path)
    refuses("is a folder; expected the name of a page", trained.path, other.path, output=tmp_path)
    table = pyarrow.parquet.read_table(other.predictions("test"))
    pyarrow.parquet.write_table(table.slice(1), other.predictions("test"))
    refuses("not scored on the same images", trained.path, other.path)
    other.report("test").unlink()
    refuses("not scored on the same split: run on test, other on validation", trained.path, other.path)
    other.report("validation").unlink()
    refuses("was not scored yet", trained.path, other.path)


def test_the_command_prints_a_document(trained: Run, tmp_path: Path) -> None:
    two = copy(trained, tmp_path / "two")
    words = ["compare", str(trained.path), str(two.path), "--output", str(tmp_path / "page.html"), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["split"] == "test"
    assert "no difference" in result.stderr and "GFLOP per image" in result.stderr
    assert CliRunner().invoke(app, ["compare", str(trained.path)]).exit_code == 1


def test_operations_are_counted_as_by_hand() -> None:
    torch.manual_seed(0)
    model, _ = load_model(ModelConfig(config=TINY_VIT), ["a", "b", "c"])
    patches, width, inner, layers = 16, 16, 32, 2
    tokens = patches + 1
    linear = tokens * (4 * width * width + 2 * width * inner)
    attention = 2 * tokens * tokens * width
    by_hand = 2 * (patches * 48 * width + layers * (linear + attention) + width * 3)
    assert count_flops(model, (16, 16)) == by_hand
    # ResNet-18 at 224 pixels: torchvision's documentation has 1.81 billion multiplications with additions.
    resnet = {"model_type": "resnet", "layer_type": "basic", "depths": [2, 2, 2, 2]}
    resnet |= {"hidden_sizes": [64, 128, 256, 512], "embedding_size": 64}
    model, _ = load_model(ModelConfig(config=resnet, image_size=224), [str(number) for number in range(1000)])
    assert count_flops(model, (224, 224)) == pytest.approx(2 * 1.81e9, rel=0.01)


def test_serving_is_timed_in_turns_and_leaves_the_models_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vit_finetune.evaluation.speed.SECONDS", 0.0)
    models = {}
    turns: list[str] = []
    for name in ("first", "second"):
        model, _ = load_model(ModelConfig(config=TINY_VIT), ["a", "b"])
        model.train()
        model.register_forward_pre_hook(lambda module, args, name=name: turns.append(name))
        models[name] = model, (16, 16)
    rates = measure_serving(models, 2)
    assert set(rates) == {"first", "second"} and min(rates.values()) > 0
    assert turns == ["first", "second"] * 6  # one round to warm up, five that count
    assert all(model.training for model, _ in models.values())
    ticks = iter(range(10_000))  # by a clock that goes on at each look, twice the images take as long
    monkeypatch.setattr("vit_finetune.evaluation.speed.time.perf_counter", lambda: next(ticks))
    few, many = measure_serving(models, 2), measure_serving(models, 4)
    assert many == {name: 2 * rate for name, rate in few.items()}


@pytest.mark.browser
def test_the_page_fits_a_phone_and_works_from_the_keyboard(
    trained: Run, tmp_path: Path, browser: Browser
) -> None:
    one, two = copy(trained, tmp_path / "one"), copy(trained, tmp_path / "two-with-a-rather-long-name")
    answer(one, {0, 1, 2, 3})
    compare([one.path, two.path, copy(trained, tmp_path / "three").path], tmp_path / "page.html")
    desk = browser.new_page(viewport={"width": 1200, "height": 900})
    desk.goto((tmp_path / "page.html").as_uri())
    pairs = "document.querySelector('#differences .scroll')"
    assert desk.evaluate(f"{pairs}.scrollWidth <= {pairs}.clientWidth"), "the last number is cut off"
    desk.close()
    tab = browser.new_page(viewport={"width": 390, "height": 844}, java_script_enabled=True)
    tab.goto((tmp_path / "page.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "The runs"
    tab.keyboard.press("Enter")
    assert tab.url.endswith("#runs")
    # Whatever is wider than the page can be reached from the keyboard, and so scrolled.
    assert (
        tab.evaluate(
            "[...document.querySelectorAll('.scroll, .chart')].filter(e => e.scrollWidth > e.clientWidth && e.tabIndex < 0).length"
        )
        == 0
    )
    tab.close()
