"""Data to and from the Hub: what is published is what is there, and is read as what it was."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from conftest import TINY_VIT, Say, draw_folder, draw_image, tiny_recipe
from fork_server import IMPATIENT
from huggingface_hub import DatasetCard
from loopback_hub import LoopbackHub, Repo

from vit_finetune.evaluation.images import other_data
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import DataConfig, ModelConfig, RecipeError, build_recipe
from vit_finetune.run import Run

ODD = 'red "x|y" 🎉 `z` *b*'
SMALL_FILES = (
    "\nfrom vit_finetune.publishing import dataset\ndataset.FILE_BYTES, dataset.GROUP_IMAGES = 5000, 5\n"
)


def write_recipe(folder: Path, path: object, name: str, **data: Any) -> tuple[Path, Run]:
    """A recipe file and the run that it will make."""
    run = Run(folder / name)
    recipe = tiny_recipe(str(path), run.path, data=data, training={"num_train_epochs": 1})
    file = folder / f"{name}.yaml"
    file.write_text(recipe.to_yaml(resolved=False))
    return file, run


def write_repository(repo: Repo, folder: Path) -> Path:
    """The files of a repository, to be loaded without a Hub."""
    for name, content in repo.files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.hub
@pytest.mark.slow
def test_a_folder_is_the_same_data_up_and_down_again(hub: LoopbackHub, say: Say, tmp_path: Path) -> None:
    photos = draw_folder(tmp_path / "photos")
    (photos / "red").rename(photos / ODD)
    (photos / "blue" / "copy.png").write_bytes((photos / "blue" / "0.png").read_bytes())

    # Up: several files, in one commit, and none for what is there already.
    code, _, told = say("upload-data", photos, "ann/photos", "--license", "cc0-1.0", before=SMALL_FILES)
    assert code == 0, told
    repo = hub.repo("ann/photos", "dataset")
    assert [commit.title for commit in repo.commits()] == ["Upload 37 images of 3 classes", "initial commit"]
    parquet = sorted(name for name in repo.files() if name.startswith("data/"))
    assert (
        len(parquet) > 2 and f"verified: {len(parquet) + 1} files" in told and "data.path=ann/photos" in told
    )
    first = repo.commits()[0].id
    code, _, told = say("upload-data", photos, "ann/photos", "--license", "cc0-1.0", before=SMALL_FILES)
    assert code == 0 and "all there already" in told and repo.commits()[0].id == first, told

    # What `datasets` makes of it.
    loaded = datasets.load_dataset(str(write_repository(repo, tmp_path / "copy")))
    rows = loaded["train"].cast_column("image", datasets.Image(decode=False))
    names = rows.features["label"].names
    assert names == ["blue", "green", ODD] and len(rows) == 37
    for row in rows:
        assert row["image"]["bytes"] == (photos / row["file_name"]).read_bytes()
        assert names[row["label"]] == row["file_name"].partition("/")[0]
    card = DatasetCard(repo.files()["README.md"].decode())
    assert card.data.license == "cc0-1.0" and "vit-finetune" in card.data.tags
    assert card.data.dataset_info["splits"][0]["num_examples"] == 37
    assert card.data.dataset_info["download_size"] == sum(len(repo.files()[name]) for name in parquet)
    assert '| red "x&#124;y" 🎉 &#96;z&#96; \\*b\\* | 12 |' in card.text
    assert "blue/copy.png" in card.text and "No image tells where it was taken" in card.text
    assert str(tmp_path) not in card.content

    # Down: a run on it is the run on the folder.
    here, by_folder = write_recipe(tmp_path, photos, "by-folder")
    there, by_id = write_recipe(tmp_path, "ann/photos", "by-id")
    for recipe in (here, there):
        code, _, told = say("train", recipe)
        assert code == 0, told
    for name in ("splits/train.csv", "splits/validation.csv", "splits/test.csv", "reports/test.json"):
        assert (by_id.path / name).read_bytes() == (by_folder.path / name).read_bytes(), name
    found, same = (json.loads(run.findings.read_text()) for run in (by_id, by_folder))
    assert found["findings"] == same["findings"]
    facts = by_id.read_provenance()["data"]
    assert facts["revision"] == first and facts["splits"] == by_folder.read_provenance()["data"]["splits"]
    assert {split["origin"] for split in facts["splits"].values()} == {"carved"}

    # As it arrives.
    stream, by_stream = write_recipe(tmp_path, "ann/photos", "by-stream", streaming=True)
    code, _, told = say("train", stream)
    assert code == 0, told
    facts = by_stream.read_provenance()["data"]
    assert facts["revision"] == first and facts["splits"]["test"]["origin"] == "carved"

    # Fewer images: in other files, of which the old ones are gone, but not what others put there.
    hub.store.add(repo, "main", "bob", "A note", files={"data/notes.txt": repo.objects.regular(b"mine")})
    gone = (by_id.splits / "test.csv").read_text().splitlines()[1].split(",")[0]
    (photos / gone).unlink()
    code, _, told = say("upload-data", photos, "ann/photos")
    assert code == 0 and f"{len(parquet)} of an earlier upload deleted" in told, told
    assert set(repo.files()) == {
        *(".gitattributes", "README.md", "data/notes.txt", "data/train-00000-of-00001.parquet")
    }
    assert len(repo.commits()) == 4

    # The run is scored on what it was made of, not on what is there now.
    code, out, told = say("evaluate", by_id.path, "--json")
    assert code == 0, told
    assert (
        json.loads(out)["num_images"]
        == json.loads((by_id.path / "reports/test.json").read_text())["num_images"]
    )
    # Into an empty cache, with faults that pass: of all that the clients have to say, only ours is shown.
    hub.fault("GET", "/api/datasets/ann/photos", status=503)
    hub.fault("GET", "/content/", drop_response_after=100)
    words = ("evaluate", by_id.path, "--data", "ann/photos")
    code, _, told = say(*words, user="bob", before=IMPATIENT)
    assert code == 0 and "looking at ann/photos: the Hub answers 503; trying again" in told, told
    assert "Generating" not in told and "://" not in told
    code, _, told = say(*words, user="bob", HF_HUB_OFFLINE="1")
    commit = repo.commits()[0].id
    assert code == 0 and f"HF_HUB_OFFLINE is set; taken from the cache, commit {commit}" in told, told
    assert "latest cached" not in told

    (photos / "blue" / "empty.png").write_bytes(b"")
    code, _, told = say("upload-data", photos, "ann/photos")
    assert code == 1 and "blue/empty.png: 0 bytes" in told and len(repo.commits()) == 4

    # Where the Hub ceases to answer, an old copy in the cache is not taken for the new one.
    hub.fault("GET|HEAD", "/resolve/", status=403, times=50)
    code, _, told = say("check", there)
    assert code == 1 and f"the cache holds {first}" in told, told


@pytest.mark.hub
def test_what_the_hub_does_not_give_is_one_message(hub: LoopbackHub, say: Say, tmp_path: Path) -> None:
    hub.token("bob")
    hub.create("bob/secret", "dataset", private=True, files={"data/train.csv": b"a"})
    hub.create(
        "bob/gated",
        "dataset",
        gated=True,
        files={"README.md": b"---\nlicense: mit\n---\n", "data/train.csv": b"a"},
    )
    hub.create("bob/open", "dataset", files={"data/train.csv": b"a"})
    subsets = "".join(f"- config_name: {name}\n  data_files: {name}.csv\n" for name in "xy")
    several = {"README.md": f"---\nconfigs:\n{subsets}---\n".encode(), "x.csv": b"a", "y.csv": b"a"}
    hub.create("bob/several", "dataset", files=several)

    def message(path: str, *words: str, user: str | None = "ann", streams: bool = False, **told: str) -> str:
        recipe, _ = write_recipe(tmp_path, path, "run", **({"streaming": True} if streams else {}))
        code, _, said = say("check", recipe, *words, user=user, before=IMPATIENT, **told)
        assert code == 1 and said.count("error: ") == 1, said
        return said

    assert "bob/secret: there is no such dataset on the Hub, or it is a private one" in message("bob/secret")
    assert "that needs a token" in message("bob/secret", user=None)
    for streams in (False, True):
        assert "bob/gated is gated: its owners decide" in message("bob/gated", streams=streams)
        assert "bob/several has the subsets x, y. Set data.subset" in message("bob/several", streams=streams)
    assert "bob/several has the subsets x, y, and no z" in message("bob/several", "data.subset=z")
    assert "bob/open has no branch, tag or commit 'v9'" in message("bob/open", "data.revision=v9")
    assert "HF_HUB_OFFLINE keeps" in message("bob/open", HF_HUB_OFFLINE="1")
    hub.kill()
    assert f"the Hub ({hub.url}) cannot be reached" in message("bob/open")


@pytest.mark.hub
def test_a_model_with_its_image_processor_in_the_processor(
    hub: LoopbackHub, say: Say, tmp_path: Path
) -> None:
    """As transformers 5 writes it for models that take text too, such as CLIP."""
    for part in load_model(ModelConfig(config=TINY_VIT), ["blue", "red"]):
        part.save_pretrained(tmp_path / "model")
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    whole = {
        "processor_class": "CLIPProcessor",
        "image_processor": json.loads(files.pop("preprocessor_config.json")),
    }
    hub.create("ann/model", files=files | {"processor_config.json": json.dumps(whole).encode()})
    draw_image((1, 2, 3), 5).save(tmp_path / "0.png")
    code, out, told = say("predict", "ann/model", tmp_path / "0.png", "--json")
    assert code == 0 and len(json.loads(out)[0]["predictions"]) == 2, told


@pytest.mark.hub
def test_a_dataset_does_not_decide_which_files_of_this_machine_are_read(
    hub: LoopbackHub, say: Say, tmp_path: Path
) -> None:
    home = str(tmp_path / "a (home)")
    draw_image((7, 7, 7), 7).save(tmp_path / "secret.png")
    photos = draw_folder(tmp_path / "photos")
    (photos / "blue" / "0.png").rename(photos / "blue" / "12:30..png")
    files = {f"{path.relative_to(photos)}": path.read_bytes() for path in photos.rglob("*.png")}
    hub.create("bob/files", "dataset", files=files)
    shutil.copytree(photos, tmp_path / "packed")
    table = "".join(f"{name},{name.split('/')[0]}\n" for name in files)
    (tmp_path / "packed" / "metadata.csv").write_text(f"file_name,label\n{table}")
    archive = shutil.make_archive(str(tmp_path / "train"), "zip", tmp_path / "packed")
    hub.create("bob/zip", "dataset", files={"train.zip": Path(archive).read_bytes()})
    recipe, _ = write_recipe(tmp_path, "bob/files", "run")
    for path in ("bob/files", "bob/zip"):  # the client has put them where they are
        code, _, told = say(
            "check", recipe, f"data.path={path}", "--output", tmp_path / "checkup", HF_HOME=home
        )
        assert code == 0, told
    inside = f"{home}/hub/datasets--bob--names/../../../secret.png"
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    packed = f"zip://red/0.png::{archive}"
    for name in (f"{tmp_path}/secret.png", "../secret.png", inside, packed, f"{packed}::{inside}"):
        rows = {"image": [{"bytes": None, "path": name}] * 6, "label": [0, 1] * 3}
        split = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        written = io.BytesIO()
        pq.write_table(split.data.table, written)
        hub.store.repos.pop(("dataset", "bob/names"), None)
        hub.create("bob/names", "dataset", files={"data/train.parquet": written.getvalue()})
        for words in (("check", recipe, "data.path=bob/names"), ("upload-data", "bob/names", "ann/names")):
            code, _, told = say(*words, HF_HOME=home)
            assert code == 1 and "bob/names: holds the name of a file" in told, told


@pytest.mark.hub
def test_a_full_disk_is_one_message(
    hub: LoopbackHub, say: Say, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    photos, disk = tmp_path / "photos", small_disk("size=1m")
    for name in ("blue", "red"):
        (photos / name).mkdir(parents=True)
        for number in range(4):
            draw_image((9, 9, 9), number + 9 * len(name), (300, 300)).save(photos / name / f"{number}.png")
    words = ("upload-data", photos, "ann/photos")
    code, _, told = say(*words, VIT_FINETUNE_CACHE=str(disk))
    assert code == 1 and told.startswith("error: the disk is full") and not hub.store.repos
    assert not list(disk.rglob("train-*")), "what is given up leaves the disk as it was"
    assert say(*words)[0] == 0
    recipe, _ = write_recipe(tmp_path, "ann/photos", "run")
    for place in ("HF_HOME", "HF_DATASETS_CACHE"):  # as it is downloaded, and as it is unpacked
        code, _, told = say("check", recipe, **{place: str(disk / place)})
        assert code == 1 and told.startswith("error: the disk is full") and told.count("\n") == 1, told
        shutil.rmtree(disk / place)
    small_disk("size=40m")
    code, _, told = say("check", recipe, HF_HOME=str(disk))
    assert code == 0, told


def test_a_path_names_no_revision() -> None:
    with pytest.raises(RecipeError, match="write path ann/photos and revision v2"):
        build_recipe({"data": {"path": "ann/photos@v2"}, "model": {"config": {}}}, name="x")


def test_other_data_takes_over_only_what_means_the_same_there() -> None:
    own = DataConfig(
        path="ann/a", subset="s", revision="v1", image_column="i", label_column="l", on_unreadable="skip"
    )
    other = other_data(own, "bob/b@v2")
    assert (other.path, other.revision, other.subset, other.label_column) == ("bob/b", "v2", None, None)
    assert other.on_unreadable == "skip"
    assert other_data(own, "bob/b").revision is None and other_data(own, "photos/").image_column is None
    same = other_data(own, "ann/a")
    assert (same.revision, same.subset, same.image_column) == ("v1", "s", "i")
    assert other_data(own, "ann/a@v2").revision == "v2" and other_data(own, "ann/a@v2").subset == "s"
    assert other_data(DataConfig(path="a.csv", label_column="l"), "b.csv").label_column == "l"
    assert other_data(None, "bob/b@v2") == DataConfig(path="bob/b", revision="v2")
