"""What people get wrong: one clear message, its exit code, and nothing half written."""

from __future__ import annotations

import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import COLOURS, TINY_VIT, draw_folder, draw_image
from test_cli import call, files_below, say, write_recipe


def refused(tmp_path: Path, data: Path | str, *overrides: str) -> str:
    """What `train` says about this data; makes sure that it is one error and that nothing was written."""
    recipe = write_recipe(tmp_path / "tiny.yaml", Path(data), tmp_path / "run")
    before = files_below(tmp_path)
    done = say("train", recipe, *overrides)
    assert done.exit_code == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert "--debug" not in done.stderr, "an error that nobody foresaw"
    assert not (tmp_path / "run").exists()
    assert files_below(tmp_path) == before
    archives = Path(os.environ["VIT_FINETUNE_CACHE"]) / "archives"
    assert not archives.exists() or not list(archives.iterdir())
    return done.stderr.removeprefix("error: ")


# --------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "digitz"],
            "digitz: no such recipe file, and no bundled recipe of that name. Did you mean `digits`?",
        ),
        (
            ["train", "digits", "training.learning_rat=1"],
            "training.learning_rat is not a recipe key; did you mean",
        ),
        (["train", "digits", "training.seed=many"], "training.seed: found 'many', expected a whole number"),
    ],
)
def test_a_recipe_that_cannot_be_used(words: list[str], said: str) -> None:
    for done in (call(*words), call("check", *words[1:])):
        assert done.returncode == 2
        assert done.stdout == ""
        assert said in done.stderr
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert not list(Path().iterdir())


# --------------------------------------------------------------------------- the data


def test_data_that_is_not_there(tmp_path: Path) -> None:
    said = refused(tmp_path, tmp_path / "nowhere")
    assert said.startswith(f"{tmp_path / 'nowhere'}: no such folder or file. Expected a folder of images")
    assert "data.path=" in said


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert f"{tmp_path / 'photos'}: found no images" in refused(tmp_path, tmp_path / "photos")


def test_one_class_only(tmp_path: Path) -> None:
    said = refused(tmp_path, draw_folder(tmp_path / "photos", classes=1))
    assert "found one class only ('blue'). Expected at least two" in said


def test_a_class_with_one_image(tmp_path: Path) -> None:
    photos = draw_folder(tmp_path / "photos", classes=2)
    (photos / "rare").mkdir()
    draw_image((0, 0, 0), 1).save(photos / "rare" / "only.png")
    said = refused(tmp_path, photos)
    assert "1 of 3 classes" in said
    assert "too few images" in said
    assert "rare (1)" in said


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be this large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def truncated_jpeg() -> bytes:
    draw_image((200, 10, 10), 5, size=(200, 200)).save("whole.jpg")
    whole = Path("whole.jpg").read_bytes()
    return whole[: len(whole) // 2]


UNREADABLE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "nothing": ("nothing.png", lambda: b"", "0 bytes"),
    "truncated": ("half.jpg", truncated_jpeg, "truncated JPEG"),
    "text": ("notes.jpg", lambda: b"Dear diary,\n", "not an image"),
    "bomb": ("bomb.png", lambda: png_header(40_000, 40_000), "decompression bomb"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_image_that_cannot_be_read(kind: str, folder: Path, tmp_path: Path) -> None:
    name, make, problem = UNREADABLE[kind]
    (folder / "red" / name).write_bytes(make())
    said = refused(tmp_path, folder)
    assert f"{folder}: 1 of 37 images " in said
    assert f"\n  red/{name}: {problem}" in said
    assert "data.on_unreadable=skip" in said


def test_all_unreadable_images_are_listed_at_once_and_skipped_if_asked(folder: Path, tmp_path: Path) -> None:
    for name, make, _ in UNREADABLE.values():
        (folder / "red" / name).write_bytes(make())
    said = refused(tmp_path, folder)
    assert "3 of 40 images cannot be read" in said and "1 of 40 images are truncated" in said
    assert {line.split(":")[0].strip() for line in said.splitlines() if line.startswith("  ")} == {
        f"red/{name}" for name, _, _ in UNREADABLE.values()
    }
    done = say("check", tmp_path / "tiny.yaml", "data.on_unreadable=skip")
    assert done.exit_code == 0, done.stderr
    assert "3 of 40 images cannot be read, and left out" in " ".join(done.stderr.split())
    for name, _, problem in UNREADABLE.values():
        assert name in done.stderr and problem.split()[0] in done.stderr


@pytest.mark.parametrize("name", ["../evil.png", "photos/../../evil.png", "/tmp/evil.png", "..\\evil.png"])
def test_a_zip_with_names_that_lead_outside(name: str, folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
        archive.writestr(name, b"evil")
    said = refused(tmp_path, tmp_path / "photos.zip")
    shown = name.replace("\\", "/")
    assert (
        f"{tmp_path / 'photos.zip'}: holds a file named {shown!r}, which points outside the archive" in said
    )
    assert not list(Path(os.environ["VIT_FINETUNE_CACHE"]).rglob("*.png"))


def test_a_tar_with_a_name_that_leads_outside(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(folder, "photos")
        archive.add(folder / "red" / "0.png", "photos/../../evil.png")
    assert "'photos/../../evil.png', which points outside" in refused(tmp_path, tmp_path / "photos.tar")


def test_a_broken_archive(folder: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "photos"), "zip", folder)
    whole = (tmp_path / "photos.zip").read_bytes()
    (tmp_path / "photos.zip").write_bytes(whole[:-40])
    assert "photos.zip: not a readable archive" in refused(tmp_path, tmp_path / "photos.zip")


def test_classes_that_differ_between_splits(tmp_path: Path) -> None:
    draw_folder(tmp_path / "photos" / "train", classes=3)
    draw_folder(tmp_path / "photos" / "test", classes=3)
    (tmp_path / "photos" / "test" / "red").rename(tmp_path / "photos" / "test" / "crimson")
    said = refused(tmp_path, tmp_path / "photos")
    assert "the classes of test differ from those of train" in said
    assert "'crimson' is only in test" in said
    assert "'red' only in train" in said


# --------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "model.image_size=18",
            "a height of 18 pixels is not a multiple of the patch size 4; write 16 or 20",
        ),
        (
            "model.config.hiden_size=8",
            "model.config.hiden_size is not a key of ViTConfig; did you mean hidden_size?",
        ),
        (
            "model.config.num_labels=3",
            "model.config.num_labels: the classes come from the data; leave it out",
        ),
        ("model.config.model_type=vitt", "transformers knows no 'vitt'"),
        ("model.config.num_attention_heads=3", "attention heads"),
    ],
)
def test_a_model_that_cannot_be_built(override: str, said: str, folder: Path, tmp_path: Path) -> None:
    recipe_size = ["model.config.image_size=null"] if "image_size" in override else []
    assert said in refused(tmp_path, folder, override, *recipe_size)


def saved_model(path: Path) -> Path:
    """A tiny model folder, complete."""
    from vit_finetune.model.loading import load_model
    from vit_finetune.recipe import ModelConfig

    model, image_processor = load_model(ModelConfig(config=TINY_VIT), ["blue", "green", "red"])
    model.save_pretrained(path)
    image_processor.save_pretrained(path)
    return path


def without_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return "there are no weights; expected model.safetensors beside config.json"


def pickled(model: Path) -> str:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return "the weights are pickles (pytorch_model.bin), which can run code when loaded: refused. Expected model.safetens"


def damaged(model: Path) -> str:
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return "the weights file is damaged"


@pytest.mark.parametrize("spoil", [without_weights, pickled, damaged])
def test_a_model_folder_that_cannot_be_loaded(
    spoil: Callable[[Path], str], folder: Path, tmp_path: Path
) -> None:
    model = saved_model(tmp_path / "model")
    expected = spoil(model)
    overrides = ["model.config=null", f"model.path={model}"]
    assert f"{model}: {expected}" in refused(tmp_path, folder, *overrides)
    for words in (["evaluate", model, "--data", folder], ["predict", model, folder / "red" / "0.png"]):
        done = say(*words, "--json")
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: {model}: {expected}")


def test_a_model_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    said = refused(tmp_path, folder, "model.config=null", f"model.path={tmp_path / 'nothing'}")
    assert f"{tmp_path / 'nothing'}: no such model folder" in said
    done = say("predict", tmp_path / "nothing", folder)
    assert done.exit_code == 1
    assert f"{tmp_path / 'nothing'}: no such model folder" in done.stderr


def test_a_run_without_a_model_is_not_sought_on_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `photos/model` would be the id of somebody's repository."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir(exist_ok=True)
    Path("photos", "recipe.yaml").write_text("data: {path: digits}")
    done = say("predict", "photos", folder)
    assert done.exit_code == 1 and "photos: the run has no model yet" in done.stderr


# --------------------------------------------------------------------------- the output folder


@pytest.mark.parametrize("name", ["recipe.yaml", "notes.txt"])
def test_an_output_folder_in_use(name: str, folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", folder, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("keep me")
    before = files_below(tmp_path)
    for verb in ("train", "check"):
        done = say(verb, recipe)
        if (verb, name) == ("check", "recipe.yaml"):
            shutil.rmtree(tmp_path / "run-checkup")  # looking at what a finished run did is fine
            continue
        assert done.exit_code == 1
        assert done.stderr.startswith(f"error: {tmp_path / 'run'} ")
        assert "training.output_dir=" in done.stderr
        assert done.stderr.count("error: ") == 1
    assert files_below(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "kept"),
    [
        ("16k", set()),  # nothing but the recipe has room
        ("2m", {"recipe.yaml", "provenance.json"}),  # a checkpoint's weights have none
        ("9m", {"recipe.yaml", "provenance.json"}),  # its optimizer has none
        # model/ has none
        ("17m", {"recipe.yaml", "provenance.json", "checkpoints/checkpoint-5/trainer_state.json"}),
    ],
)
def test_a_disk_that_fills_up_while_saving(
    size: str, kept: set[str], folder: Path, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk(f"size={size}")
    (disk / "earlier.txt").write_text("keep me")
    recipe = write_recipe(tmp_path / "tiny.yaml", folder, disk / "run", num_train_epochs=1)
    # 4.8 MB of weights; its optimizer takes twice that
    words = [recipe, "model.config.hidden_size=128", "model.config.num_hidden_layers=16"]
    words += [
        "model.config.num_attention_heads=4",
        "training.eval_strategy=no",
        "training.load_best_model_at_end=false",
    ]
    done = call("train", *words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: the disk is full")
    assert "--resume" in errors[0]
    found = set(files_below(disk))
    assert (disk / "earlier.txt").read_text() == "keep me"
    assert {f"run/{name}" for name in kept} <= found
    assert not (disk / "run" / "model").exists()
    whole = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"}
    for checkpoint in (disk / "run" / "checkpoints").glob("*"):
        assert whole <= {path.name for path in checkpoint.iterdir()}, "half a checkpoint"
    left = [path for path in disk.rglob("*") if path.name.startswith((".", "tmp"))]
    assert not left, "a temporary file or folder"
    small_disk("size=64m")
    if not kept:
        return
    again = call("train", *words, "--resume")
    assert again.returncode == 0, again.stderr
    assert (disk / "run" / "report.html").is_file()


# --------------------------------------------------------------------------- names with HTML in them


class _Elements(HTMLParser):
    """The elements of a page with their attributes, and the text inside scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts += data


@pytest.mark.slow
def test_html_in_class_and_file_names_is_escaped(tmp_path: Path) -> None:
    image = "<img src=x onerror=alert(1)>"
    labels = ["<script>alert(1)</script>", '"><b onclick="alert(2)">']
    photos = tmp_path / "photos"
    photos.mkdir()
    rows = []
    for number in range(24):
        name = f"{image}{number}.png"
        draw_image(COLOURS["red"], number).save(photos / name)  # all alike: half of them become mistakes
        quoted = labels[number % 2].replace('"', '""')
        rows.append(f'{name},"{quoted}"')
    (photos / "metadata.csv").write_text("\n".join(["file_name,label", *rows, ""]))
    recipe = write_recipe(tmp_path / "tiny.yaml", photos, tmp_path / "run")
    done = say("train", recipe)
    assert done.exit_code == 0, done.stderr
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    card = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    page = _Elements()
    page.feed(report)
    assert "alert(" not in page.scripts
    for tag, attributes in page.found:
        assert not any(name.startswith("on") for name in attributes), tag
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in report
    assert "&lt;img src=x onerror=alert(1)&gt;" in report
    for text in (report, card):
        assert "<script>alert" not in text
        assert "<b onclick" not in text
        assert image not in text
    assert "alert(1)" in card


@pytest.mark.slow
def test_html_in_a_folder_name_is_escaped(tmp_path: Path) -> None:
    photos = draw_folder(tmp_path / "photos", classes=2)
    (photos / "blue").rename(photos / "<svg onload=alert(3)>")
    done = say("train", write_recipe(tmp_path / "tiny.yaml", photos, tmp_path / "run"))
    assert done.exit_code == 0, done.stderr
    for path in (tmp_path / "run" / "report.html", tmp_path / "run" / "model" / "README.md"):
        assert "<svg onload" not in path.read_text(encoding="utf-8"), path
