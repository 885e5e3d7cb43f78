"""Images to the Hub: what is published, what is not, and what is left of an upload that was killed."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from conftest import Say, draw_folder, draw_image
from huggingface_hub import DatasetCard
from loopback_hub import LoopbackHub
from PIL import ExifTags, Image, PngImagePlugin

from vit_finetune.data.sources.source import load_source
from vit_finetune.publishing import dataset
from vit_finetune.publishing.dataset import tells_place, write_parquet
from vit_finetune.recipe import DataConfig
from vit_finetune.run import RunError


@pytest.mark.hub
def test_where_images_were_taken_does_not_become_public_by_accident(
    hub: LoopbackHub, say: Say, tmp_path: Path
) -> None:
    photos = draw_folder(tmp_path / "photos", classes=2, suffix=".jpg")
    draw_image((1, 2, 3), 5).save(photos / "blue" / "home.jpg", exif=located(), quality=95)

    code, out, told = say("upload-data", photos, "ann/photos", "--dry-run", "--with-gps")
    assert code == 0 and "data/train-00000-of-00001.parquet" in told and "1 of the images tells where" in out
    assert not hub.requests and not hub.store.repos
    code, _, told = say("upload-data", photos, "ann/photos")
    assert code == 1 and "1 image would tell everybody" in told and "blue/home.jpg" in told
    assert not hub.store.repos
    code, _, told = say("upload-data", photos, "ann/photos", "--private")
    assert code == 0, told
    repo = hub.repo("ann/photos", "dataset")
    assert repo.private and "1 of the images tells where it was taken" in repo.files()["README.md"].decode()
    # It is known to be private: the words need not say so again.
    assert say("upload-data", photos, "ann/photos")[0] == 0

    hub.create("ann/else", "dataset", files={"train.csv": b"mine"})
    code, _, told = say("upload-data", photos, "ann/else", "--with-gps")
    assert code == 1 and "holds something else" in told
    code, _, told = say("upload-data", photos, "bob/photos", "--with-gps")
    assert code == 1 and "you are ann" in told


@pytest.mark.hub
def test_how_the_data_is_read_can_be_said(hub: LoopbackHub, say: Say, tmp_path: Path) -> None:
    photos = draw_folder(tmp_path / "photos")
    (photos / "red" / "12.png").touch()
    lines = [
        f"photos/{path.relative_to(photos)},{path.parent.name},{int(path.stem) // 3}"
        for path in sorted(photos.rglob("*.png"))
    ]
    table = tmp_path / "scans.csv"
    table.write_text("\n".join(["file,diagnosis,patient", *lines]))
    words = ("data.label_column=diagnosis", "data.group=patient")
    code, _, told = say("upload-data", table, "ann/scans", *words)
    assert code == 1 and "data.on_unreadable=skip" in told and not hub.store.repos
    code, _, told = say("upload-data", table, "ann/scans", *words, "data.on_unreadable=skip")
    assert code == 0, told
    repo = hub.repo("ann/scans", "dataset")
    assert "data.path=ann/scans data.group=group" in repo.files()["README.md"].decode()
    rows = pq.read_table(io.BytesIO(repo.files()["data/train-00000-of-00001.parquet"])).to_pylist()
    assert len(rows) == 36
    assert all(int(Path(row["file_name"]).stem) // 3 == int(row["group"]) for row in rows)
    for wrong in ("data.fold=1/5", "group=patient", "model.path=x"):
        code, _, told = say("upload-data", table, "ann/scans", wrong)
        assert code == 2 and f"{wrong}: expected key=value, the key of data.subset" in told
    code, _, told = say("upload-data", "ann/scans@v1", "ann/copy")
    assert code == 2 and "write path ann/scans and revision v1" in told and "pydantic" not in told


@pytest.mark.hub
def test_what_people_wrote_into_the_card_stays(hub: LoopbackHub, say: Say, tmp_path: Path) -> None:
    photos = draw_folder(tmp_path / "photos", per_class=2)  # too few to be trained on, not to be published
    begun = hub.create("ann/photos", "dataset", files={"README.md": b"# My photos\n\nOf my garden.\n"})

    def upload(*words: str) -> str:
        code, _, told = say("upload-data", photos, "ann/photos", *words)
        assert code == 0, told
        return begun.files()["README.md"].decode()

    card = upload("--license", "mit")
    assert card.count("# My photos\n\nOf my garden.\n\n<!-- vit-finetune:") == 1 and "6 images of 3" in card
    written = card.replace("pretty_name: photos", "pretty_name: Garden\nlanguage: [en]").replace("\n", "\r\n")
    files = {"README.md": begun.objects.regular((written + "\r\nCite me.").encode())}
    hub.store.add(begun, "main", "ann", "By hand", files=files)
    assert upload() == written + "\r\nCite me." and len(begun.commits()) == 4, "nothing to renew"
    (photos / "red" / "0.png").unlink()
    card = upload()
    front = DatasetCard(card).data.to_dict()
    assert (front["pretty_name"], front["language"], front["license"]) == ("Garden", ["en"], "mit")
    assert front["dataset_info"]["splits"][0]["num_examples"] == 5 and front["tags"] == ["vit-finetune"]
    assert card.count("5 images of 3") == 1 and "6 images" not in card
    assert "Of my garden." in card and card.endswith("Cite me.")
    assert upload("--license", "cc0-1.0").count("license: cc0-1.0") == 1


@pytest.mark.hub
def test_what_the_hub_would_refuse_is_refused_at_once(hub: LoopbackHub, say: Say, tmp_path: Path) -> None:
    photos = draw_folder(tmp_path / "photos", classes=2, per_class=2)
    for name in ("photos", "ann/a--b", "../photos", "ann/photos@v1"):
        code, _, told = say("upload-data", photos, name, "--dry-run")
        assert code == 1 and ("is no name that the Hub takes" in told or "write owner/photos" in told), told
    assert not hub.requests
    code, _, told = say("upload-data", photos, "ann/photos", "--license", "public")
    assert code == 1 and "the Hub does not take what the card says" in told and not hub.store.repos


@pytest.mark.hub
def test_splits_are_in_the_order_in_which_people_look_at_them(say: Say, tmp_path: Path) -> None:
    for split in ("test", "train", "val"):
        draw_folder(tmp_path / "photos" / split, classes=2, per_class=2)
    code, card, told = say("upload-data", tmp_path / "photos", "ann/photos", "--dry-run")
    assert code == 0 and "| Class | train | validation | test |" in card, told
    (config,) = DatasetCard(card).data.to_dict()["configs"]
    assert [file["split"] for file in config["data_files"]] == ["train", "validation", "test"]


@pytest.mark.hub
def test_a_killed_upload_leaves_no_copy_of_the_data_for_ever(
    hub: LoopbackHub, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = tmp_path / "cache" / "uploads"
    words = ("upload-data", draw_folder(tmp_path / "photos"), "ann/photos")
    dying = "\nimport os\nfrom vit_finetune.publishing import dataset\ndataset.commit_files = lambda *a, **k: os._exit(9)\n"
    assert say(*words, before=dying, VIT_FINETUNE_CACHE=str(uploads.parent))[0] == 9
    assert list(uploads.rglob("train-*"))
    monkeypatch.setenv("VIT_FINETUNE_CACHE", str(uploads.parent))
    with dataset._work_folder("ann/photos") as folder:
        assert not list(folder.iterdir())
        code, _, told = say(*words, VIT_FINETUNE_CACHE=str(uploads.parent))
        assert code == 1 and "another upload to it is under way" in told
    assert say(*words, VIT_FINETUNE_CACHE=str(uploads.parent))[0] == 0
    assert not [path for path in uploads.iterdir() if path.suffix != ".lock"]


# --------------------------------------------------------------------------- without a Hub


def located() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1  # with no tag beside it, Pillow writes some formats without
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (52.0, 31.0, 12.0)
    return exif


def encode(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    draw_image((9, 9, 9), 1).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as the package has it
def test_which_images_tell_where_they_were_taken() -> None:
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", "<exif:GPSLatitude>52,31N</exif:GPSLatitude>")
    assert all(tells_place(encode(kind, exif=located())) for kind in ("JPEG", "PNG", "WEBP"))
    assert tells_place(encode("PNG", pnginfo=xmp))
    raw = located().tobytes()
    for name, text in {
        "XML:com.adobe.xmp": "<exif:GPSLatitude>52,31N</exif:GPSLatitude>",
        "Raw profile type APP1": f"\nexif\n{len(raw):8}\n{raw.hex()}\n",
        "Raw profile type xmp": f"\nxmp\n      15\n{b'exif:GPSLatitude'.hex()}\n",
    }.items():
        packed, plain = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
        packed.add_itxt(name, text, zip=True)
        plain.add_text(name, text)
        assert tells_place(encode("PNG", pnginfo=packed)) and tells_place(encode("PNG", pnginfo=plain))
    harmless = PngImagePlugin.PngInfo()
    harmless.add_text("Raw profile type iptc", "\niptc\n       2\nzz\n", zip=True)
    assert not tells_place(encode("PNG", pnginfo=harmless))
    assert not any(tells_place(encode(kind, exif=turned)) for kind in ("JPEG", "PNG", "WEBP", "TIFF"))
    assert not any(tells_place(encode(kind)) for kind in ("JPEG", "PNG", "GIF"))
    assert not tells_place(encode("JPEG", exif=b"Exif\0\0MM\0*broken")) and not tells_place(b"")


def test_the_same_images_make_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    from vit_finetune.data.checkup.checkup import leave_out_unreadable

    config = DataConfig(path=str(folder))
    sums = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written = write_parquet(leave_out_unreadable(load_source(config), config), tmp_path / name)
        sums.append(
            {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in written.files.items()}
        )
    assert sums[0] == sums[1]


@pytest.mark.parametrize("name", ["/home/ann/0.png", "C:\\ann\\0.png", "../0.png"])
def test_paths_of_a_machine_are_not_published(tmp_path: Path, name: str) -> None:
    rows = {
        "image": [{"bytes": encode("PNG"), "path": None}] * 2,
        "label": [0, 1],
        "file_name": ["a.png", name],
        "digest": ["", ""],
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    text = datasets.Value("string")
    split = datasets.Dataset.from_dict(
        rows, features=datasets.Features({**features, "file_name": text, "digest": text})
    )
    split.remove_columns("digest").to_parquet(str(tmp_path / "train.parquet"))
    config = DataConfig(path=str(tmp_path / "train.parquet"))
    source = load_source(config)
    from vit_finetune.data.checkup.checkup import leave_out_unreadable

    with pytest.raises(RunError, match="is a path of some machine"):
        write_parquet(leave_out_unreadable(source, config), tmp_path)
