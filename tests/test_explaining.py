"""`explain` and the maps of a run: what is written where, what is refused, and what stays untouched."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, TINY_VIT, draw_folder, draw_image, tiny_recipe
from fork_server import ForkServer
from labelled_shapes import recipe_of, write_jsonl
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification
from typer.testing import CliRunner

from vit_finetune.cli import app
from vit_finetune.evaluation.attention import (
    GRADIENTS,
    ROLLOUT,
    attention_maps,
    attentions_of,
    gradient_maps,
    mean_attention_distance,
    overlay,
)
from vit_finetune.evaluation.mistakes import _wrong_class
from vit_finetune.evaluation.prediction import predict
from vit_finetune.evaluation.scoring import Scores
from vit_finetune.evaluation.seeing import as_seen
from vit_finetune.explaining import explain, unique_names
from vit_finetune.finetuning import finetune
from vit_finetune.model.loading import load_checkpoint, load_model
from vit_finetune.publishing.report import build_report, write_report
from vit_finetune.recipe import ModelConfig
from vit_finetune.reports import load_report
from vit_finetune.run import Run, RunError


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode in ("RGB", "RGBA")
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images of different sizes and shapes, two of one name."""
    folder = tmp_path / "new"
    for number, (name, size) in enumerate(
        {"a.png": (24, 20), "b.png": (60, 30), "sub/a.png": (17, 90), "wide.jpg": (400, 300)}.items()
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(list(COLOURS.values())[number % 3], number, size).save(folder / name)
    return folder


# --------------------------------------------------------------------------- the verb


def test_it_writes_each_image_and_says_what_it_wrote(
    run: Run, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = explain(run.path, [photos])
    folder = run.path / "explanations"
    assert below(folder) == {
        *(f"{kind}/{name}.png" for kind in ("overlays", "heads") for name in ("a", "b", "a-2", "wide")),
        "sheet-1.png", "attention-distance.png", "explanations.json",
    }  # fmt: skip
    assert json.loads((folder / "explanations.json").read_text()) == document
    assert document["method"] == ROLLOUT and document["images"][0]["overlay"] == "overlays/a.png"
    told = predict(run.path, [photos], top=1)
    for entry, theirs in zip(document["images"], told, strict=True):
        assert entry["path"] == theirs["path"]
        assert entry["label"] == theirs["predictions"][0]["label"]
        assert entry["probability"] == pytest.approx(theirs["predictions"][0]["probability"], abs=1e-6)
    said = capsys.readouterr().err
    assert "4 images explained by attention rollout" in said and str(folder) in said
    for name in ("sheet-1.png", "overlays/", "heads/", "attention-distance.png"):
        assert name in said
    # The overlay and the numbers, by hand for each image.
    model, processor = load_checkpoint(str(run.model))
    distances = []
    for entry in document["images"]:
        image = Image.open(entry["path"]).convert("RGB")
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        cut = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        expected = overlay(as_seen(cut), attention_maps(model, pixel_values)[0])
        assert expected.size == (224, 224)
        assert np.array_equal(pixels(folder / entry["overlay"]), np.asarray(expected))
        distances.append(mean_attention_distance(attentions_of(model, pixel_values), (4, 4), (4, 4)))
    np.testing.assert_allclose(document["mean_attention_distance"], torch.stack(distances).mean(0), atol=6e-4)
    assert document["images"][0].keys() == {"path", "label", "probability", "overlay", "heads"}


def test_a_second_call_replaces_what_the_first_wrote_and_nothing_else(run: Run, photos: Path) -> None:
    folder = photos / "maps"
    explain(run.path, [photos], folder)
    (folder / "overlays" / "mine.png").write_text("mine")
    (folder / "heads" / "wide.txt").write_text("mine")
    explain(run.path, [photos / "wide.jpg", photos], folder)  # its own maps, below it, are no images
    assert {path.name for path in (folder / "overlays").iterdir()} == {
        "mine.png", "wide-2.png", "wide-3.png", "a.png", "b.png", "a-2.png"
    }  # fmt: skip
    assert (folder / "overlays" / "mine.png").read_text() == "mine"
    with pytest.raises(RunError, match=r"the explanations in .* themselves"):
        explain(run.path, [folder / "overlays" / "b.png"], folder)


def test_a_document_from_elsewhere_removes_nothing_outside(run: Run, photos: Path) -> None:
    folder, victim = photos.parent / "maps", photos / "wide.jpg"
    explain(run.path, [photos / "a.png"], folder)
    document = json.loads((folder / "explanations.json").read_text())
    document["sheets"] = ["../new/wide.jpg", "explanations.json", str(victim), 7]
    document["images"] = [{"overlay": "overlays/../../new/wide.jpg", "heads": "heads/../../new/b.png"}]
    (folder / "explanations.json").write_text(json.dumps(document))
    explain(run.path, [photos / "a.png"], folder)
    assert victim.is_file() and (photos / "b.png").is_file()


@pytest.mark.parametrize("document", [None, "[]", "{}", "not json", '{"sheets": [], "images": [1]}'])
def test_a_folder_of_something_else_is_left_alone(run: Run, photos: Path, document: str | None) -> None:
    folder = photos.parent / "thesis"
    folder.mkdir()
    (folder / "sheet-1.png").write_text("mine")
    if document is not None:
        (folder / "explanations.json").write_text(document)
    before = below(folder)
    with pytest.raises(
        RunError, match=r"thesis holds no explanations .*write to another folder with --output"
    ):
        explain(run.path, [photos], folder)
    assert below(folder) == before and (folder / "sheet-1.png").read_text() == "mine"
    with pytest.raises(RunError, match=r"a\.png is a file; expected a folder"):
        explain(run.path, [photos], photos / "a.png")


def test_an_image_that_cannot_be_read_stops_it_before_anything_is_written(run: Run, photos: Path) -> None:
    (photos / "zz.png").write_bytes((photos / "b.png").read_bytes()[:300])
    with pytest.raises(RunError, match=r"zz\.png: cannot be read: truncated"):
        explain(run.path, [photos])
    assert not (run.path / "explanations").exists()
    with pytest.raises(RunError, match=r"nowhere\.png: no such file"):
        explain(run.path, [photos / "nowhere.png"])


def test_hostile_names_stay_below_the_folder(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    names = [
        "-rf.png", "<img src=x onerror=alert(1)>.png", "$\\frac{$.png", "a\nb\x1b[31m.png", "猫 & 犬.png",
        "長" * 80 + ".png", "CON .png", "%s{0}.png", "\u202egnp.exe.png",
    ]  # fmt: skip
    for number, name in enumerate(names):
        draw_image((200, 30, 40), number).save(folder / name)
    not_utf8 = tmp_path / os.fsdecode(b"\xff\xfe.png")
    draw_image((200, 30, 40), 99).save(not_utf8)
    document = explain(run.path, [folder, not_utf8], tmp_path / "out")
    assert len(document["images"]) == len(names) + 1
    written = below(tmp_path / "out")
    assert len(written) == 2 * len(document["images"]) + 2 + 2  # two sheets, the chart and the document
    assert all(
        re.fullmatch(r"[\w./-]+", name) and not Path(name).name.startswith((".", "-")) for name in written
    )
    assert {path.name for path in tmp_path.iterdir()} >= {"evil", "out"}
    json.loads((tmp_path / "out" / "explanations.json").read_text(encoding="utf-8"))


def test_names_are_unique_whatever_the_file_system_tells_apart() -> None:
    paths = [
        Path(name) for name in ("a/X.png", "b/x.jpg", "x-2.png", "../../etc/passwd", ".png", "...", "c/x.gif")
    ]
    assert unique_names(paths, ["PASSWD"]) == ["X", "x-2", "x-2-2", "passwd-2", "png", "image", "x-3"]


def test_the_command_line(run: Run, photos: Path, forks: ForkServer, tmp_path: Path) -> None:
    words = ("explain", run.path, photos / "b.png", "--output", tmp_path / "out")
    child = forks.start(tmp_path / "said", *words, "--json")
    assert child.wait() == 0, child.stderr
    document = json.loads((tmp_path / "said" / "stdout").read_text())
    assert document == json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert "1 image explained by attention rollout" in child.stderr and "its map" in child.stderr
    child = forks.start(tmp_path / "again", *words)
    assert child.wait() == 0 and (tmp_path / "again" / "stdout").read_text() == ""
    child = forks.start(tmp_path / "refused", "explain", run.path, photos, "--output", photos)
    assert child.wait() == 1
    assert child.stderr.startswith("error: ") and "Traceback" not in child.stderr


@pytest.mark.slow
def test_the_commands_of_the_page_run(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "seeing.md").read_text(encoding="utf-8")
    monkeypatch.chdir(run.path.parent)
    Path("runs").mkdir()
    run.path.rename("runs/photos")
    photos.rename("photos")
    for name in ("new-photos", "you"):
        Path(name).mkdir()
    shutil.copy("photos/b.png", "new-photos/b.png")
    shutil.copy("photos/b.png", "photo.jpg")
    shutil.copytree(
        "runs/photos/model", "you/photos"
    )  # the Hub's model, as far as a test without a Hub has one
    shutil.copytree("runs/photos/model", "vits14")
    commands = [line.split(" #")[0] for line in page.splitlines() if line.startswith("vit-finetune ")]
    assert len(commands) == 3
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}"
    script = re.search(r'^python -c "\n(.*?)^"$', page, re.MULTILINE | re.DOTALL)
    assert script is not None
    done = subprocess.run([sys.executable, "-c", script[1]], capture_output=True, text=True, check=True)
    *layers, uniform = done.stdout.splitlines()
    assert len(layers) == 2 and float(uniform) > 0


# --------------------------------------------------------------------------- other models


def saved_resnet(folder: Path, image_size: int = 32) -> Path:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.id2label, config.label2id = dict(enumerate(COLOURS)), {name: n for n, name in enumerate(COLOURS)}
    model = ResNetForImageClassification(config)
    model.save_pretrained(folder)
    _, processor = load_model(ModelConfig(config={**TINY_VIT, "image_size": image_size}), ["x", "y"])
    processor.save_pretrained(folder)
    return folder


def test_a_resnet_is_explained_by_gradients(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved_resnet(tmp_path / "resnet")
    document = explain(path, [photos])
    folder = tmp_path / "explanations"  # of a model, here
    assert document["method"] == GRADIENTS and "mean_attention_distance" not in document
    assert not (folder / "heads").exists() and not (folder / "attention-distance.png").exists()
    assert (folder / "sheet-1.png").is_file() and len(list((folder / "overlays").iterdir())) == 4
    model, processor = load_checkpoint(str(path))
    entry = document["images"][1]
    pixel_values = processor(Image.open(entry["path"]).convert("RGB"), return_tensors="pt")["pixel_values"]
    cut = processor(
        Image.open(entry["path"]).convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="pt"
    )
    number = torch.tensor([model.config.label2id[entry["label"]]])
    expected = overlay(as_seen(cut["pixel_values"][0]), gradient_maps(model, pixel_values, number)[0])
    assert np.array_equal(pixels(folder / entry["overlay"]), np.asarray(expected))


def test_images_too_small_for_a_map_are_refused(photos: Path, tmp_path: Path) -> None:
    path = saved_resnet(tmp_path / "resnet", image_size=4)
    with pytest.raises(
        RunError, match=r"resnet: .* 4 x 4 pixels; expected a model with attention, or larger images"
    ):
        explain(path, [photos], tmp_path / "out")


# --------------------------------------------------------------------------- the run and its report


def test_a_run_keeps_the_maps_of_its_mistakes_and_how_far_heads_look(trained: Run) -> None:
    report = load_report(trained.report("test"))
    seeing = json.loads(trained.seeing.read_text())
    assert seeing["method"] == ROLLOUT and seeing["image_size"] == [16, 16] and seeing["patch_size"] == [4, 4]
    assert np.shape(seeing["mean_attention_distance"]) == (2, 2)
    by_hand = np.mean([np.hypot(a - c, b - d) for a, b, c, d in np.ndindex(4, 4, 4, 4)]) * 4
    assert seeing["uniform_distance"] == pytest.approx(by_hand, abs=1e-3)
    assert 0 < seeing["images"] <= 16
    assert report.worst_mistakes, "the tiny model makes some"
    for number, mistake in enumerate(report.worst_mistakes):
        assert mistake.map == f"mistake-{number:02}-map.jpg"
        with Image.open(trained.pictures / mistake.map) as image:
            assert image.size == (224, 224)
    html = trained.report_html.read_text()
    assert html.count('alt="Where the model looked in ') == len(report.worst_mistakes)
    assert "Where the model looks</h2>" in html and "attention rollout" in html
    assert len(html.encode()) < 5_000_000


def test_the_report_of_an_older_run_has_no_maps(run: Run) -> None:
    report = load_report(run.report("test"))
    older = [mistake.model_copy(update={"map": None}) for mistake in report.worst_mistakes]
    run.report("test").write_text(report.model_copy(update={"worst_mistakes": older}).to_json())
    run.seeing.unlink()
    html = build_report(run)
    assert "Where the model looks" not in html and "Where the model looked" not in html
    assert "Below each" not in html


def test_a_map_from_elsewhere_is_not_pulled_into_the_page(run: Run, tmp_path: Path) -> None:
    draw_image((1, 2, 3), 0).save(tmp_path / "secret.png")
    report = load_report(run.report("test"))
    stolen = [mistake.model_copy(update={"map": "../../secret.png"}) for mistake in report.worst_mistakes]
    run.report("test").write_text(report.model_copy(update={"worst_mistakes": stolen}).to_json())
    assert "Where the model looked" not in write_report(run).read_text()


@pytest.mark.slow
def test_a_resnets_run_has_gradient_maps_and_no_distances(tmp_path: Path) -> None:
    draw_folder(tmp_path / "photos")
    small = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    recipe = tiny_recipe(
        tmp_path / "photos",
        tmp_path / "run",
        model={"config": small | {"layer_type": "basic"}, "image_size": 32},
        training={"num_train_epochs": 1, "learning_rate": 1e-9},
    )
    run = finetune(recipe)
    assert json.loads(run.seeing.read_text()) == {"method": GRADIENTS}
    html = run.report_html.read_text()
    mistakes = load_report(run.report("test")).worst_mistakes
    assert mistakes and html.count('alt="Where the model looked in ') == len(mistakes)
    assert "by gradients" in html and "Where the model looks</h2>" not in html


@pytest.mark.slow
def test_several_labels_have_maps_too(tmp_path: Path) -> None:
    table = write_jsonl(tmp_path / "shapes", 40)
    run = finetune(recipe_of(table, tmp_path / "run", training={"num_train_epochs": 1}))
    mistakes = load_report(run.report("test")).worst_mistakes
    assert mistakes and all((run.pictures / str(mistake.map)).is_file() for mistake in mistakes)
    image = next((tmp_path / "shapes").rglob("*.png"))
    document = explain(run.path, [image])
    assert document["images"][0]["label"] in load_report(run.report("test")).labels
    assert (run.path / "explanations" / "sheet-1.png").is_file()


def test_of_several_labels_the_surest_wrong_one_is_explained(trained: Run) -> None:
    class Threshold:
        def __init__(self, threshold: float) -> None:
            self.threshold = threshold

    from vit_finetune.reports import MultiLabelReport

    report = MultiLabelReport.model_construct(
        per_class={name: Threshold(t) for name, t in zip("abc", (0.5, 0.95, 0.2))}
    )
    # b is 0.9 from the truth, and right by its threshold; a is wrong by 0.6, c by 0.7.
    scores = Scores(
        report, ["x"], np.array([[0, 0, 1]]), np.array([[0.6, 0.9, 0.15]], np.float32), np.zeros((1, 3))
    )
    assert _wrong_class(scores, 0) == 2
    single = Scores(
        load_report(trained.report("test")),
        ["x"],
        np.array([0]),
        np.array([[0.2, 0.1, 0.7]]),
        np.zeros((1, 3)),
    )
    assert _wrong_class(single, 0) == 2


def test_a_call_that_was_stopped_is_repeated(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ctrl-C leaves is known for ours, and replaced."""
    for name in ("a", "b"):
        draw_image((200, 10, 10), 0, (16, 16)).save(tmp_path / f"{name}.png")
    images, folder = [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "looked"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("vit_finetune.explaining.save_sheet", stop)
        explain(run.path, images, folder)
    explain(run.path, images, folder)
    assert {path.name for path in (folder / "overlays").iterdir()} == {"a.png", "b.png"}
