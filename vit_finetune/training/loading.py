"""How images reach the training step: loader processes, prefetching, pinning and the cache, as measured.

And afterwards what a run waited for, in one line.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vit_finetune.data.cache import CachedImage
from vit_finetune.data.sources.archives import cache_dir
from vit_finetune.data.transforms import TrainingImages, TrainingIndex, cores_here
from vit_finetune.recipe import TrainingConfig
from vit_finetune.training.hardware import AS_BEFORE, Choice, Hardware, measure_step

READING_SECONDS = 0.25
"""How long reading is measured for, from the files and once more from the cache."""
WORTH = 0.1
"""Share of the training time from which waiting for images is worth a remedy."""
HEADROOM = 1.25
"""Loader processes by what the step needs on average: images differ in size, and processes share cores."""
CONTENTION = 0.35
"""On a CPU, reading time by step time from which a loader process gains more than it takes from the step."""
RARER = "training.{eval,save}_strategy=steps training.{eval,save}_steps=…"
"""How to evaluate and save more rarely than every epoch; the best checkpoint needs both at the same steps."""
DISK_SHARE = 0.5
"""Share of the free disk that an automatic cache may fill."""


@dataclass(frozen=True)
class Speeds:
    """What one training image takes, in seconds."""

    read: float
    """One core, from the file to the batch."""
    read_cached: float
    """One core, from the cache to the batch."""
    cache: float
    """One core, from the file to the cache."""
    cached_bytes: float
    """Mean size in the cache."""
    step: float
    """Forward and backward on the training device."""


@dataclass
class Loading:
    """How images are loaded."""

    num_workers: int
    prefetch_factor: int | None
    """Batches that each loader process keeps ready."""
    pin_memory: bool
    cache: Path | None
    """Where shrunk images are kept; None reads the files."""
    speeds: Speeds
    streams: bool = False
    """Whether images are streamed, so that none can be kept."""
    choices: list[Choice] = field(default_factory=list)


def choose_loading(
    training: TrainingConfig,
    cache: str,
    images: TrainingImages,
    model: PreTrainedModel,
    hardware: Hardware,
    before: dict[str, Any] | None = None,
    shards: int | None = None,
) -> Loading:
    """What the recipe says, and for what it leaves `auto` the best by measuring reading against the step.

    Takes about a second. Neither the weights nor any random state is changed.

    Args:
        training: the recipe's section.
        cache: the recipe's `data.cache`.
        images: to be read.
        model: to be trained; is moved to the training device.
        hardware: what was chosen so far.
        before: provenance of the run that is resumed; its cache, which changes pixels a little, is kept.
        shards: of a stream, those that each process reads; None where images are held.
    """
    step = measure_step(model, hardware.device, hardware.autocast, hardware.batch_size)
    speeds = Speeds(*measure_reading(images), step)
    cores = cores_here()
    workers = _choose_workers(training, hardware.use_cpu, speeds.read, speeds.step, cores)
    if shards is not None:
        kept = Choice("image cache", "off", "streamed images are not kept")
        workers = _limit_workers(workers, max(1, shards), resumed=before is not None)
    else:
        epochs = _count_epochs(training, hardware.batch_size, len(images))
        kept = _choose_cache(cache, epochs, len(images), speeds, int(workers.value), cores, before)
    if kept.value != "off" and training.dataloader_num_workers == "auto":
        workers = _choose_workers(training, hardware.use_cpu, speeds.read_cached, speeds.step, cores)
    count = int(workers.value)
    prefetch = getattr(training, "dataloader_prefetch_factor", None) or 4
    pinned = getattr(training, "dataloader_pin_memory", True) and not hardware.use_cpu
    return Loading(
        count,
        prefetch if count else None,
        pinned,
        None if kept.value == "off" else _cache_folder(cache),
        speeds,
        shards is not None,
        [workers, kept],
    )


def _choose_workers(training: TrainingConfig, use_cpu: bool, read: float, step: float, cores: int) -> Choice:
    name = "loader processes"
    if training.dataloader_num_workers != "auto":
        return Choice(name, str(training.dataloader_num_workers), "the recipe says so")
    measured = f"reading takes {_ms(read)} an image, the step {_ms(step)}"
    if use_cpu and read < CONTENTION * step:
        return Choice(name, "0", f"{measured}: they would take the cores that compute")
    needed = max(1, -(-read * HEADROOM // step))
    count = int(min(needed, max(1, cores - 1)))
    return Choice(name, str(count), f"{measured}; {cores} cores")


def _limit_workers(workers: Choice, shards: int, resumed: bool) -> Choice:
    """No more loader processes than there are shards to read."""
    if resumed:
        return replace(workers, reason=AS_BEFORE)
    if int(workers.value) <= shards:
        return workers
    return replace(workers, value=str(shards), reason=f"{workers.reason}, but no more than shards")


def _choose_cache(
    asked: str,
    epochs: float,
    images: int,
    speeds: Speeds,
    workers: int,
    cores: int,
    before: dict[str, Any] | None,
) -> Choice:
    name = "image cache"
    earlier = next((c["value"] for c in (before or {}).get("choices", []) if c["name"] == name), None)
    if asked != "auto":
        return Choice(name, "off" if asked == "off" else "on", "the recipe says so")
    if earlier is not None:
        return Choice(name, earlier, AS_BEFORE)
    waiting = waiting_seconds(speeds.read, speeds.step, workers)
    saved = waiting - waiting_seconds(speeds.read_cached, speeds.step, workers)
    share = saved / (speeds.step + waiting)
    if share < WORTH:
        return Choice(name, "off", f"it would save {max(share, 0):.0%} of the time")
    if saved * epochs < 2 * speeds.cache / cores:
        reason = f"it would save {share:.0%} of the time, but too few epochs to make up for filling it"
        return Choice(name, "off", reason)
    place = _existing(_cache_folder(asked))
    size, free = speeds.cached_bytes * images, shutil.disk_usage(place).free
    problem = ""
    if not os.access(place, os.W_OK):
        problem = f"{place} cannot be written"
    elif size > DISK_SHARE * free:
        problem = f"take {size / 1e9:.1f} of {free / 1e9:.1f} GB free"
    if problem:
        reason = f"it would save {share:.0%} of the time, but {problem}; data.cache=FOLDER puts it elsewhere"
        return Choice(name, "off", reason)
    return Choice(name, "on", f"saves {share:.0%} of the time, takes {size / 1e9:.2f} GB")


def _count_epochs(training: TrainingConfig, batch_size: int, images: int) -> float:
    """How often each image is read: what `max_steps` comes to, where the recipe sets it."""
    steps = int(getattr(training, "max_steps", -1))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_step = processes * batch_size * training.gradient_accumulation_steps
    return steps * per_step / images if steps > 0 else training.num_train_epochs


def waiting_seconds(read: float, step: float, workers: int) -> float:
    """Seconds an image that the step stands still: all of reading, or what loader processes leave of it.

    Args:
        read: seconds an image on one core.
        step: seconds an image.
        workers: loader processes.
    """
    return max(0.0, read / workers - step) if workers else read


def _cache_folder(asked: str) -> Path:
    return cache_dir() / "pixels" if asked == "auto" else Path(asked).expanduser()


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.1 else f"{1e3 * seconds:,.0f} ms"


# --------------------------------------------------------------------------- measuring


class _InMemory:
    """A few images as a cache would hold them."""

    def __init__(self, pictures: dict[int, CachedImage]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def open(self, index: int) -> CachedImage:
        return self.pictures[index]


def measure_reading(images: TrainingImages) -> tuple[float, float, float, float]:
    """Seconds of one core for an image: from its file, from a cache, into a cache; and its bytes there."""
    rows = [number * len(images) // 64 for number in range(64)] if len(images) > 64 else range(len(images))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    try:
        read, seen = _seconds_each(lambda row: images[TrainingIndex(0, row)], list(rows))
        kept: dict[int, CachedImage] = {}

        def keep(row: int) -> None:
            picture = images.files.open(row)
            pixels = images.prepare(picture).permute(1, 2, 0).contiguous().permute(2, 0, 1)
            kept[row] = CachedImage(pixels, picture.size)

        into, seen = _seconds_each(keep, seen)
        cached = copy.copy(images)
        cached.pictures = _InMemory(kept)
        from_cache, _ = _seconds_each(lambda row: cached[TrainingIndex(0, row)], seen)
    finally:
        torch.set_num_threads(threads)
    size = sum(picture.pixels.nbytes for picture in kept.values()) / len(kept)
    return read, from_cache, into, size


def _seconds_each(work: Callable[[int], Any], rows: list[int]) -> tuple[float, list[int]]:
    """Mean seconds of the work on a row, without the first; and the rows that there was time for."""
    work(rows[0])
    done, start = [], time.perf_counter()
    for row in rows:
        work(row)
        done.append(row)
        if time.perf_counter() - start > READING_SECONDS:
            break
    return (time.perf_counter() - start) / len(done), done


# --------------------------------------------------------------------------- afterwards


def describe_waiting(loading: Loading, images: int, seconds: dict[str, float], use_cpu: bool) -> str:
    """What a run waited for, how fast images came and went, and what to change: one line.

    Args:
        loading: how images were loaded.
        images: how many this process trained on, each epoch's counted again.
        seconds: what `ViTTrainer.seconds` holds, and the whole under `total`.
        use_cpu: whether the model trained on the CPU.
    """
    total = max(seconds["total"], 1e-9)
    parts = {name: seconds[name] / total for name in ("images", "evaluation", "checkpoints")}
    read = loading.speeds.read_cached if loading.cache else loading.speeds.read
    pipeline = max(1, loading.num_workers) / read
    source = "from the cache" if loading.cache else "from the files"
    steps = 1 - sum(parts.values())
    step_rate = images / max(steps * total, 1e-9)
    shown = {"training steps": steps, "waiting for images": parts["images"]}
    shown |= {name: parts[name] for name in ("evaluation", "checkpoints")}
    return (
        f"time: {', '.join(f'{share:.0%} {name}' for name, share in shown.items())}. Images can be read at "
        f"{pipeline:,.0f}/s {source} ({loading.num_workers} loader processes), the step took "
        f"{step_rate:,.0f}/s: {_advice(loading, parts, pipeline / max(step_rate, 1e-9), use_cpu)}"
    )


def _advice(loading: Loading, parts: dict[str, float], spare: float, use_cpu: bool) -> str:
    """What to change; `spare` is how many times as fast images can be read as they are trained on."""
    if parts["images"] >= WORTH and loading.num_workers and spare > HEADROOM:
        return "nothing to change, only the first images of each epoch are waited for"
    if parts["images"] >= WORTH:
        cores, workers = cores_here(), loading.num_workers
        if (
            loading.cache is None
            and not loading.streams
            and loading.speeds.read_cached < 0.7 * loading.speeds.read
        ):
            faster = loading.speeds.read / loading.speeds.read_cached
            return f"data.cache=FOLDER would read {faster:.1f} times faster"
        if workers < cores - 1 and not (use_cpu and workers):
            return f"set training.dataloader_num_workers={cores - 1}"
        return "more cores would help"
    if parts["evaluation"] >= 0.3:
        return f"evaluate less often ({RARER})"
    if parts["checkpoints"] >= WORTH:
        return f"save less often ({RARER})"
    return "nothing to change, the model is the limit"
