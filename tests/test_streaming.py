"""Streams: who is in which split, which batches come, whatever the shards, workers and processes."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import TINY_VIT, draw_folder
from drawn_streams import (
    SIZES,
    TOTAL,
    build,
    epoch_of,
    expected_images,
    images_in,
    key_of,
    numbers_of,
    prepare,
)
from shard_files import NAMES, draw_png, sample, write_parquet, write_tar, write_tars

from vit_finetune.data.sources import hub
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.streaming import survey
from vit_finetune.data.streaming.prepared import PreparedStream, prepare_data
from vit_finetune.data.streaming.streams import Carving
from vit_finetune.model.loading import load_model
from vit_finetune.recipe import DataConfig, ModelConfig, RecipeError, build_recipe
from vit_finetune.run import RunError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_model(ModelConfig(config=TINY_VIT), NAMES)[1]


@pytest.fixture
def data(tmp_path: Path) -> PreparedStream:
    return prepare(write_tars(tmp_path / "shards", SIZES), shuffle_buffer=6)


# --------------------------------------------------------------------------- splits


def test_the_carved_splits_are_those_of_the_hash(data: PreparedStream) -> None:
    """The rule, written out once more: 64 bits of the hash of seed and content hash, as a share of 2^64."""
    expected: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for number in range(TOTAL):
        digest = hashlib.blake2b(f"0/{key_of(number)}".encode(), digest_size=8).hexdigest()
        share = int(digest, 16) / 16**16
        expected["validation" if share < 0.1 else "test" if share < 0.2 else "train"].append(number)
    assert all(expected.values())
    assert numbers_of(data) == expected
    assert data.train.num_images == len(expected["train"])
    assert data.labels == sorted(NAMES)
    for split, rows in data.splits.items():
        named = [data.labels[label] for label in column_values(rows, "label")]
        assert named == [NAMES[number % 3] for number in numbers_of(data)[split]]


def test_splits_do_not_depend_on_shards_or_format(tmp_path: Path, data: PreparedStream) -> None:
    expected = numbers_of(data)
    assert numbers_of(prepare(write_tars(tmp_path / "other", [TOTAL]))) == expected
    assert numbers_of(prepare(write_parquet(tmp_path / "parquet", [11, TOTAL - 11]))) == expected
    assert numbers_of(prepare(write_tars(tmp_path / "seed", SIZES), split_seed=5)) != expected


def test_carving_keeps_the_shares() -> None:
    carving = Carving(0, {"validation": 0.1, "test": 0.25})
    counts = Counter(carving.split_of(str(number)) for number in range(20_000))
    for split, share in (("validation", 0.1), ("test", 0.25), ("train", 0.65)):
        assert abs(counts[split] - 20_000 * share) < 4 * (20_000 * share * (1 - share)) ** 0.5


def test_copies_of_an_image_are_never_on_both_sides(tmp_path: Path) -> None:
    members = [
        (f"{copy}/{name}", content) for copy in range(3) for n in range(30) for name, content in sample(n)
    ]
    data = prepare(write_tar(tmp_path / "a.tar", *members))
    numbers = {split: set(members) for split, members in numbers_of(data).items()}
    assert sum(map(len, numbers.values())) == 30
    assert sum(map(len, numbers_of(data).values())) == 90


def test_the_splits_of_the_source_are_taken(tmp_path: Path) -> None:
    for split, start, sizes in (("train", 0, [6, 4]), ("val", 10, [5]), ("test", 15, [3, 3])):
        write_tars(tmp_path, sizes, split, start)
    data = prepare(tmp_path)
    expected = {"train": range(10), "validation": range(10, 15), "test": range(15, 21)}
    assert numbers_of(data) == {split: list(numbers) for split, numbers in expected.items()}
    assert data.train.shard_sizes == [6, 4]


def test_a_survey_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tars(tmp_path, SIZES)
    first = numbers_of(prepare(folder))
    with monkeypatch.context() as patch:
        patch.setattr(survey, "_write_survey", None)
        assert numbers_of(prepare(folder)) == first
    write_tars(folder, [9])  # 7 before: 7 and 8 come twice now
    data = prepare(folder)
    counts = {split: len(numbers) for split, numbers in numbers_of(data).items()}
    assert sum(counts.values()) == TOTAL + 2
    assert data.train.num_images == counts["train"]


def test_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    for split, start in (("train", 0), ("validation", 10), ("test", 20)):
        rows = {
            "image": [{"bytes": draw_png(number), "path": None} for number in range(start, start + 10)],
            "label": [
                -1 if split == "test" or number % 5 == 0 else number % 3
                for number in range(start, start + 10)
            ],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    data = prepare(tmp_path)
    labelled = {"train": [1, 2, 3, 4, 6, 7, 8, 9], "validation": [11, 12, 13, 14, 16, 17, 18, 19]}
    assert numbers_of(data) == labelled
    assert data.train.num_images == 8
    assert any("test has no labelled images" in finding.message for finding in data.findings.findings)


def test_class_names_beside_the_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", *(m for n in range(30) for m in sample(n, label=str(n % 3))))
    (tmp_path / "classes.txt").write_text("zebra\nant\nbee")
    data = prepare(tmp_path)
    assert data.labels == ["zebra", "ant", "bee"]
    (tmp_path / "classes.txt").write_text("zebra\nant")
    with pytest.raises(RunError, match="found the label '2'; expected one of"):
        prepare(tmp_path)


def test_provenance_tells_the_shards(tmp_path: Path, data: PreparedStream) -> None:
    facts = data.describe("shards")
    assert facts["splits"]["train"]["num_images"] == data.train.num_images
    assert facts["splits"]["train"]["fingerprint"].startswith("shards:sha256:")
    assert facts["splits"]["test"]["fingerprint"].startswith("sha256:")
    moved = prepare(write_tars(tmp_path / "elsewhere", SIZES), shuffle_buffer=6)
    assert moved.describe("x")["splits"] == facts["splits"]
    other = prepare(write_tars(tmp_path / "others", [*SIZES, 1]))
    assert other.train.fingerprint != data.train.fingerprint


# --------------------------------------------------------------------------- what goes wrong


def broken(folder: Path, carved: bool) -> Path:
    """Shards with one image that cannot be decoded, in the split that is asked for."""
    carving = Carving(0, {"validation": 0.1, "test": 0.1})
    wanted = next(
        data
        for data in (b"no image %d" % number for number in range(100))
        if (carving.split_of(hashlib.blake2b(data, digest_size=16).hexdigest()) == "train") != carved
    )
    write_tars(folder, SIZES)
    write_tar(folder / "part-009.tar", *sample(200), ("x.png", wanted), ("x.cls", b"red"))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_and_is_named(tmp_path: Path, processor: Any, workers: int) -> None:
    batches = build(prepare(broken(tmp_path, carved=False)), processor, num_workers=workers)
    with pytest.raises(RunError, match=r"^part-009.tar/x: cannot be read: not an image") as caught:
        epoch_of(batches, 0)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(RunError, match=r"^part-009.tar/x: cannot be read: not an image"):
        prepare(tmp_path).train.head(1000)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_skipped_and_counted(tmp_path: Path, processor: Any, workers: int) -> None:
    data = prepare(broken(tmp_path, carved=False), on_unreadable="skip")
    batches = build(data, processor, num_workers=workers)
    found = epoch_of(batches, 0)
    assert len(images_in(found)) == (data.train.num_images or 0) - 1
    assert batches.unreadable == {"part-009.tar/x": "not an image"}
    assert len(data.train.head(1000)) == (data.train.num_images or 0) - 1


def test_unreadable_images_of_held_splits_are_found_before_training(tmp_path: Path) -> None:
    folder = broken(tmp_path, carved=True)
    with pytest.raises(RunError, match=r"part-009.tar/x: not an image"):
        prepare(folder)
    data = prepare(folder, on_unreadable="skip")
    (finding,) = (finding for finding in data.findings.findings if finding.kind == "unreadable")
    assert [image.id for image in finding.images] == ["part-009.tar/x"]
    assert all("part-009.tar/x" not in split["id"][:] for split in data.splits.values())


def test_copies_in_validation_and_test_are_left_out_of_validation(tmp_path: Path) -> None:
    for split, start, sizes in (("train", 0, [10]), ("val", 10, [6]), ("test", 14, [6])):
        write_tars(tmp_path, sizes, split, start)
    data = prepare(tmp_path)
    assert numbers_of(data)["validation"] == [10, 11, 12, 13]
    (finding,) = (finding for finding in data.findings.findings if finding.kind == "listing")
    assert finding.message.startswith("2 images of validation left out, the same as images of test: ")


def test_fewer_shards_than_processes(data: PreparedStream, processor: Any) -> None:
    with pytest.raises(RunError, match="5 shards cannot be divided over 6 processes"):
        build(data, processor, processes=6)


def test_a_shard_that_breaks_in_the_middle(tmp_path: Path, processor: Any) -> None:
    folder = write_tars(tmp_path, SIZES)
    data = prepare(folder)
    path = folder / "part-002.tar"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(RunError, match=r"part-002.tar: "):
        epoch_of(build(data, processor), 0)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"group": "label"}, "group"),
        ({"fold": "1/5"}, "fold"),
        ({"per_class": 4}, "per_class"),
        ({"splits": "runs/x"}, "splits"),
        ({"exclude": "findings.json"}, "exclude"),
        ({"cache": "somewhere/"}, "cache"),
        ({"path": "digits"}, "digits"),
    ],
)
def test_what_does_not_go_with_streaming(value: dict[str, Any], named: str) -> None:
    values = {"data": {"path": "x", "streaming": True, **value}, "model": {"config": TINY_VIT}}
    with pytest.raises(RecipeError, match=named):
        build_recipe(values, name="x")


def test_folders_of_images_cannot_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"only shards can be streamed.*leave out data.streaming"):
        prepare(draw_folder(tmp_path / "photos"))


def test_nothing_to_validate_on(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="validation_fraction"):
        prepare(write_tars(tmp_path, SIZES), validation_fraction=0)
    (tmp_path / "part-000.tar").unlink()
    with pytest.raises(RunError, match="no labelled images to validate on"):
        prepare(write_tars(tmp_path, SIZES), validation_fraction=1e-9)


def test_prepare_data_takes_either(tmp_path: Path) -> None:
    folder = write_tars(tmp_path, SIZES)
    assert isinstance(prepare_data(DataConfig(path=str(folder), streaming=True)), PreparedStream)
    held = prepare_data(DataConfig(path=str(folder)))
    assert "train" in held.splits and not isinstance(held, PreparedStream)


# --------------------------------------------------------------------------- the Hub


def as_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`owner/name` is this folder, loaded as the Hub's datasets are."""
    real = datasets.load_dataset

    monkeypatch.setattr(
        hub.datasets,
        "load_dataset",
        lambda path, name=None, revision=None, streaming=False: real(str(folder), streaming=streaming),
    )
    monkeypatch.setattr(hub, "resolve_commit", lambda *asked: "0123abcd")
    # Waited at the end of each epoch for the threads of old versions of pyarrow.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def test_a_hub_dataset_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: Any) -> None:
    write_parquet(tmp_path / "data", SIZES, "train")
    as_hub(tmp_path, monkeypatch)
    data = prepare("owner/name", shuffle_buffer=6)
    assert data.kind == "hub"
    assert data.labels == NAMES  # in the dataset's own order
    assert numbers_of(data) == numbers_of(prepare(write_tars(tmp_path / "same", SIZES)))
    assert "0123abcd" not in data.describe("x")["splits"]["train"]["fingerprint"]
    for workers in (0, 2):
        found = epoch_of(build(data, processor, num_workers=workers), 1)
        assert Counter(images_in(found)) == expected_images(data, processor, 1)


def test_a_hub_dataset_of_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a .cls for a number."""
    members = [member for number in range(TOTAL) for member in sample(number, label=str(number % 3))]
    write_tar(tmp_path / "data" / "train-0.tar", *members)
    as_hub(tmp_path, monkeypatch)
    data = prepare("owner/name")
    assert data.labels == ["0", "1", "2"]
    assert numbers_of(data) == numbers_of(prepare(write_tars(tmp_path / "same", SIZES)))


def test_a_hub_dataset_that_does_not_tell_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: Any
) -> None:
    """Its own splits and class names: nothing has to be read before training, so nothing is counted."""
    write_parquet(tmp_path / "data", [10, 6], "train")
    write_parquet(tmp_path / "data", [3], "validation", 16)
    write_parquet(tmp_path / "data", [3], "test", 19)
    as_hub(tmp_path, monkeypatch)
    data = prepare("owner/name")
    assert data.train.num_images is None and data.train.shard_sizes is None
    assert "num_images" not in data.describe("x")["splits"]["train"]
    with pytest.raises(RunError, match=r"set training\.max_steps"):
        build(data, processor)
    batches = build(data, processor, batch_size=6, max_batches=8)  # three passes over 16 images
    every = images_in(epoch_of(batches, 0))
    passes = [Counter(every[start : start + 16]) for start in (0, 16, 32)]
    assert passes == [expected_images(data, processor, epoch) for epoch in range(3)]
    rest = images_in(epoch_of(build(data, processor, batch_size=6, max_batches=8), 0, 4))
    assert rest == every[24:]
