"""Features: what a frozen encoder makes of images, computed once for each image and kept on disk."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch.utils.data import DataLoader, Subset
from transformers import BaseImageProcessor, PreTrainedModel

from vit_finetune.console import progress
from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.transforms import EvaluationImages, collate, cores_here, normalize
from vit_finetune.files import written_whole
from vit_finetune.model.head import head_of
from vit_finetune.run import RunError
from vit_finetune.training.hardware import Hardware

PACK = 4096
"""Images whose features are written at a time; an interruption loses no more."""


class FeatureStore:
    """Features on disk, by the hash of an image's content; of one model, transform and precision.

    A folder of Parquet files, each there whole or not at all; what cannot be read is passed over.

    Args:
        folder: where they lie; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.kept: dict[str, np.ndarray] = {}
        for path in sorted(folder.glob("*.parquet")) if folder else ():
            try:
                table = pyarrow.parquet.read_table(path)
                flat = table["feature"].combine_chunks().flatten().to_numpy()
                self.kept |= zip(table["digest"].to_pylist(), flat.reshape(len(table), -1))
            except (OSError, KeyError, ValueError, pa.ArrowException):
                continue  # damaged: computed again

    kept: dict[str, np.ndarray]
    """All that there is: float32 `(width,)` by digest."""

    def add(self, digests: Sequence[str], features: np.ndarray) -> None:
        """Keeps features, float32 `(images, width)`."""
        self.kept |= zip(digests, features)
        if self.folder is None:
            return
        column = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
        table = pa.table({"digest": list(digests), "feature": column})
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.folder / f"{uuid.uuid4().hex}.parquet") as temporary:
            pyarrow.parquet.write_table(table, temporary)


def feature_folder(
    cache: Path, model: PreTrainedModel, image_processor: BaseImageProcessor, hardware: Hardware
) -> Path:
    """Where the features of this encoder, transform and precision are kept.

    Args:
        cache: where caches lie.
        model: of which the head does not count.
        image_processor: the model's.
        hardware: what was chosen for the machine.
    """
    head = {id(parameter) for parameter in head_of(model).parameters()}
    key = hashlib.blake2b(digest_size=16)
    settings = json.dumps(image_processor.to_dict(), sort_keys=True, default=str)
    key.update(f"{type(model).__name__} {settings} {hardware.autocast}".encode())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if id(value) not in head:
            key.update(name.encode())
            key.update(value.detach().cpu().contiguous().numpy().tobytes())
    return cache / f"features-{key.hexdigest()}"


def compute_features(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    split: datasets.Dataset,
    name: str,
    hardware: Hardware,
    batch_size: int,
    store: FeatureStore,
) -> np.ndarray:
    """What the model's head is given for each image, float32 `(images, width)`, in the split's order.

    Args:
        model: a classifier; is moved to the device that was chosen.
        image_processor: the model's.
        split: columns image, label and digest.
        name: of the split, for the progress bar.
        hardware: what was chosen for the machine.
        batch_size: images per step.
        store: where features are found, and added to.

    Raises:
        RunError: the logits are more than the head's linear layer over one vector, or are not finite.
    """
    digests = column_values(split, "digest")
    rows = {digest: row for row, digest in reversed(list(enumerate(digests))) if digest not in store.kept}
    missing = sorted(rows.values())
    model.to(hardware.device)
    workers = 0 if hardware.use_cpu else min(8, max(1, cores_here() - 1))
    images = Subset(EvaluationImages(split, image_processor), missing)
    loader = DataLoader(images, batch_size=batch_size, collate_fn=collate, num_workers=workers)
    waiting: list[np.ndarray] = []
    done = 0
    with _Tap(model, hardware) as tap, progress(f"features of {name}", len(missing), "images") as advance:
        for batch in loader:
            pixel_values = normalize(batch["pixel_values"].to(model.device), image_processor)
            waiting.append(tap.features(pixel_values))
            advance(len(pixel_values))
            if sum(map(len, waiting)) >= PACK or done + sum(map(len, waiting)) == len(missing):
                some = np.concatenate(waiting)
                store.add([digests[row] for row in missing[done : done + len(some)]], some)
                done, waiting = done + len(some), []
    return np.stack([store.kept[digest] for digest in digests])


class _Tap:
    """Takes what the head is given, while the model computes its logits."""

    def __init__(self, model: PreTrainedModel, hardware: Hardware) -> None:
        self.model, self.head, self.hardware = model, head_of(model), hardware
        self.given: list[torch.Tensor] = []

    def __enter__(self) -> _Tap:
        self.was_training = self.model.training
        self.model.eval()
        self.hook = self.head.register_forward_pre_hook(lambda _, given: self.given.append(given[0]))
        return self

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()
        self.model.train(self.was_training)

    @torch.inference_mode()
    def features(self, pixel_values: torch.Tensor) -> np.ndarray:
        autocast = self.hardware.autocast
        with torch.autocast(pixel_values.device.type, autocast) if autocast else nullcontext():
            logits = self.model(pixel_values=pixel_values).logits
        if len(self.given) != 1 or self.given[0].shape != (len(pixel_values), self.head.in_features):
            raise RunError(
                f"{type(self.model).__name__} does not compute its logits from one vector of each image, so "
                f"no linear probe can be fitted. Write model.method: head"
            )
        given = self.given.pop().float()
        if not (given.isfinite().all() and logits.isfinite().all()):
            raise RunError("the encoder answers with NaN or infinity: its weights are broken")
        return given.cpu().numpy()
