"""The image cache: the same images as from the files, found by content, whole after any accident."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_folder
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BitImageProcessor, ViTImageProcessor

from vit_finetune.data import cache
from vit_finetune.data.batches import EpochSampler
from vit_finetune.data.cache import PixelCache, cached_edge, shrink
from vit_finetune.data.images import EncodedImage
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.splits.prepared import prepare_splits
from vit_finetune.data.transforms import TrainingImages, TrainingIndex, collate
from vit_finetune.recipe import AugmentationConfig, DataConfig
from vit_finetune.run import RunError


def draw_photos(root: Path, count: int = 6, size: tuple[int, int] = (150, 110), suffix: str = ".jpg") -> Path:
    """Smooth pictures with edges, in two class folders, each of another size."""
    for number in range(count):
        drawn = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        folder = root / ("even" if number % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        sides = (size[0] + 5 * number, size[1] - 3 * number)
        Image.fromarray(drawn).resize(sides, Image.Resampling.BICUBIC).save(folder / f"{number}{suffix}")
    return root


def training_images(
    path: Path, processor: Any = None, **augmentation: Any
) -> tuple[TrainingImages, list[str]]:
    config = DataConfig(path=str(path), test_fraction=0, validation_fraction=0.2)
    split = prepare_splits(config).splits["train"]
    processor = processor or ViTImageProcessor(size={"height": 28, "width": 28})
    images = TrainingImages(split, processor, AugmentationConfig(**augmentation), seed=3)
    return images, column_values(split, "digest")


def pixels(images: TrainingImages, epoch: int = 1) -> torch.Tensor:
    return torch.stack([images[TrainingIndex(epoch, row)]["pixel_values"] for row in range(len(images))])


def test_the_edge_is_256_for_224() -> None:
    assert cached_edge((224, 224)) == 256
    assert cached_edge((224, 112)) == 256


def test_images_below_the_edge_come_out_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    images, digests = training_images(folder, policy="trivialaugment", random_erasing=0.5)
    from_files = pixels(images)
    images.read_from_cache(tmp_path / "cache", digests)
    assert images.is_cached and torch.equal(pixels(images), from_files)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 28, "width": 28}),
        BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28}),
    ],
)
def test_without_a_crop_large_images_come_out_bit_for_bit(processor: Any, tmp_path: Path) -> None:
    images, digests = training_images(draw_photos(tmp_path / "photos"), processor, crop_scale=None)
    from_files = pixels(images)
    images.read_from_cache(tmp_path / "cache", digests)
    assert torch.equal(pixels(images), from_files)


def test_large_images_come_out_as_the_same_crops_a_little_softer(tmp_path: Path) -> None:
    images, digests = training_images(draw_photos(tmp_path / "photos"), crop_scale=(0.3, 1.0))
    from_files = pixels(images).float()
    images.read_from_cache(tmp_path / "cache", digests)
    cached = images.pictures.open(0)
    assert min(cached.decode().shape[1:]) == cached_edge((28, 28)) == 32
    assert cached.size == images.files.open(0).size
    difference = (pixels(images).float() - from_files).abs()
    assert 0 < difference.mean() < 7  # of 255, at 32 pixels, where half a pixel is much
    # Other crops would differ far more: the tolerance tells them apart.
    assert (pixels(images, epoch=2).float() - from_files).abs().mean() > 30


def test_an_image_is_prepared_once_even_for_two_files(tmp_path: Path) -> None:
    root = draw_photos(tmp_path / "photos")
    (root / "even" / "copy.jpg").write_bytes((root / "even" / "0.jpg").read_bytes())
    images, digests = training_images(root)
    prepared: list[int] = []
    keep = PixelCache(tmp_path / "cache", "test", lambda picture: (prepared.append(1), picture.decode())[1])
    for _ in range(2):
        found = keep.images(images.files.open, digests)
        for row in range(len(images)):
            assert torch.equal(found.open(row).decode(), images.files[row])
    assert len(prepared) == len(set(digests))


def test_an_edited_image_is_another(tmp_path: Path) -> None:
    root = draw_photos(tmp_path / "photos")
    for turned in (False, True):
        if turned:
            for file in root.rglob("*.jpg"):
                Image.open(file).rotate(180).save(file)
        images, digests = training_images(root, crop_scale=(0.3, 1.0))
        from_files = pixels(images).float()
        images.read_from_cache(tmp_path / "cache", digests)
        assert (pixels(images).float() - from_files).abs().mean() < 7


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_processes_read_the_same(tmp_path: Path, context: str) -> None:
    images, digests = training_images(draw_photos(tmp_path / "photos", 12))
    images.read_from_cache(tmp_path / "cache", digests)
    here = pickle.loads(pickle.dumps(images))
    assert torch.equal(pixels(here), pixels(images))
    sampler = EpochSampler(len(images), seed=0)
    batches = {
        workers: list(
            DataLoader(
                images, 4, sampler=sampler, num_workers=workers, collate_fn=collate,
                multiprocessing_context=context if workers else None,
            )
        )
        for workers in (0, 2)
    }  # fmt: skip
    for alone, helped in zip(batches[0], batches[2], strict=True):
        assert torch.equal(alone["pixel_values"], helped["pixel_values"])


def test_what_is_augmented_is_never_written_back(tmp_path: Path, folder: Path) -> None:
    images, digests = training_images(folder, policy="trivialaugment", random_erasing=0.9)
    images.read_from_cache(tmp_path / "cache", digests)
    packs = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.bin")}
    first = pixels(images)
    pixels(images, epoch=2)
    assert torch.equal(pixels(images), first)
    images.pictures.open(0).decode().fill_(0)  # even where somebody writes into it
    assert packs and all(path.read_bytes() == content for path, content in packs.items())


# --------------------------------------------------------------------------- accidents

FILL = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from vit_finetune.data import cache
    from vit_finetune.data.images import EncodedImage

    cache.CHUNK, cache.PACK_BYTES = 1, 30_000
    files = sorted(Path(sys.argv[1]).rglob("*.jpg"))

    def prepare(picture):
        print("prepared", flush=True)
        time.sleep(float(sys.argv[3]))
        return picture.decode()

    found = cache.PixelCache(Path(sys.argv[2]), "test", prepare).images(
        lambda row: EncodedImage(files[row].read_bytes()), [str(file) for file in files]
    )
    assert all((found.open(row).decode() == EncodedImage(file.read_bytes()).decode()).all()
               for row, file in enumerate(files))
    """
)


def fill(photos: Path, folder: Path, pause: float = 0.0) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", FILL, str(photos), str(folder), str(pause)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_several_processes_fill_one_cache_once(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos", 10)
    together = [fill(photos, tmp_path / "cache", 0.05) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in together]
    assert [process.returncode for process in together] == [0, 0, 0], outputs
    assert sum(out.count("prepared") for out, _ in outputs) == 10


@pytest.mark.slow
def test_a_killed_filling_loses_the_open_pack_only(tmp_path: Path) -> None:
    photos, folder = draw_photos(tmp_path / "photos", 14), tmp_path / "cache"
    with fill(photos, folder, 0.2) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # held still while looked at: it may be between two packs
            process.send_signal(signal.SIGSTOP)
            kept, left_open = list(folder.rglob("*.parquet")), list(folder.rglob(".*.bin"))
            if kept and left_open:
                break
            process.send_signal(signal.SIGCONT)
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert kept and left_open, "killed with one pack finished and the next one open"
    with fill(photos, folder) as process:
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert 0 < out.count("prepared") < 14
    assert not list(folder.rglob(".*.bin")), "what the killed one left is gone"
    assert len(list(folder.rglob("*.bin"))) == len(list(folder.rglob("*.parquet"))) > len(kept)


@pytest.mark.parametrize("damage", ["cut pack", "lost pack", "lost index", "cut index", "empty index"])
def test_a_damaged_cache_is_filled_again(tmp_path: Path, damage: str) -> None:
    images, digests = training_images(draw_photos(tmp_path / "photos"))
    keep = PixelCache(tmp_path / "cache", "test", EncodedImage.decode)
    keep.images(images.files.open, digests)
    (pack,), (index,) = keep.folder.glob("*.bin"), keep.folder.glob("*.parquet")
    target = pack if "pack" in damage else index
    if "lost" in damage:
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[: 0 if "empty" in damage else -10])
    again = keep.images(images.files.open, digests)
    for row in range(len(images)):
        assert torch.equal(again.open(row).decode(), images.files[row])
    assert not pack.exists() and not index.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    images, digests = training_images(draw_photos(tmp_path / "photos"))
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"image cache cannot be written: .*data\.cache=off"):
        images.read_from_cache(tmp_path / "file", digests)


def test_an_error_while_filling_leaves_no_open_pack(tmp_path: Path) -> None:
    images, digests = training_images(draw_photos(tmp_path / "photos"))

    def fail(picture: EncodedImage) -> torch.Tensor:
        raise OSError(28, os.strerror(28))

    keep = PixelCache(tmp_path / "cache", "test", fail)
    with pytest.raises(RunError, match=r"cannot be written: No space left.*data\.cache=off"):
        keep.images(images.files.open, digests)
    assert [path.name for path in keep.folder.iterdir()] in ([], [".lock"])


def test_a_full_disk_leaves_no_open_pack(tmp_path: Path) -> None:
    pack = cache._Pack(tmp_path)
    pack.file.close()
    pack.file = Path("/dev/full").open("wb")  # noqa: SIM115 - discard() closes it
    pack.add("digest", np.zeros((2, 2, 3), np.uint8), (2, 2))  # still in the buffer, so that closing fails
    pack.discard()
    assert not list(tmp_path.iterdir())


def test_an_index_that_cannot_be_written_leaves_no_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, digests = training_images(draw_photos(tmp_path / "photos"))

    def fail(*arguments: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(cache.pyarrow.parquet, "write_table", fail)
    with pytest.raises(RunError, match=r"cannot be written: No space left.*data\.cache=off"):
        images.read_from_cache(tmp_path / "cache", digests)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".bin"] == []


@pytest.mark.parametrize("change", ["another image", "no image", "gone"])
def test_an_image_that_changes_before_it_is_kept_is_refused(tmp_path: Path, change: str) -> None:
    root = draw_photos(tmp_path / "photos")
    images, digests = training_images(root)
    for file in root.rglob("*.jpg"):
        match change:
            case "another image":
                Image.open(file).rotate(180).save(file)
            case "no image":
                file.write_bytes(b"no image")
            case "gone":
                file.unlink()
    with pytest.raises(RunError, match=r"\.jpg: .*Leave the images as they are"):
        images.read_from_cache(tmp_path / "cache", digests)
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_cache_keeps_no_files_open_and_may_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PACK_BYTES", 1)
    images, digests = training_images(draw_photos(tmp_path / "photos", 12))
    images.read_from_cache(tmp_path / "cache", digests)
    before, fresh = len(os.listdir("/proc/self/fd")), pickle.loads(pickle.dumps(images))
    read = pixels(images)
    assert len(images.pictures.packs) > 5 and len(os.listdir("/proc/self/fd")) < before + 5
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(pixels(images), read)
    with pytest.raises(RunError, match="the image cache changed while it was in use"):
        pixels(fresh)


def test_shrinking_keeps_the_mean_and_the_shape(tmp_path: Path) -> None:
    draw_photos(tmp_path, count=1, size=(640, 480))
    picture = EncodedImage((tmp_path / "even" / "0.jpg").read_bytes())
    whole, small = picture.decode().float(), shrink(picture, 64)
    assert small.dtype == torch.uint8 and min(small.shape[1:]) == 64
    assert small.shape[2] / small.shape[1] == pytest.approx(640 / 480, rel=0.02)
    assert small.float().mean((1, 2)).tolist() == pytest.approx(whole.mean((1, 2)).tolist(), abs=1)


def test_only_a_few_prepared_images_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    draw_folder(tmp_path / "photos", classes=2, per_class=20)
    images, _ = training_images(tmp_path / "photos")
    prepared: list[int] = []
    keep = PixelCache(tmp_path / "cache", "test", lambda picture: (prepared.append(1), picture.decode())[1])
    with cache.ThreadPoolExecutor(1) as threads:
        taken: Callable[[], int] = lambda: len(prepared)  # noqa: E731
        for number, _ in enumerate(keep._prepare_all(threads, images.files.open, list(range(len(images))))):
            assert taken() <= number + 4
